"""Row formats: how a row of each kind becomes an `Example`.

    instruction         instruction, output, and where present input, system, history (messages
                        or pairs of texts)
    messages            messages of {role, content}, OpenAI style, with tool_calls,
                        reasoning_content, train, weight
    sharegpt            conversations of {from, value}, with function_call and observation turns
    prompt_completion   prompt and completion, each text or messages; only the completion is trained
    raw                 text as it stands; never assumed, always asked for
    rendered            text that a chat template rendered already: its control tokens are
                        control tokens

`system` and `tools` may stand beside every conversation. Columns and keys in common use under other
names are in `columns.py` and `conversations.py`. Types are checked, never converted; text is never
edited.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.reading.calls import expect, text_of, tool_definitions
from sft_recipes.data.reading.column_advice import first_text, setting
from sft_recipes.data.reading.column_values import fold, is_conversation
from sft_recipes.data.reading.columns import FORMATS, TEXT_FORMATS, TheirNames, detect, our_names
from sft_recipes.data.reading.conversations import is_trained, join_turns, read_turns
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.refused_columns import MEDIA, checks_for, refuse_placeholders
from sft_recipes.data.reading.row_format import RowFormat
from sft_recipes.messages import Example, Message, find_message_problem

__all__ = ["RowConverter", "RowFormat", "convert_row", "detect_format"]


def detect_format(
    columns: Iterable[str], column_mapping: Mapping[str, TheirNames], where: str
) -> str:
    """The format that rows with these columns have; a row tells more than its columns' names alone.

    Raises InputError where none or several fit; never says raw.
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
        self._reading = format.reading()
        self._checks = checks_for(columns, self._reading)
        self._has_media = any(fold(checked.column) in MEDIA for checked in self._checks)
        self._names = our_names(columns, format.mapping)

    def convert(
        self, values: Mapping[str, Any], source: str, row: int, line: int | None
    ) -> Example:
        """Convert one row. Raises RowProblem for any row that is not what its format says."""
        format = self.format
        fields = self._fields(values)
        columns = {name: fields.values[name] for name in format.extra if name in fields.values}
        if format.name in TEXT_FORMATS:
            text = fields.text("text")
            if not text.strip():
                raise RowProblem("text", "empty", "write the text or remove the row")
            is_rendered = format.name == "rendered"
            return Example([], source, row, line, text=text, columns=columns, rendered=is_rendered)
        tools = tool_definitions(fields.values.get("tools"))
        messages = fields.messages()
        train = _train_flags(messages)
        for message in messages:
            message.pop("train", None)
        self._check(messages, values)
        return Example(messages, source, row, line, tools, train, columns=columns)

    def _check(self, messages: Sequence[Message], values: Mapping[str, Any]) -> None:
        """Raise RowProblem for messages that are no conversation to train."""
        problem = find_message_problem(messages)
        if problem is not None:
            raise RowProblem(problem.field, problem.what, problem.fix)
        _refuse_empty(messages, self.format)
        if self._has_media:
            for index, message in enumerate(messages):
                where = f"messages[{index}].content"
                refuse_placeholders(message["content"], where, values, self._reading)

    def _fields(self, values: Mapping[str, Any]) -> "_Fields":
        """The row's values under our names."""
        for checked in self._checks:
            problem = checked.check(checked.column, values, self._reading)
            if problem is not None:
                raise problem
        for name in FORMATS[self.format.name].required:
            if name not in self._names:
                raise _missing_column(name, self._names, values, self.format)
        mapping = self.format.mapping
        fields: dict[str, Any] = {}
        for name in self.format.columns:
            if name in self._names:
                fields[name] = _look_up_all(values, mapping.get(name, name))
        return _Fields(fields, self.format)


def _missing_column(
    missing: str, names: set[str], values: Mapping[str, Any], format: RowFormat
) -> RowProblem:
    required = FORMATS[format.name].required
    for other, columns in FORMATS.items():
        if names.issuperset(columns.required):
            this = f"this row looks like {other} ({', '.join(columns.required)})"
            what = f"{this}, the file is {format.name} ({', '.join(required)})"
            return RowProblem("", what, "keep one format per file")
    what = f"the column is missing (found: {', '.join(values) or 'none'})"
    fix = "add it or set `column_mapping`"
    text = first_text(values)
    if len(required) == 1 and text is not None:
        mapping = setting("column_mapping", {**format.column_mapping, missing: text})
        fix = f"add it, or set {mapping}"
    return RowProblem(missing, what, fix)


def _look_up_all(values: Mapping[str, Any], path: TheirNames) -> Any:
    """The value at a path; of several paths their texts, joined by blank lines."""
    if isinstance(path, str):
        return _look_up(values, path)
    texts: list[str] = []
    for name in path:
        value = _look_up(values, name)
        if value is not None and value != "":
            texts.append(_joined_lines(value, name))
    return "\n\n".join(texts)


