"""Row formats: how a row of each kind becomes an `Example`.

    instruction         instruction, output, and where present input, system, history (messages or pairs of texts)
    messages            messages of {role, content}, OpenAI style, with tool_calls, reasoning_content, train, weight
    sharegpt            conversations of {from, value}, with function_call and observation turns
    prompt_completion   prompt and completion, each text or messages; only the completion is trained
    raw                 text as it stands; never assumed, always asked for
    rendered            text that a chat template rendered already: its control tokens are control tokens

`system` and `tools` may stand beside every conversation. Columns and keys in common use under other names are in
`columns.py` and `conversations.py`. Types are checked, never converted; text is never edited.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data.reading.calls import expect, text_of, tool_definitions
from sft_recipes.data.reading.column_advice import first_text, setting
from sft_recipes.data.reading.column_values import fold, is_conversation, root
from sft_recipes.data.reading.columns import (
    FORMATS,
    TEXT_FORMATS,
    TheirNames,
    detect,
    our_names,
    their_names,
)
from sft_recipes.data.reading.conversations import (
    KNOWN_ROLES,
    MESSAGE_KEYS,
    TurnKeys,
    is_trained,
    join_turns,
    read_turns,
)
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.refused_columns import MEDIA, Reading, checks_for, refuse_placeholders
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import Example, Message, find_message_problem

# Columns of text, which several of theirs may make up.
_JOINABLE = ("instruction", "input", "output", "system", "prompt", "completion", "text")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one source are read.

    `column_mapping` is {our name: their name, or a list of names whose texts are joined}; their name may lead into
    nested values, as in `instances.0.input`. `extra` are further columns to keep on the examples (under our name) of
    the rows that have them. `recognised` is {our name: their name} where a column was recognised unasked.
    """

    name: str
    column_mapping: Mapping[str, TheirNames]
    extra: Sequence[str] = ()
    allow_empty_output: bool = False
    recognised: Mapping[str, str] = field(default_factory=dict)
    keys: TurnKeys = field(default_factory=TurnKeys)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row, under our names."""
        columns = FORMATS[self.name]
        return (*columns.required, *columns.optional, *self.extra)

    @property
    def mapping(self) -> dict[str, TheirNames]:
        """All columns that are read under another name, by the user's word or unasked."""
        return {**self.recognised, **self.column_mapping}

    def used_columns(self) -> set[str]:
        """The columns that are read, under the names they have in the rows; others are ignored."""
        mapping = self.mapping
        names = {name for name in self.columns if name not in mapping}
        names.update(their_names({ours: mapping[ours] for ours in self.columns if ours in mapping}))
        return names | {root(name) for name in names}

    def reading(self) -> Reading:
        """What decides which columns may be passed over."""
        return Reading(self.name, self.mapping, self.column_mapping, frozenset(self.used_columns()))

    def check(self, where: str) -> None:
        """Raise InputError for a format, or a name in one of the mappings, that does not exist."""
        if self.name not in FORMATS:
            raise InputError(
                Problem(
                    where, "format", f"unknown format {self.name!r}", suggest(self.name, FORMATS)
                )
            )
        for name in self.column_mapping:
            if name not in self.columns:
                fix = f"map one of {', '.join(self.columns)}; write it as {{our name: name in the file}}"
                raise InputError(
                    Problem(
                        where, "column_mapping", f"{name!r} is no column of format {self.name}", fix
                    )
                )
        for name, theirs in self.column_mapping.items():
            if not isinstance(theirs, str) and (name not in _JOINABLE or not theirs):
                fix = f"name one column; only {', '.join(_JOINABLE)} can be joined of several"
                raise InputError(
                    Problem(where, "column_mapping", f"{name!r} is given a list of columns", fix)
                )
        _check_names(where, "message_mapping", self.keys.message_mapping, MESSAGE_KEYS)
        _check_names(where, "role_mapping", self.keys.role_mapping, KNOWN_ROLES)


