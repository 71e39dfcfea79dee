"""From a row to an `Example`, by the format that the row has.

The formats stand in `reading/known_formats.py`, columns and keys in common use under other names in
`reading/columns.py` and `reading/conversations.py`. Types are checked, never converted; text is
never edited.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft_recipes.data.reading.calls import tool_definitions
from sft_recipes.data.reading.column_advice import first_text, setting
from sft_recipes.data.reading.column_values import NamesInRow, fold
from sft_recipes.data.reading.columns import columns_of, detect, has_format
from sft_recipes.data.reading.conversations import is_trained
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.known_formats import FORMATS
from sft_recipes.data.reading.refused_columns import MEDIA, checks_for, refuse_placeholders
from sft_recipes.data.reading.row_fields import RowFields, new_turn, value_at
from sft_recipes.data.reading.row_format import RowFormat
from sft_recipes.data.reading.turn_message import Origin
from sft_recipes.messages import Example, Message, MessageProblem, find_message_problem

__all__ = ["RowConverter", "RowFormat", "convert_row", "detect_format"]


def detect_format(
    columns: Iterable[str], column_mapping: Mapping[str, NamesInRow], where: str
) -> str:
    """The format that rows with these columns have; a row tells more than its columns' names alone.

    Raises InputError where none or several fit, RowProblem for a mapping that leads nowhere; never
    says raw.
    """
    if not isinstance(columns, Mapping):
        columns = dict.fromkeys(columns, "")
    return detect(columns, column_mapping, where)


def convert_row(
    values: Mapping[str, Any], format: RowFormat, source: str, row: int, line: int | None
) -> Example:
    """Convert one row. Raises RowProblem for any row that is not what its format says."""
    return RowConverter(tuple(values), format).convert(values, source, row, line)


class RowConverter:
    """Converts rows that have the same columns; what follows from their names is looked up once."""

    def __init__(self, columns: Sequence[str], format: RowFormat) -> None:
        self.format = format
        self._known = FORMATS[format.name]
        self._reading = format.reading()
        self._checks = checks_for(columns, self._reading)
        self._has_media = any(fold(checked.column) in MEDIA for checked in self._checks)
        self._mapping = format.mapping
        self._columns = columns_of(columns, self._mapping)

    def convert(
        self, values: Mapping[str, Any], source: str, row: int, line: int | None
    ) -> Example:
        """Convert one row. Raises RowProblem for any row that is not what its format says."""
        format = self.format
        fields = self._fields(values)
        columns = {name: fields.values[name] for name in format.extra if name in fields.values}
        if self._known.messages is None:
            text = fields.text("text")
            if not text.strip():
                raise RowProblem("text", "empty", "write the text or remove the row")
            is_rendered = format.name == "rendered"
            return Example([], source, row, line, text=text, columns=columns, rendered=is_rendered)
        tools = tool_definitions(fields.values.get("tools"))
        messages = _with_system(self._known.messages(fields), fields)
        train = _train_flags(messages)
        origins: list[Origin] = []
        for message in messages:
            del message["train"]
            origins.append(message.pop("origin"))
        self._check(messages, origins, values)
        return Example(messages, source, row, line, tools, train, columns=columns)

    def _check(
        self, messages: Sequence[Message], origins: Sequence[Origin], values: Mapping[str, Any]
    ) -> None:
        """Raise RowProblem for messages that are no conversation to train."""
        problem = find_message_problem(messages)
        if problem is not None:
            field = self._field_of(problem, origins)
            raise RowProblem(field, problem.what, problem.fix)
        for message, origin in zip(messages, origins, strict=True):
            if not message["content"].strip():
                self._refuse_empty(message, origin.content)
            if self._has_media:
                refuse_placeholders(message["content"], origin.content, values, self._reading)

    def _field_of(self, problem: MessageProblem, origins: Sequence[Origin]) -> str:
        """Where a broken rule stands in the row; what concerns all turns, where the answer would."""
        if problem.position is None:
            return self._known.required[-1]
        origin = origins[problem.position]
        if problem.key == "role":
            return origin.role
        return origin.content

    def _refuse_empty(self, message: Message, field: str) -> None:
        """Raise RowProblem for an empty prompt, or an empty answer that is not allowed.

        An answer that calls a tool may be empty.
        """
        if message["role"] == "user":
            raise RowProblem(field, "the prompt is empty", "write it or remove the row")
        is_answer = message["role"] == "assistant" and not message.get("tool_calls")
        if is_answer and not self.format.allow_empty_output:
            fix = "write it, remove the row, or set `allow_empty_output: true`"
            raise RowProblem(field, "the answer is empty", fix)

    def _fields(self, values: Mapping[str, Any]) -> RowFields:
        """The row's values by column."""
        for checked in self._checks:
            problem = checked.check(checked.column, values, self._reading)
            if problem is not None:
                raise problem
        for column in self._known.required:
            if column not in self._columns:
                raise _missing_column(column, values, self.format)
        fields: dict[str, Any] = {}
        for column in self.format.columns:
            if column in self._columns:
                fields[column] = value_at(values, self._mapping.get(column, column))
        return RowFields(fields, self._mapping, self.format.column_mapping, self.format.keys)


def _with_system(messages: list[Message], fields: RowFields) -> list[Message]:
    """The messages with the system column as their first turn.

    Raises RowProblem where the conversation begins with another system turn.
    """
    system = fields.optional_text("system")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        what = "the column and the conversation's own system turn say different things"
        fix = "keep one of them, or list the columns to read under `columns`"
        raise RowProblem("system", what, fix)
    return [new_turn("system", system, "system"), *messages]


def _missing_column(missing: str, values: Mapping[str, Any], format: RowFormat) -> RowProblem:
    required = FORMATS[format.name].required
    for name, other in FORMATS.items():
        if has_format(values, format.mapping, other):
            this = f"this row looks like {name} ({', '.join(other.required)})"
            what = f"{this}, the file is {format.name} ({', '.join(required)})"
            return RowProblem("", what, "keep one format per file")
    what = f"the column is missing (found: {', '.join(values) or 'none'})"
    fix = "add it or set `column_mapping`"
    text = first_text(values)
    if len(required) == 1 and text is not None:
        mapping = setting("column_mapping", {**format.column_mapping, missing: text})
        fix = f"add it, or set {mapping}"
    return RowProblem(missing, what, fix)


def _train_flags(messages: Sequence[Message]) -> tuple[bool, ...]:
    """`Example.train` of these messages.

    Empty where the data says nothing that differs from the default.
    """
    flags: list[bool] = []
    is_default = True
    for message in messages:
        flag = is_trained(message)
        is_default = is_default and flag == (message["role"] == "assistant")
        flags.append(flag)
    if is_default:
        return ()
    return tuple(flags)
