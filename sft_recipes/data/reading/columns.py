"""Which column of a row is what: the columns of each format, and names in common use for them.

A column under another name than ours is recognised only where no other column could be meant as
well; names are compared without case, spaces and underscores. Two candidates are an error that
prints the settings to choose by.
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
    "instruction instructions question query prompt problem message1"
    " userprompt usermessage userinput".split()
)
# Who asked, and in some data sets what; they count where no column is called a question.
_SPEAKERS = frozenset({"user", "human"})
_ANSWERS = frozenset(
    "output answer response reply completion generation target summary highlights solution"
    " message2 bestanswer modelresponse assistant assistantresponse gpt bot".split()
)
CONTEXTS = frozenset(
    "context article document passage paragraph background dialogue dialog".split()
)
# These are the question itself where nothing else is, and what the question is about only under our
# own name.
_TEXTS = frozenset({"input", "text"})
_CONVERSATIONS = frozenset(
    "messages message conversations conversation dialogues dialogue dialogs dialog chats chat"
    " turns thread".split()
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
    """The columns under our names.

    A column mapped to another name is no longer there under its own.
    """
    mapped = their_names(mapping)
    return (set(columns) - set(mapped) - {root(name) for name in mapped}) | set(mapping)


def detect(values: Mapping[str, Any], mapping: Mapping[str, TheirNames], where: str) -> str:
    """The format of rows with these columns.

    Raises InputError where none or several fit; never says raw.
    """
    names = our_names(values, mapping)
    matching: list[str] = []
    for format, columns in FORMATS.items():
        if format not in TEXT_FORMATS and names.issuperset(columns.required):
            matching.append(format)
    if len(matching) == 1:
        return matching[0]
    if matching:
        required = {format: FORMATS[format].required for format in matching}
        raise several_formats(values, required, where)
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
        if isinstance(value, str) or name in their_names(mapping):
            continue
        # A side that is a list of messages is no text to write into a section of a template.
        if is_conversation(value):
            return "prompt_completion"
    return "instruction"


def recognise(
    values: Mapping[str, Any],
    format: str,
    mapping: Mapping[str, TheirNames],
    where: str,
    wanted: Sequence[str],
) -> dict[str, str]:
    """The columns of a row that are read under another name than ours, {our name: theirs}.

    Beside those of `mapping`. `wanted` are the columns, under our names, to look for. Raises
    InputError, with the settings that choose, where two columns could be meant.
    """
    if format in TEXT_FORMATS:
        return {}
    finder = _Finder(values, mapping, where)
    recognised: dict[str, str] = {}
    for ours in wanted:
        if ours in finder.names:
            continue
        taken = recognised.values()
        candidates = [name for name in finder.required(ours) if name not in taken]
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
    """Raise InputError where a column beside the one that has our name may be meant.

    Only for a question and an answer in columns of their own, of a format that nobody named.
    """
    if format not in ("instruction", "prompt_completion"):
        return
    finder = _Finder(values, mapping, where)
    for ours in FORMATS[format].required:
        if ours in mapping or ours not in values:
            continue
        others: list[str] = []
        for name in finder.candidates(ours):
            value = values[name]
            if name != ours and isinstance(value, str) and not is_empty(value):
                others.append(name)
        if others:
            choice = finder.choice(format, {ours: ours})
            raise several_candidates(values, choice, [ours, *others], where)


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
        candidates: list[str] = []
        for name in self._called(COMMON_NAMES[ours]):
            value = self.values[name]
            fits = True
            if ours in ("messages", "conversations"):
                fits = is_conversation(value)
            elif ours == "input":
                fits = value is None or isinstance(value, str)
            if fits:
                candidates.append(name)
        return candidates

    def _called(self, names: frozenset[str]) -> list[str]:
        """The columns, among those that no setting names, with one of these folded names."""
        return [name for name in self._free if fold(name) in names]

    def required(self, ours: str) -> list[str]:
        """The columns that may be the one that we call so, a question by more than its name."""
        if ours in ("instruction", "prompt"):
            return self.questions()
        return self.candidates(ours)

    def questions(self) -> list[str]:
        """The columns that may hold the question, by their names, else the texts asked about."""
        pinned = self._pinned("instruction", "prompt")
        if pinned:
            return pinned
        named = self.candidates("instruction") or self._called(_SPEAKERS)
        return named or self.candidates("input") + self._called(_TEXTS)

    def answers(self) -> list[str]:
        """The columns that may hold the answer."""
        return self._pinned("output", "completion") or self.candidates("output")

    def _pinned(self, *ours: str) -> list[str]:
        """What the mapping names for one of these."""
        names: list[str] = []
        for name in ours:
            names += as_list(self.mapping.get(name, ()))
        return names

    def doubtful_texts(self, recognised: Mapping[str, str]) -> list[str]:
        """`text` beside a recognised question: what is asked about, or the row once more."""
        if "instruction" not in recognised or "input" in recognised or "input" in self.names:
            return []
        doubtful: list[str] = []
        for name in self._called(_TEXTS):
            if name not in recognised.values() and self.values[name]:
                doubtful.append(name)
        return doubtful

    def choice(self, format: str, recognised: Mapping[str, str]) -> dict[str, TheirNames]:
        """A whole mapping to choose by: first candidates, and what else goes with them."""
        choice: dict[str, TheirNames] = {**self.mapping, **recognised}
        for ours in FORMATS[format].required:
            candidates = self.required(ours)
            if ours not in choice and candidates:
                choice[ours] = candidates[0]
                if ours in self.values:
                    choice[ours] = ours
        if format == "instruction" and "input" not in choice:
            for name in self.questions() + self.candidates("input"):
                if name not in their_names(choice) and fold(name) not in _TEXTS:
                    choice["input"] = name
                    break
        for ours in ("system", "tools"):
            candidates = self.candidates(ours)
            if ours not in choice and len(candidates) > 1:
                choice[ours] = candidates[0]
        return choice