def _check_names(where: str, key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            fix = f"use one of {', '.join(known)}; write it as {{our name: name in the file}}"
            raise InputError(Problem(where, key, f"{name!r} is no name of ours", fix))


def detect_format(
    columns: Iterable[str], column_mapping: Mapping[str, TheirNames], where: str
) -> str:
    """The format that rows with these columns have; a row itself tells more than its columns' names alone.

    Raises InputError where none or several fit; never says raw.
    """
    values = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
    return detect(values, column_mapping, where)


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
        self._has_media = any(fold(name) in MEDIA for name, _ in self._checks)
        self._names = our_names(columns, format.mapping)

    def convert(
        self, values: Mapping[str, Any], source: str, row: int, line: int | None
    ) -> Example:
        """Convert one row. Raises RowProblem for any row that is not what its format says."""
        format = self.format
        fields = self._fields(values)
        columns = {name: fields[name] for name in format.extra if name in fields}
        if format.name in TEXT_FORMATS:
            text = _text(fields, "text", format)
            if not text.strip():
                raise RowProblem("text", "empty", "write the text or remove the row")
            return Example(
                [],
                source,
                row,
                line,
                text=text,
                columns=columns,
                rendered=format.name == "rendered",
            )
        tools = tool_definitions(fields.get("tools"))
        messages = _with_system(_conversation(fields, format), fields, format)
        train = _train_flags(messages)
        for message in messages:
            message.pop("train", None)
        problem = find_message_problem(messages)
        if problem is not None:
            raise RowProblem(*problem)
        _refuse_empty(messages, format)
        if self._has_media:
            for index, message in enumerate(messages):
                refuse_placeholders(
                    message["content"], f"messages[{index}].content", values, self._reading
                )
        return Example(messages, source, row, line, tools, train, columns=columns)

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The row's values under our names."""
        for name, check in self._checks:
            problem = check(name, values, self._reading)
            if problem is not None:
                raise problem
        missing = [name for name in FORMATS[self.format.name].required if name not in self._names]
        if missing:
            raise _missing_column(missing[0], self._names, values, self.format)
        mapping = self.format.mapping
        fields: dict[str, Any] = {}
        for name in self.format.columns:
            if name in self._names:
                fields[name] = _look_up_all(values, mapping.get(name, name))
        return fields


def _missing_column(
    missing: str, names: set[str], values: Mapping[str, Any], format: RowFormat
) -> RowProblem:
    required = FORMATS[format.name].required
    for other, columns in FORMATS.items():
        if names.issuperset(columns.required):
            what = f"this row looks like {other} ({', '.join(columns.required)}), the file is {format.name}"
            return RowProblem("", f"{what} ({', '.join(required)})", "keep one format per file")
    what = f"the column is missing (found: {', '.join(values) or 'none'})"
    fix = "add it or set `column_mapping`"
    text = first_text(values)
    if len(required) == 1 and text is not None:
        fix = (
            f"add it, or set {setting('column_mapping', {**format.column_mapping, missing: text})}"
        )
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
            raise RowProblem(
                "", what, f"correct the mapping; the row has {', '.join(values) or 'no columns'}"
            )
    return value


def _joined_lines(value: Any, name: str) -> str:
    """Text, or the lines of a list of texts."""
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return text_of(value, name)


def _text(fields: Mapping[str, Any], name: str, format: RowFormat) -> str:
    """The text of a column; a list of lines only where the user named the column."""
    value = fields[name]
    if name in format.column_mapping:
        return _joined_lines(value, name)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        theirs = format.mapping.get(name, name)
        join = setting("column_mapping", {**format.column_mapping, name: theirs})
        raise RowProblem(
            name, "expected a string, got list", f"write a string, or join the lines: set {join}"
        )
    return text_of(value, name)


def _optional_text(fields: Mapping[str, Any], name: str, format: RowFormat) -> str:
    return "" if fields.get(name) is None else _text(fields, name, format)


def _conversation(fields: Mapping[str, Any], format: RowFormat) -> list[Message]:
    """The row's messages without its system column; `train` of each is what the data says, or None."""
    if format.name == "instruction":
        return _from_instruction(fields, format)
    if format.name in ("messages", "sharegpt"):
        column = FORMATS[format.name].required[0]
        return read_turns(fields[column], column, format.keys)
    prompt = _side(fields, "prompt", "user", format)
    completion = _side(fields, "completion", "assistant", format)
    for message in prompt:
        # Only the completion is trained, unless the data says so of a turn before it.
        message["train"] = message["train"] or False
    return join_turns(prompt, completion, "completion", format.keys)


def _side(fields: Mapping[str, Any], column: str, role: str, format: RowFormat) -> list[Message]:
    """The messages of a prompt or a completion, which may be text."""
    value = fields[column]
    is_lines = (
        column in format.column_mapping
        and isinstance(value, list)
        and isinstance((value or [0])[0], str)
    )
    if isinstance(value, list | dict) and not is_lines:
        return read_turns(value, column, format.keys)
    return [_message(role, _text(fields, column, format))]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content, "train": None}


