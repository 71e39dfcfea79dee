"""The values of one row by column, as formats ask for them: a text, or the turns of a conversation.

A column is what we call it (`instruction`); in the row it may have another name, which may lead
into nested values (`instances.0.input`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.reading.calls import text_of
from sft_recipes.data.reading.column_advice import setting
from sft_recipes.data.reading.column_values import NamesInRow
from sft_recipes.data.reading.conversations import read_turns
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.turn_keys import TurnKeys
from sft_recipes.data.reading.turn_message import Origin
from sft_recipes.messages import Message


def new_turn(role: str, content: str, column: str) -> Message:
    """A turn whose text stands in, or is made of, a column that is no conversation.

    While it is read, a message carries `train` and `origin`, see `conversations.py`.
    """
    return {"role": role, "content": content, "train": None, "origin": Origin(column)}


@dataclass(frozen=True, slots=True)
class RowFields:
    """The values of one row by column.

    `names`: {column: its name in the row} where that is another; `named_by_user`: those of them
    that a setting names, where a list of lines is text.
    """

    values: Mapping[str, Any]
    names: Mapping[str, NamesInRow]
    named_by_user: Mapping[str, NamesInRow]
    keys: TurnKeys

    def text(self, column: str) -> str:
        """The text of a column. Raises RowProblem for anything else."""
        value = self.values[column]
        if isinstance(value, str):
            return value
        if column in self.named_by_user:
            return _joined_lines(value, column)
        if _is_lines(value):
            name = self.names.get(column, column)
            join = setting("column_mapping", {**self.named_by_user, column: name})
            fix = f"write a string, or join the lines: set {join}"
            raise RowProblem(column, "expected a string, got list", fix)
        return text_of(value, column)

    def optional_text(self, column: str) -> str:
        """The text of a column that a row may lack, else ""."""
        if self.values.get(column) is None:
            return ""
        return self.text(column)

    def turns(self, column: str) -> list[Message]:
        """The turns of a conversation that stands in a column."""
        return read_turns(self.values[column], column, self.keys)

    def turns_or_text(self, column: str, role: str) -> list[Message]:
        """The same where the column may be a plain text, which is a turn of this role."""
        value = self.values[column]
        is_text = not isinstance(value, list | dict)
        if isinstance(value, list) and column in self.named_by_user:
            is_text = bool(value) and isinstance(value[0], str)  # lines
        if is_text:
            return [new_turn(role, self.text(column), column)]
        return self.turns(column)


def value_at(values: Mapping[str, Any], names: NamesInRow) -> Any:
    """What a row has under a name; under several names their texts, joined by blank lines.

    Raises RowProblem for a name that leads nowhere.
    """
    if isinstance(names, str):
        return _value_at_path(values, names)
    texts: list[str] = []
    for name in names:
        value = _value_at_path(values, name)
        if value is not None and value != "":
            texts.append(_joined_lines(value, name))
    return "\n\n".join(texts)


def _value_at_path(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; a column whose name holds dots itself is found first."""
    if path in values:
        return values[path]
    value: Any = values
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            what = f"column_mapping leads to {path!r}, which this row does not have (at {step!r})"
            fix = f"correct the mapping; the row has {', '.join(values) or 'no columns'}"
            raise RowProblem("", what, fix)
    return value


def _joined_lines(value: Any, column: str) -> str:
    """Text, or the lines of a list of texts."""
    if _is_lines(value):
        return "\n".join(value)
    return text_of(value, column)


def _is_lines(value: Any) -> bool:
    """Whether this is a list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(line, str) for line in value)
