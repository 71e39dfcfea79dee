"""Which column of a row is what: the columns of each format, and names in common use for them.

A column under another name than ours is recognised only where no other column could be meant as well; names are
compared without case, spaces and underscores. Two candidates are an error that prints the settings to choose by.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.reading.column_advice import (
    doubtful_text,
    no_format,
    several_candidates,
    several_formats,
)
from sft_recipes.data.reading.column_values import as_list, fold, is_conversation, is_empty, root

# Their name, or names of several columns that are joined.
TheirNames = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class FormatColumns:
    """The columns that a row of a format must have, and those it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS: Mapping[str, FormatColumns] = {
    "instruction": FormatColumns(
        ("instruction", "output"), ("input", "system", "history", "tools")
    ),
    "messages": FormatColumns(("messages",), ("system", "tools")),
    "sharegpt": FormatColumns(("conversations",), ("system", "tools")),
    "prompt_completion": FormatColumns(("prompt", "completion"), ("system", "tools")),
    "raw": FormatColumns(("text",)),
    "rendered": FormatColumns(("text",)),
}
# Text as it stands: never assumed, always asked for.
TEXT_FORMATS = ("raw", "rendered")

_QUESTIONS = frozenset(
    "instruction instructions question query prompt problem message1 userprompt usermessage userinput".split()
)
# Who asked, and in some data sets what; they count where no column is called a question.
_SPEAKERS = frozenset({"user", "human"})
_ANSWERS = frozenset(
    "output answer response reply completion generation target summary highlights solution message2 bestanswer"
    " modelresponse assistant assistantresponse gpt bot".split()
)
CONTEXTS = frozenset(
    "context article document passage paragraph background dialogue dialog".split()
)
# These are the question itself where nothing else is, and what the question is about only under our own name.
_TEXTS = frozenset({"input", "text"})
_CONVERSATIONS = frozenset(
    "messages message conversations conversation dialogues dialogue dialogs dialog chats chat turns thread".split()
)
COMMON_NAMES: Mapping[str, frozenset[str]] = {
    "instruction": _QUESTIONS,
    "prompt": _QUESTIONS,
    "output": _ANSWERS,
    "completion": _ANSWERS,
    "messages": _CONVERSATIONS,
    "conversations": _CONVERSATIONS,
    "input": CONTEXTS,
    "system": frozenset("system systemprompt systemmessage systeminstruction sysprompt".split()),
    "tools": frozenset({"tools", "functions"}),
    "history": frozenset({"history"}),
}


def their_names(mapping: Mapping[str, TheirNames]) -> list[str]:
    """All columns that a mapping names, as it names them."""
    names: list[str] = []
    for theirs in mapping.values():
        names += as_list(theirs)
    return names


def our_names(columns: Iterable[str], mapping: Mapping[str, TheirNames]) -> set[str]:
    """The columns under our names; a column mapped to another name is no longer there under its own."""
    mapped = their_names(mapping)
    return (set(columns) - set(mapped) - {root(name) for name in mapped}) | set(mapping)


def detect(values: Mapping[str, Any], mapping: Mapping[str, TheirNames], where: str) -> str:
    """The format of rows with these columns. Raises InputError where none or several fit; never says raw."""
    names = our_names(values, mapping)
    matching: list[str] = []
    for format, columns in FORMATS.items():
        if format not in TEXT_FORMATS and names.issuperset(columns.required):
            matching.append(format)
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise several_formats(
            values, {format: FORMATS[format].required for format in matching}, where
        )
    return _detect_by_common_names(values, mapping, where)


def _detect_by_common_names(
    values: Mapping[str, Any], mapping: Mapping[str, TheirNames], where: str
) -> str:
    finder = _Finder(values, mapping, where)
    questions = finder.questions()
    answers = finder.answers()
    conversations = finder.candidates("messages")
    is_pair = bool(questions and answers)
    if conversations and not is_pair:
        return "messages"
    if conversations:
        names = [*conversations, questions[0], answers[0]]
        raise several_candidates(values, {"messages": conversations[0]}, names, where)
    if not is_pair:
        required = {format: columns.required for format, columns in FORMATS.items()}
        raise no_format(values, mapping, required, where)
    if "prompt" in mapping or "completion" in mapping:
        return "prompt_completion"
    for name in questions + answers:
        value = values.get(name)
        # A side that is a list of messages is no text to write into a section of a template.
        if (
            not isinstance(value, str)
            and is_conversation(value)
            and name not in their_names(mapping)
        ):
            return "prompt_completion"
    return "instruction"


