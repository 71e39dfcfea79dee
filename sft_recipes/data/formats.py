"""Row formats: how a row of each kind becomes an `Example`.

    instruction         instruction, output, and where present input, system, history ([question, answer] pairs)
    messages            messages of {role, content}, OpenAI style, with tool_calls, reasoning_content, train, weight
    sharegpt            conversations of {from, value}, with function_call and observation turns; system, tools
    prompt_completion   prompt and completion, both text or both messages; only the completion is trained
    raw                 text as it stands; never assumed, always asked for

Types are checked, never converted; text is never edited. Tool definitions and calls are brought into the one shape
that chat templates and servers share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sft_recipes.data.json_reader import JSONTextError, parse_json, type_name
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import ROLE_ALIASES, Example, Message, find_message_problem

# Columns of each format: those a row must have, then those it may have.
_COLUMNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "output"), ("input", "system", "history", "tools")),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "raw": (("text",), ()),
}
FORMATS = tuple(_COLUMNS)

# Columns that other tools obey; a row that brings one unasked would change labels or template behind our back.
REFUSED_COLUMNS = frozenset({"labels", "input_ids", "attention_mask", "chat_template", "chat_template_kwargs"})

_REASONING = ("reasoning_content", "thinking", "reasoning")

# A converter returns messages and, aligned with them, whether each may be trained.
_Turns = tuple[list[Message], list[bool]]


class RowProblem(Exception):
    """A row that cannot become an example."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def place(source: str, row: int, line: int | None) -> str:
    """`FILE:LINE` where the line is known, else `SOURCE row N`."""
    return f"{source}:{line}" if line is not None else f"{source} row {row}"


def detect_format(columns: Iterable[str], column_mapping: Mapping[str, str] | None = None, where: str = "") -> str:
    """The format that rows with these columns have. Raises InputError where none or several fit; never says raw."""
    found = list(columns)
    names = _our_names(found, column_mapping or {})
    matching = [name for name, (required, _) in _COLUMNS.items() if name != "raw" and names.issuperset(required)]
    if len(matching) == 1:
        return matching[0]
    columns_text = ", ".join(found) or "none"
    if matching:
        what = f"the columns ({columns_text}) fit several formats: {', '.join(matching)}"
        raise InputError(Problem(where, "format", what, f"set `format: {matching[0]}` or another of them"))
    known = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in _COLUMNS.items())
    fix = "name the columns, as in `column_mapping: {instruction: question, output: answers.0.text}`"
    if "text" in names:
        fix += ", or set `format: raw` to train on the whole text (never assumed)"
    what = f"no known format has the columns {columns_text}; known are {known}"
    raise InputError(Problem(where, "format", what, fix))


def check_mapping(format: str, column_mapping: Mapping[str, str], columns: Sequence[str], where: str) -> None:
    """Raise InputError for a format or a mapped name that does not exist."""
    if format not in _COLUMNS:
        raise InputError(Problem(where, "format", f"unknown format {format!r}", f"use one of {', '.join(FORMATS)}"))
    required, optional = _COLUMNS[format]
    for name in column_mapping:
        if name not in (*required, *optional, *columns):
            fix = f"map one of {', '.join((*required, *optional))}; write it as {{our name: name in the file}}"
            raise InputError(Problem(where, "column_mapping", f"{name!r} is no column of format {format}", fix))


def unused_columns(
    values: Mapping[str, Any], format: str, column_mapping: Mapping[str, str], columns: Sequence[str] = ()
) -> list[str]:
    """The columns of a row that nobody asked for and that are therefore ignored, in the row's order."""
    required, optional = _COLUMNS[format]
    names = {column_mapping.get(name, name) for name in (*required, *optional, *columns)}
    used = names | {name.partition(".")[0] for name in names}
    return [name for name in values if name not in used]