def _from_instruction(fields: Mapping[str, Any], format: RowFormat) -> list[Message]:
    messages = _history(fields.get("history"), format)
    instruction = _text(fields, "instruction", format)
    context = _optional_text(fields, "input", format)
    question = _message("user", "\n\n".join(part for part in (instruction, context) if part))
    if instruction:  # Some sets keep the whole prompt in `input`; an empty instruction section would teach nothing.
        question["instruction"] = instruction
        if context:
            question["input"] = context
    return [*messages, question, _message("assistant", _text(fields, "output", format))]


def _history(value: Any, format: RowFormat) -> list[Message]:
    """The turns before the instruction: messages, or pairs of a question and its answer."""
    if value and is_conversation(value):
        return read_turns(value, "history", format.keys)
    messages: list[Message] = []
    for index, pair in enumerate(
        expect(list, value or [], "history", "a list of [question, answer] pairs")
    ):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(place, "not a [question, answer] pair", "write two strings")
        messages.append(_message("user", text_of(pair[0], place)))
        messages.append(_message("assistant", text_of(pair[1], place)))
    return messages


def _with_system(
    messages: list[Message], fields: Mapping[str, Any], format: RowFormat
) -> list[Message]:
    """The messages with the system column as their first turn. Raises RowProblem where they begin with another one."""
    system = _optional_text(fields, "system", format)
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        what = "the column and the conversation's own system turn say different things"
        raise RowProblem(
            "system", what, "keep one of them, or list the columns to read under `columns`"
        )
    return [_message("system", system), *messages]


def _train_flags(messages: Sequence[Message]) -> tuple[bool, ...]:
    """`Example.train` of these messages; empty where the data says nothing that differs from the default."""
    flags: list[bool] = []
    is_default = True
    for message in messages:
        flag = is_trained(message)
        is_default = is_default and flag == (message["role"] == "assistant")
        flags.append(flag)
    return () if is_default else tuple(flags)


def _refuse_empty(messages: Sequence[Message], format: RowFormat) -> None:
    """Raise RowProblem for an empty prompt, and for an empty answer that calls no tool unless it is allowed."""
    for index, message in enumerate(messages):
        if message["content"].strip():
            continue
        if message["role"] == "user":
            raise RowProblem(
                _field_of(index, messages, format),
                "the prompt is empty",
                "write it or remove the row",
            )
        is_answer = message["role"] == "assistant" and not message.get("tool_calls")
        if is_answer and not format.allow_empty_output:
            fix = "write it, remove the row, or set `allow_empty_output: true`"
            raise RowProblem(_field_of(index, messages, format), "the answer is empty", fix)


def _field_of(index: int, messages: Sequence[Message], format: RowFormat) -> str:
    """Where a message stands in the row: in a column of its own where the format has one for each side."""
    columns = FORMATS[format.name].required
    from_end = len(messages) - index
    if len(columns) == 2 and from_end <= 2:
        return columns[-from_end]
    return f"messages[{index}].content"