def _look_up(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; a column whose name holds dots itself is found first."""
    value: Any = values
    for step in [path] if path in values else path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            what = f"column_mapping leads to {path!r}, which this row does not have (at {step!r})"
            fix = f"correct the mapping; the row has {', '.join(values) or 'no columns'}"
            raise RowProblem("", what, fix)
    return value


def _joined_lines(value: Any, name: str) -> str:
    """Text, or the lines of a list of texts."""
    if _is_lines(value):
        return "\n".join(value)
    return text_of(value, name)


def _is_lines(value: Any) -> bool:
    """Whether this is a list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(line, str) for line in value)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content, "train": None}


@dataclass(frozen=True, slots=True)
class _Fields:
    """The values of one row under our names, and the format that says what they are."""

    values: Mapping[str, Any]
    format: RowFormat

    def text(self, name: str) -> str:
        """The text of a column; a list of lines only where the user named the column."""
        value = self.values[name]
        format = self.format
        if isinstance(value, str):
            return value
        if name in format.column_mapping:
            return _joined_lines(value, name)
        if _is_lines(value):
            theirs = format.mapping.get(name, name)
            join = setting("column_mapping", {**format.column_mapping, name: theirs})
            fix = f"write a string, or join the lines: set {join}"
            raise RowProblem(name, "expected a string, got list", fix)
        return text_of(value, name)

    def optional_text(self, name: str) -> str:
        """The text of a column that a row may lack, else ""."""
        if self.values.get(name) is None:
            return ""
        return self.text(name)

    def messages(self) -> list[Message]:
        """The row's messages, with the system column as their first turn.

        `train` of each is what the data says, or None. Raises RowProblem where the conversation
        begins with another system turn.
        """
        messages = self._conversation()
        system = self.optional_text("system")
        if not system.strip():
            return messages
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"] == system:
                return messages
            what = "the column and the conversation's own system turn say different things"
            fix = "keep one of them, or list the columns to read under `columns`"
            raise RowProblem("system", what, fix)
        return [_message("system", system), *messages]

    def _conversation(self) -> list[Message]:
        """The row's messages without its system column."""
        if self.format.name == "instruction":
            return self._instruction()
        if self.format.name == "prompt_completion":
            return self._prompt_completion()
        (column,) = FORMATS[self.format.name].required
        return read_turns(self.values[column], column, self.format.keys)

    def _instruction(self) -> list[Message]:
        messages = self._history()
        instruction = self.text("instruction")
        context = self.optional_text("input")
        question = _message("user", "\n\n".join(filter(None, (instruction, context))))
        # Some sets keep the whole prompt in `input`; an empty instruction section would teach
        # nothing.
        if instruction:
            question["instruction"] = instruction
            if context:
                question["input"] = context
        return [*messages, question, _message("assistant", self.text("output"))]

    def _history(self) -> list[Message]:
        """The turns before the instruction: messages, or pairs of a question and its answer."""
        value = self.values.get("history")
        if value and is_conversation(value):
            return read_turns(value, "history", self.format.keys)
        messages: list[Message] = []
        pairs = expect(list, value or [], "history", "a list of [question, answer] pairs")
        for index, pair in enumerate(pairs):
            place = f"history[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise RowProblem(place, "not a [question, answer] pair", "write two strings")
            messages.append(_message("user", text_of(pair[0], place)))
            messages.append(_message("assistant", text_of(pair[1], place)))
        return messages

    def _prompt_completion(self) -> list[Message]:
        prompt = self._side("prompt", "user")
        completion = self._side("completion", "assistant")
        for message in prompt:
            # Only the completion is trained, unless the data says so of a turn before it.
            message["train"] = message["train"] or False
        return join_turns(prompt, completion, "completion", self.format.keys)

    def _side(self, column: str, role: str) -> list[Message]:
        """The messages of a prompt or a completion, which may be text."""
        value = self.values[column]
        is_text = not isinstance(value, list | dict)
        if isinstance(value, list) and column in self.format.column_mapping:
            is_text = bool(value) and isinstance(value[0], str)  # lines
        if is_text:
            return [_message(role, self.text(column))]
        return read_turns(value, column, self.format.keys)


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


def _refuse_empty(messages: Sequence[Message], format: RowFormat) -> None:
    """Raise RowProblem for an empty prompt, or an empty answer that is not allowed.

    An answer that calls a tool may be empty.
    """
    for index, message in enumerate(messages):
        if message["content"].strip():
            continue
        where = _field_of(index, messages, format)
        if message["role"] == "user":
            raise RowProblem(where, "the prompt is empty", "write it or remove the row")
        is_answer = message["role"] == "assistant" and not message.get("tool_calls")
        if is_answer and not format.allow_empty_output:
            fix = "write it, remove the row, or set `allow_empty_output: true`"
            raise RowProblem(where, "the answer is empty", fix)


def _field_of(index: int, messages: Sequence[Message], format: RowFormat) -> str:
    """Where a message stands in the row.

    In a column of its own where the format has one for each side.
    """
    columns = FORMATS[format.name].required
    from_end = len(messages) - index
    if len(columns) == 2 and from_end <= 2:
        return columns[-from_end]
    return f"messages[{index}].content"