def recognise(
    values: Mapping[str, Any],
    format: str,
    mapping: Mapping[str, TheirNames],
    where: str,
    wanted: Sequence[str],
) -> dict[str, str]:
    """The columns of a row that are read under another name than ours, {our name: theirs}, beside those of `mapping`.

    `wanted` are the columns, under our names, to look for. Raises InputError, with the settings that choose, where two
    columns could be meant.
    """
    if format in TEXT_FORMATS:
        return {}
    finder = _Finder(values, mapping, where)
    recognised: dict[str, str] = {}
    for ours in wanted:
        if ours in finder.names:
            continue
        candidates = (
            finder.questions() if ours in ("instruction", "prompt") else finder.candidates(ours)
        )
        candidates = [name for name in candidates if name not in recognised.values()]
        if len(candidates) > 1:
            raise several_candidates(values, finder.choice(format, recognised), candidates, where)
        if candidates:
            recognised[ours] = candidates[0]
    doubtful = finder.doubtful_texts(recognised)
    if doubtful:
        raise doubtful_text(values, finder.choice(format, recognised), doubtful[0], where)
    return recognised


def refuse_second_candidates(
    values: Mapping[str, Any], format: str, mapping: Mapping[str, TheirNames], where: str
) -> None:
    """Raise InputError where a column beside the one that we call `instruction`, `output` and so on may be meant.

    Only for a question and an answer in columns of their own, of a format that nobody named.
    """
    if format not in ("instruction", "prompt_completion"):
        return
    finder = _Finder(values, mapping, where)
    for ours in FORMATS[format].required:
        if ours in mapping or ours not in values:
            continue
        others = [
            name
            for name in finder.candidates(ours)
            if name != ours and isinstance(values[name], str)
        ]
        others = [name for name in others if not is_empty(values[name])]
        if others:
            raise several_candidates(
                values, finder.choice(format, {ours: ours}), [ours, *others], where
            )


class _Finder:
    """Looks for columns among those of a row that no setting names."""

    def __init__(
        self, values: Mapping[str, Any], mapping: Mapping[str, TheirNames], where: str
    ) -> None:
        self.values = values
        self.mapping = mapping
        self.where = where
        self.names = our_names(values, mapping)
        self._free = [name for name in values if name in self.names and name not in mapping]

    def candidates(self, ours: str) -> list[str]:
        """The columns that may be the one that we call so, by their names and kinds of value."""
        names = [name for name in self._free if fold(name) in COMMON_NAMES[ours]]
        if ours in ("messages", "conversations"):
            return [name for name in names if is_conversation(self.values[name])]
        if ours == "input":
            return [
                name
                for name in names
                if self.values[name] is None or isinstance(self.values[name], str)
            ]
        return names

    def questions(self) -> list[str]:
        """The columns that may hold the question: those that are called so, else the texts that are asked about."""
        pinned = self._pinned("instruction", "prompt")
        if pinned:
            return pinned
        named = self.candidates("instruction") or [
            name for name in self._free if fold(name) in _SPEAKERS
        ]
        return named or self.candidates("input") + self._texts()

    def answers(self) -> list[str]:
        """The columns that may hold the answer."""
        return self._pinned("output", "completion") or self.candidates("output")

    def _pinned(self, *ours: str) -> list[str]:
        """What the mapping names for one of these."""
        return their_names({name: self.mapping[name] for name in ours if name in self.mapping})

    def _texts(self) -> list[str]:
        return [name for name in self._free if fold(name) in _TEXTS]

    def doubtful_texts(self, recognised: Mapping[str, str]) -> list[str]:
        """`text` beside a recognised question: it may be what is asked about, or the whole row once more."""
        if "instruction" not in recognised or "input" in recognised or "input" in self.names:
            return []
        return [
            name for name in self._texts() if name not in recognised.values() and self.values[name]
        ]

    def choice(self, format: str, recognised: Mapping[str, str]) -> dict[str, TheirNames]:
        """A whole mapping to choose by: the first candidate of each required column, and what else goes with it."""
        choice: dict[str, TheirNames] = {**self.mapping, **recognised}
        for ours in FORMATS[format].required:
            candidates = (
                self.questions() if ours in ("instruction", "prompt") else self.candidates(ours)
            )
            if ours not in choice and candidates:
                choice[ours] = ours if ours in self.values else candidates[0]
        if format == "instruction" and "input" not in choice:
            taken = set(their_names(choice))
            others = [
                name for name in self.questions() + self.candidates("input") if name not in taken
            ]
            others = [name for name in others if fold(name) not in _TEXTS]
            if others:
                choice["input"] = others[0]
        for ours in ("system", "tools"):
            candidates = self.candidates(ours)
            if ours not in choice and len(candidates) > 1:
                choice[ours] = candidates[0]
        return choice