def convert_row(
    values: Mapping[str, Any],
    *,
    format: str,
    column_mapping: Mapping[str, str],
    source: str,
    row: int,
    line: int | None,
    allow_empty_output: bool = False,
    columns: Sequence[str] = (),
) -> Example:
    """Convert one row. Raises RowProblem, with `FILE:LINE`, for any row that is not what its format says.

    `column_mapping` is {our name: their name}; their name may lead into nested values, as in `instances.0.input`.
    `columns` are further columns to keep on the example (under our name) where the row has them.
    """
    try:
        _refuse_columns(values, column_mapping, columns)
        fields = _select(values, format, column_mapping)
        tools = _tools(fields.get("tools"))
        messages: list[Message] = []
        train: list[bool] = []
        text = None
        if format == "raw":
            text = _text(fields["text"], "text")
            if not text or text.isspace():
                raise _bad("text", "empty", "write the text or remove the row")
        else:
            messages, train = _CONVERTERS[format](fields)
            _check_messages(messages, format, allow_empty_output)
        extra = {
            name: _look_up(values, column_mapping.get(name, name))
            for name in columns
            if name in column_mapping or name in values
        }
    except RowProblem as error:
        where = f"{source}:{line}" if line is not None else f"{source} row {row}"
        raise RowProblem(dataclasses.replace(error.problem, where=where)) from None
    return Example(
        messages=messages,
        source=source,
        row=row,
        line=line,
        tools=tools,
        train=() if all(train) else tuple(train),
        text=text,
        columns=extra,
    )


def _bad(field: str, what: str, fix: str) -> RowProblem:
    return RowProblem(Problem("", field, what, fix))


def _our_names(columns: Iterable[str], column_mapping: Mapping[str, str]) -> set[str]:
    """The columns under our names; a column mapped to another name is no longer there under its own."""
    roots = {their_name.partition(".")[0] for their_name in column_mapping.values()}
    return (set(columns) - roots - set(column_mapping.values())) | set(column_mapping)


def _refuse_columns(values: Mapping[str, Any], column_mapping: Mapping[str, str], columns: Sequence[str]) -> None:
    if REFUSED_COLUMNS.isdisjoint(values):
        return
    for name in values:
        if name in REFUSED_COLUMNS and name not in columns and name not in column_mapping.values():
            what = "this column is refused because labels and templates are made here, not taken from rows"
            raise _bad(name, what, "remove the column, or list the columns to read under `columns`")


def _select(values: Mapping[str, Any], format: str, column_mapping: Mapping[str, str]) -> Mapping[str, Any]:
    """The row's values under our names."""
    required, optional = _COLUMNS[format]
    if not column_mapping:
        for name in required:
            if name not in values:
                raise _missing_column(values, format, column_mapping, name)
        return values
    fields = {}
    available = _our_names(values, column_mapping)
    for name in (*required, *optional):
        if name in available:
            fields[name] = _look_up(values, column_mapping.get(name, name))
        elif name in required:
            raise _missing_column(values, format, column_mapping, name)
    return fields


def _look_up(values: Mapping[str, Any], path: str) -> Any:
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
            raise _bad("", what, f"correct the mapping; the row has {', '.join(values) or 'no columns'}")
    return value


def _missing_column(values: Mapping[str, Any], format: str, column_mapping: Mapping[str, str], name: str) -> RowProblem:
    """A row of another format in the file, or one that just lacks a column."""
    names = _our_names(values, column_mapping)
    for other, (required, _) in _COLUMNS.items():
        if other != format and names.issuperset(required):
            expected = ", ".join(_COLUMNS[format][0])
            what = f"this row looks like {other} ({', '.join(required)}), the file is {format} ({expected})"
            return _bad("", what, "keep one format per file")
    return _bad(name, f"the column is missing (found: {', '.join(values) or 'none'})", "add it or set `column_mapping`")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _bad(field, f"expected a string, got {type_name(value)}", "write the text as one string")
    return value


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "" if value is None else _text(value, name)


