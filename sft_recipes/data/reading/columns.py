"""Which column of a row is what, and which format follows from it.

Two words are kept apart here: a *column* is what we call it (`instruction`), a *name* is what it is
called in the row (`question`). A column under another name than ours is recognised only where no
other name could be meant as well; names are compared without case, spaces and underscores. Two
candidates are an error that prints the settings to choose by.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft_recipes.data.reading.column_advice import (
    doubtful_text,
    no_format,
    several_candidates,
    several_formats,
)
from sft_recipes.data.reading.column_values import (
    NamesInRow,
    as_list,
    first_step,
    fold,
    is_conversation,
    is_empty,
)
from sft_recipes.data.reading.known_formats import FORMATS, PAIR_FORMATS, TEXT_FORMATS, Format
from sft_recipes.data.reading.row_fields import value_at
from sft_recipes.errors import InputError

QUESTIONS = frozenset(
    "instruction instructions question query prompt problem message1"
    " userprompt usermessage userinput".split()
)
# Who asked, and in some data sets what; they count where no column is called a question.
_SPEAKERS = frozenset({"user", "human"})
ANSWERS = frozenset(
    "output answer response reply completion generation target summary highlights solution"
    " message2 bestanswer modelresponse assistant assistantresponse gpt bot".split()
)
CONTEXTS = frozenset(
    "context article document passage paragraph background dialogue dialog".split()
)
# The question where nothing else is called one. Beside a question they are doubtful, and nothing is
# decided: what the question is about, or the whole row once more. A column called exactly `input`
# is no doubt, that is our own name of what the question is about.
_TEXTS = frozenset({"input", "text"})
_CONVERSATIONS = frozenset(
    "messages message conversations conversation dialogues dialogue dialogs dialog chats chat"
    " turns thread".split()
)
# Names in common use for a column, folded. A column without an entry is found by its own name
# alone. Unasked they decide on a format only where they name a conversation, or a question and its
# answer; any other format is recognised by its own names, or asked for with `format`.
COMMON_NAMES: Mapping[str, frozenset[str]] = {
    "instruction": QUESTIONS,
    "prompt": QUESTIONS,
    "output": ANSWERS,
    "completion": ANSWERS,
    "messages": _CONVERSATIONS,
    "conversations": _CONVERSATIONS,
    "input": CONTEXTS,
    "system": frozenset("system systemprompt systemmessage systeminstruction sysprompt".split()),
    "tools": frozenset({"tools", "functions"}),
}


def all_names(mapping: Mapping[str, NamesInRow]) -> list[str]:
    """All names that a mapping of columns leads to, as it writes them."""
    names: list[str] = []
    for names_of_column in mapping.values():
        names += as_list(names_of_column)
    return names


def columns_of(names: Iterable[str], mapping: Mapping[str, NamesInRow]) -> set[str]:
    """The columns of rows that have these names: those mapped, and the names that are not.

    What is mapped to another column is no longer there under its own name.
    """
    taken: set[str] = set()
    for name in all_names(mapping):
        taken.add(name)
        taken.add(first_step(name))
    columns = set(names) - taken
    columns.update(mapping)
    return columns


def has_format(
    values: Mapping[str, Any], mapping: Mapping[str, NamesInRow], format: Format
) -> bool:
    """Whether a row has the columns that a format requires, with values that are the format's.

    Raises RowProblem for a mapping that leads nowhere.
    """
    if not columns_of(values, mapping).issuperset(format.required):
        return False
    if format.fits is None:
        return True
    required: dict[str, Any] = {}
    for column in format.required:
        required[column] = value_at(values, mapping.get(column, column))
    return format.fits(required)


def detect(values: Mapping[str, Any], mapping: Mapping[str, NamesInRow], where: str) -> str:
    """The format of rows with these columns.

    Raises InputError where none or several fit, RowProblem for a mapping that leads nowhere; never
    says raw.
    """
    matching: list[str] = []
    for name, format in FORMATS.items():
        if name not in TEXT_FORMATS and has_format(values, mapping, format):
            matching.append(name)
    if len(matching) == 1:
        return matching[0]
    if matching:
        required = {name: FORMATS[name].required for name in matching}
        raise several_formats(values, required, where)
    return _detect_by_common_names(values, mapping, where)


def _detect_by_common_names(
    values: Mapping[str, Any], mapping: Mapping[str, NamesInRow], where: str
) -> str:
    finder = _Finder(values, mapping)
    questions = finder.questions()
    answers = finder.answers()
    conversations = finder.named_like("messages")
    is_pair = bool(questions and answers)
    if conversations and is_pair:
        names = [*conversations, questions[0], answers[0]]
        raise several_candidates(values, {"messages": conversations[0]}, names, where)
    if conversations:
        return "messages"
    if not is_pair:
        raise _no_format(values, mapping, where)
    if "prompt" in mapping or "completion" in mapping:
        return "prompt_completion"
    for name in questions + answers:
        value = values.get(name)
        if isinstance(value, str) or name in all_names(mapping):
            continue
        # A side that is a list of messages is no text to write into a section of a template.
        if is_conversation(value):
            return "prompt_completion"
    return "instruction"


def _no_format(
    values: Mapping[str, Any], mapping: Mapping[str, NamesInRow], where: str
) -> InputError:
    columns = columns_of(values, mapping)
    required: dict[str, Sequence[str]] = {}
    other_values: list[str] = []
    for name, format in FORMATS.items():
        required[name] = format.required
        if format.fits is not None and columns.issuperset(format.required):
            other_values.append(name)
    return no_format(values, mapping, required, other_values, where)


def recognise(
    values: Mapping[str, Any],
    format: str,
    mapping: Mapping[str, NamesInRow],
    where: str,
    wanted: Sequence[str],
) -> dict[str, str]:
    """The columns of a row that are read under another name than ours, {column: name}.

    Beside those of `mapping`. `wanted` are the columns to look for. Raises InputError, with the
    settings that choose, where two names could be meant.
    """
    if format in TEXT_FORMATS:
        return {}
    finder = _Finder(values, mapping)
    recognised: dict[str, str] = {}
    for column in wanted:
        if column in finder.columns:
            continue
        taken = recognised.values()
        candidates = [name for name in finder.candidates(column) if name not in taken]
        if len(candidates) > 1:
            example = finder.example_mapping(format, recognised)
            raise several_candidates(values, example, candidates, where)
        if candidates:
            recognised[column] = candidates[0]
    doubtful = finder.doubtful_texts(recognised)
    if doubtful:
        example = finder.example_mapping(format, recognised)
        raise doubtful_text(values, example, doubtful[0], where)
    return recognised


def refuse_second_candidates(
    values: Mapping[str, Any], format: str, mapping: Mapping[str, NamesInRow], where: str
) -> None:
    """Raise InputError where a name beside the one that is ours may be meant.

    Only for a question and an answer in columns of their own, of a format that nobody named.
    """
    if format not in PAIR_FORMATS:
        return
    finder = _Finder(values, mapping)
    for column in FORMATS[format].required:
        if column in mapping or column not in values:
            continue
        others: list[str] = []
        for name in finder.named_like(column):
            value = values[name]
            if name != column and isinstance(value, str) and not is_empty(value):
                others.append(name)
        if others:
            example = finder.example_mapping(format, {column: column})
            raise several_candidates(values, example, [column, *others], where)


def _may_hold(column: str, value: Any) -> bool:
    """Whether a value is of the kind that belongs into a column, whatever it is called."""
    if column in ("messages", "conversations"):
        return is_conversation(value)
    if column == "input":
        return value is None or isinstance(value, str)
    return True


class _Finder:
    """Finds the names that may be a column, among those of a row that no setting takes."""

    def __init__(self, values: Mapping[str, Any], mapping: Mapping[str, NamesInRow]) -> None:
        self.values = values
        self.mapping = mapping
        self.columns = columns_of(values, mapping)
        self._free: list[str] = []
        for name in values:
            if name in self.columns and name not in mapping:
                self._free.append(name)

    def candidates(self, column: str) -> list[str]:
        """The names that may be a column; a question is found by more than its name."""
        if column in ("instruction", "prompt"):
            return self.questions()
        return self.named_like(column)

    def questions(self) -> list[str]:
        """The names that may be the question."""
        by_user = self._named_by_user("instruction", "prompt")
        if by_user:
            return by_user
        named = self.named_like("instruction")
        if named:
            return named
        speakers = self._called(_SPEAKERS)
        if speakers:
            return speakers
        # Nothing is called a question, so a text that could be asked about is the question itself.
        return [*self.named_like("input"), *self._called(_TEXTS)]

    def answers(self) -> list[str]:
        """The names that may be the answer."""
        by_user = self._named_by_user("output", "completion")
        if by_user:
            return by_user
        return self.named_like("output")

    def named_like(self, column: str) -> list[str]:
        """The names in common use for a column, with a value of its kind."""
        candidates: list[str] = []
        for name in self._called(COMMON_NAMES.get(column, frozenset({fold(column)}))):
            if _may_hold(column, self.values[name]):
                candidates.append(name)
        return candidates

    def _called(self, folded_names: frozenset[str]) -> list[str]:
        return [name for name in self._free if fold(name) in folded_names]

    def _named_by_user(self, *columns: str) -> list[str]:
        """What the mapping names for one of these columns."""
        names: list[str] = []
        for column in columns:
            names += as_list(self.mapping.get(column, ()))
        return names

    def doubtful_texts(self, recognised: Mapping[str, str]) -> list[str]:
        """`text` beside a recognised question: what is asked about, or the row once more."""
        if "instruction" not in recognised or "input" in recognised or "input" in self.columns:
            return []
        doubtful: list[str] = []
        for name in self._called(_TEXTS):
            if name not in recognised.values() and self.values[name]:
                doubtful.append(name)
        return doubtful

    def example_mapping(self, format: str, recognised: Mapping[str, str]) -> dict[str, NamesInRow]:
        """A `column_mapping` that works, for errors to offer: of several candidates the first."""
        example: dict[str, NamesInRow] = {**self.mapping, **recognised}
        for column in FORMATS[format].required:
            candidates = self.candidates(column)
            if column in example or not candidates:
                continue
            example[column] = candidates[0]
            if column in self.values:
                example[column] = column
        if format == "instruction" and "input" not in example:
            context = self._context_beside(example)
            if context is not None:
                example["input"] = context
        for column in ("system", "tools"):
            candidates = self.named_like(column)
            if column not in example and len(candidates) > 1:
                example[column] = candidates[0]
        return example

    def _context_beside(self, mapping: Mapping[str, NamesInRow]) -> str | None:
        """The first name that may be what the question of this mapping is about, or None."""
        taken = all_names(mapping)
        for name in [*self.questions(), *self.named_like("input")]:
            if name not in taken and fold(name) not in _TEXTS:
                return name
        return None