def _list(value: Any, field: str, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(field, f"expected a list of {of}, got {type_name(value)}", f"write a list of {of}")
    return value


def _object(value: Any, field: str, of: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(field, f"expected an object with {of}, got {type_name(value)}", f"write an object with {of}")
    return value


def _json_text(value: Any, field: str) -> Any:
    """A value that formats may spell as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except JSONTextError as error:
        raise _bad(field, f"{error.what} in the JSON text", "write valid JSON, or the object itself") from error


def _from_instruction(fields: Mapping[str, Any]) -> _Turns:
    messages: list[Message] = []
    if system := _optional_text(fields, "system"):
        messages.append({"role": "system", "content": system})
    history = fields.get("history")
    for index, pair in enumerate(_list([] if history is None else history, "history", "[question, answer] pairs")):
        field = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _bad(field, "not a [question, answer] pair", "write two strings")
        messages.append({"role": "user", "content": _text(pair[0], field)})
        messages.append({"role": "assistant", "content": _text(pair[1], field)})
    instruction, context = _text(fields["instruction"], "instruction"), _optional_text(fields, "input")
    if not instruction:
        # Some sets keep the whole prompt in `input`; an empty instruction section would teach nothing.
        messages.append({"role": "user", "content": context})
    elif context:
        content = f"{instruction}\n\n{context}"
        messages.append({"role": "user", "content": content, "instruction": instruction, "input": context})
    else:
        messages.append({"role": "user", "content": instruction, "instruction": instruction})
    messages.append({"role": "assistant", "content": _text(fields["output"], "output")})
    return messages, []


def _from_messages(fields: Mapping[str, Any]) -> _Turns:
    return _turns(fields["messages"], "messages", "role", "content")


def _from_sharegpt(fields: Mapping[str, Any]) -> _Turns:
    messages, train = _turns(fields["conversations"], "conversations", "from", "value")
    if system := _optional_text(fields, "system"):
        messages.insert(0, {"role": "system", "content": system})
        train.insert(0, True)
    return messages, train


def _from_prompt_completion(fields: Mapping[str, Any]) -> _Turns:
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list):
        user = {"role": "user", "content": _text(prompt, "prompt")}
        return [user, {"role": "assistant", "content": _text(completion, "completion")}], []
    messages, _ = _turns(prompt, "prompt", "role", "content")
    answers, train = _turns(completion, "completion", "role", "content")
    return messages + answers, [False] * len(messages) + train


_CONVERTERS: Mapping[str, Callable[[Mapping[str, Any]], _Turns]] = {
    "instruction": _from_instruction,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
}


def _turns(turns: Any, column: str, role_key: str, content_key: str) -> _Turns:
    """Messages with our roles and fields; a function_call turn joins the assistant turn right before it."""
    messages: list[Message] = []
    train: list[bool] = []
    for index, turn in enumerate(_list(turns, column, "messages")):
        field = f"{column}[{index}]"
        turn = _object(turn, field, f"{role_key} and {content_key}")
        if role_key not in turn:
            raise _bad(field, f"no {role_key!r} (found: {', '.join(turn)})", _other_keys(turn, column))
        name = _text(turn[role_key], f"{field}.{role_key}")
        may_train = _may_train(turn, field)
        message: Message = {"role": ROLE_ALIASES.get(name, name)}
        if name == "function_call":
            message["tool_calls"] = _tool_calls(_text(turn.get(content_key), field), field)
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
                train[-1] = train[-1] and may_train
                continue
            message["content"] = ""
        else:
            _fill(message, turn, field, content_key)
        messages.append(message)
        train.append(may_train)
    return messages, train


def _fill(message: Message, turn: Mapping[str, Any], field: str, content_key: str) -> None:
    """Put content, reasoning and tool calls of a turn into its message; other keys are left behind."""
    content = turn.get(content_key)
    message["content"] = _joined_parts(content, f"{field}.{content_key}") if isinstance(content, list) else content
    if content is None and turn.get("tool_calls"):
        message["content"] = ""  # templates that print the content would print "None"
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = _text(turn[key], f"{field}.{key}")
    reasoning = next((key for key in _REASONING if turn.get(key) is not None), None)
    if reasoning:
        message["reasoning_content"] = _text(turn[reasoning], f"{field}.{reasoning}")
    if turn.get("function_call") is not None:
        raise _bad(f"{field}.function_call", "the old form of a tool call", "write `tool_calls`")
    if turn.get("tool_calls"):
        if message["role"] != "assistant":
            raise _bad(f"{field}.tool_calls", f"a {message['role']} turn cannot call tools", "remove the calls")
        message["tool_calls"] = _tool_calls(turn["tool_calls"], f"{field}.tool_calls")


def _other_keys(turn: Mapping[str, Any], column: str) -> str:
    if "role" in turn:
        return f"set `format: messages` and `column_mapping: {{messages: {column}}}`"
    if "from" in turn:
        return f"set `format: sharegpt` and `column_mapping: {{conversations: {column}}}`"
    return "write who speaks in every turn"


def _joined_parts(parts: Sequence[Any], field: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        part = _object(part, f"{field}[{index}]", "type and text")
        if part.get("type") != "text":
            what = f"a part of type {part.get('type')!r}; images are not supported, nor is anything else but text"
            raise _bad(f"{field}[{index}]", what, "keep only text parts")
        texts.append(_text(part.get("text"), f"{field}[{index}].text"))
    return "".join(texts)


def _may_train(turn: Mapping[str, Any], field: str) -> bool:
    """`train: false` (ours) or `weight: 0` (OpenAI's) keep a turn from being trained."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise _bad(f"{field}.train", f"expected true or false, got {type_name(train)}", "write true or false")
    if weight is not None and weight not in (0, 1):
        raise _bad(f"{field}.weight", f"expected 0 or 1, got {weight!r}", "write 0 to leave the turn untrained")
    return train is not False and weight != 0


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    value = _json_text(value, field)
    calls = []
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        place = f"{field}[{index}]" if isinstance(value, list) else field
        item = _object(item, place, "name and arguments")
        function = _object(item.get("function", item), place, "name and arguments")
        arguments = _json_text(function.get("arguments"), f"{place}.arguments")
        function = {
            "name": _text(function.get("name"), f"{place}.name"),
            "arguments": {} if arguments is None else dict(_object(arguments, f"{place}.arguments", "named values")),
        }
        call: dict[str, Any] = {"type": "function", "function": function}
        if item.get("id") is not None:
            call["id"] = _text(item["id"], f"{place}.id")
        calls.append(call)
    return calls


def _tools(value: Any) -> list[Mapping[str, Any]] | None:
    """Tool definitions as {type: function, function: {...}}, the shape in which servers hand them to templates."""
    if not value or (isinstance(value, str) and value.isspace()):
        return None
    tools = []
    for index, item in enumerate(_list(_json_text(value, "tools"), "tools", "tool definitions")):
        tool = _object(item, f"tools[{index}]", "name, description and parameters")
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return tools or None


def _check_messages(messages: Sequence[Message], format: str, allow_empty_output: bool) -> None:
    problem = find_message_problem(messages)
    if problem:
        raise _bad(*problem)
    last = len(messages) - 1
    for index, message in enumerate(messages):
        content = message["content"]
        if content and not content.isspace():
            continue
        columns = _COLUMNS[format][0]
        field = columns[index - last - 1] if len(columns) == 2 and index >= last - 1 else f"messages[{index}].content"
        if message["role"] == "user":
            raise _bad(field, "the prompt is empty", "write it or remove the row")
        if index == last and not message.get("tool_calls") and not allow_empty_output:
            raise _bad(field, "the answer is empty", "write it, remove the row, or set `allow_empty_output: true`")
