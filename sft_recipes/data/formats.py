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

from collections.abc import Iterable, Mapping, Sequence, Set
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
# The column that holds turns, and the keys of a turn that say who speaks and what.
_TURN_KEYS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Columns that other tools obey; a row that brings one unasked would change labels or template behind our back.
_REFUSED = frozenset({"labels", "input_ids", "attention_mask", "chat_template", "chat_template_kwargs"})
_CALL = "an object with name and arguments"

# Messages and, aligned with them, whether each may be trained; no flags at all if every one may.
_Turns = tuple[list[Message], list[bool]]


class RowProblem(Exception):
    """A row that cannot become an example."""

    def __init__(self, field: str, what: str, fix: str, where: str = "") -> None:
        self.problem = Problem(where, field, what, fix)
        super().__init__(str(self.problem))


def detect_format(columns: Iterable[str], column_mapping: Mapping[str, str] | None = None, where: str = "") -> str:
    """The format that rows with these columns have. Raises InputError where none or several fit; never says raw."""
    found = list(columns)
    names = _our_names(found, column_mapping or {})
    matching = [name for name, (required, _) in _COLUMNS.items() if name != "raw" and names.issuperset(required)]
    if len(matching) == 1:
        return matching[0]
    shown = ", ".join(found) or "none"
    if matching:
        what = f"the columns ({shown}) fit several formats: {', '.join(matching)}"
        raise InputError(Problem(where, "format", what, f"set `format: {matching[0]}` or another of them"))
    known = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in _COLUMNS.items())
    fix = "name the columns, as in `column_mapping: {instruction: question, output: answers.0.text}`"
    if "text" in names:
        fix += ", or set `format: raw` to train on the whole text (never assumed)"
    raise InputError(Problem(where, "format", f"no known format has the columns {shown}; known are {known}", fix))


def check_mapping(format: str, column_mapping: Mapping[str, str], columns: Sequence[str], where: str) -> None:
    """Raise InputError for a format or a mapped name that does not exist."""
    if format not in _COLUMNS:
        raise InputError(Problem(where, "format", f"unknown format {format!r}", f"use one of {', '.join(_COLUMNS)}"))
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
    names |= {name.partition(".")[0] for name in names}
    return [name for name in values if name not in names]


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
        fields = _fields(values, format, column_mapping, columns)
        tools = _tools(fields.get("tools"))
        messages, train = _conversation(fields, format)
        text = _text(fields["text"], "text") if format == "raw" else None
        if text is None:
            _check_messages(messages, format, allow_empty_output)
        elif not text or text.isspace():
            raise RowProblem("text", "empty", "write the text or remove the row")
    except RowProblem as error:
        bad, where = error.problem, f"{source}:{line}" if line is not None else f"{source} row {row}"
        raise RowProblem(bad.field, bad.what, bad.fix, where) from None
    extra = {name: fields[name] for name in columns if name in fields}
    return Example(messages, source, row, line, tools, () if all(train) else tuple(train), text, extra)


def _our_names(columns: Iterable[str], column_mapping: Mapping[str, str]) -> set[str]:
    """The columns under our names; a column mapped to another name is no longer there under its own."""
    roots = {their_name.partition(".")[0] for their_name in column_mapping.values()}
    return (set(columns) - roots - set(column_mapping.values())) | set(column_mapping)


def _fields(
    values: Mapping[str, Any], format: str, column_mapping: Mapping[str, str], columns: Sequence[str]
) -> dict[str, Any]:
    """The row's values under our names."""
    if refused := _REFUSED.intersection(values).difference(columns, column_mapping.values()):
        what = "this column is refused because labels and templates are made here, not taken from rows"
        raise RowProblem(min(refused), what, "remove the column, or list the columns to read under `columns`")
    required, optional = _COLUMNS[format]
    names = _our_names(values, column_mapping) if column_mapping else values.keys()
    for name in required:
        if name not in names:
            raise _missing_column(values, format, names, name)
    wanted = (*required, *optional, *columns)
    return {name: _look_up(values, column_mapping.get(name, name)) for name in wanted if name in names}


def _missing_column(values: Mapping[str, Any], format: str, names: Set[str], name: str) -> RowProblem:
    """A row of another format in the file, or one that just lacks a column."""
    for other, (required, _) in _COLUMNS.items():
        if names >= set(required):
            what = f"this row looks like {other} ({', '.join(required)}), the file is {format}"
            return RowProblem("", f"{what} ({', '.join(_COLUMNS[format][0])})", "keep one format per file")
    what = f"the column is missing (found: {', '.join(values) or 'none'})"
    return RowProblem(name, what, "add it or set `column_mapping`")


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
            raise RowProblem("", what, f"correct the mapping; the row has {', '.join(values) or 'no columns'}")
    return value


def _expect(kind: type, value: Any, field: str, what: str, fix: str = "") -> Any:
    """The value, which must be of this type; `what` is how messages call what belongs there."""
    if not isinstance(value, kind):
        raise RowProblem(field, f"expected {what}, got {type_name(value)}", fix or f"write {what}")
    return value


def _text(value: Any, field: str) -> str:
    return _expect(str, value, field, "a string", "write the text as one string")


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    return "" if fields.get(name) is None else _text(fields[name], name)


def _json_text(value: Any, field: str) -> Any:
    """A value that formats may spell as JSON inside a string."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except JSONTextError as error:
        raise RowProblem(field, f"{error.what} in the JSON text", "write valid JSON, or the object itself") from error


def _conversation(fields: Mapping[str, Any], format: str) -> _Turns:
    if format == "raw":
        return [], []
    if format == "instruction":
        return _system(fields) + _from_instruction(fields), []
    if format in _TURN_KEYS:
        system = _system(fields) if format == "sharegpt" else []
        turns, train = _turns(fields[_TURN_KEYS[format][0]], _TURN_KEYS[format][0], format)
        return system + turns, [True] * len(system) + train
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list):
        return _exchange(_text(prompt, "prompt"), _text(completion, "completion")), []
    turns, _ = _turns(prompt, "prompt", "messages")
    answers, train = _turns(completion, "completion", "messages")
    return turns + answers, [False] * len(turns) + train


def _system(fields: Mapping[str, Any]) -> list[Message]:
    system = _optional_text(fields, "system")
    return [{"role": "system", "content": system}] if system else []


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_instruction(fields: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = _expect(list, fields.get("history") or [], "history", "a list of [question, answer] pairs")
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(field, "not a [question, answer] pair", "write two strings")
        messages += _exchange(_text(pair[0], field), _text(pair[1], field))
    instruction = _text(fields["instruction"], "instruction")
    context = _optional_text(fields, "input")
    prompt = "\n\n".join(part for part in (instruction, context) if part)
    question, answer = _exchange(prompt, _text(fields["output"], "output"))
    if instruction:  # Some sets keep the whole prompt in `input`; an empty instruction section would teach nothing.
        question["instruction"] = instruction
        if context:
            question["input"] = context
    return [*messages, question, answer]


def _turns(turns: Any, column: str, format: str) -> _Turns:
    """Messages with our roles and fields; a function_call turn joins the assistant turn right before it."""
    _, role_key, content_key = _TURN_KEYS[format]
    messages: list[Message] = []
    train: list[bool] = []
    for index, turn in enumerate(_expect(list, turns, column, "a list of messages")):
        field = f"{column}[{index}]"
        if role_key not in _expect(dict, turn, field, f"an object with {role_key} and {content_key}"):
            raise _no_role(turn, column, field, role_key)
        name = _text(turn[role_key], f"{field}.{role_key}")
        may_train = _may_train(turn, field)
        if name == "function_call":
            calls = _tool_calls(_text(turn.get(content_key), field), field)
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).extend(calls)
                train[-1] = train[-1] and may_train
                continue
            message: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        else:
            message = _message(turn, ROLE_ALIASES.get(name, name), field, content_key)
        messages.append(message)
        train.append(may_train)
    return messages, train


def _no_role(turn: Mapping[str, Any], column: str, field: str, role_key: str) -> RowProblem:
    """A turn of another format, or one that does not say who speaks."""
    fix = "write who speaks in every turn"
    for format, (name, other_key, _) in _TURN_KEYS.items():
        if other_key in turn:
            fix = f"set `format: {format}` and `column_mapping: {{{name}: {column}}}`"
    return RowProblem(field, f"no {role_key!r} (found: {', '.join(turn)})", fix)


def _may_train(turn: Mapping[str, Any], field: str) -> bool:
    """`train: false` (ours) or `weight: 0` (OpenAI's) keep a turn from being trained."""
    train, weight = turn.get("train"), turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowProblem(f"{field}.weight", f"expected 0 or 1, got {weight!r}", "write 0 to leave the turn untrained")
    return weight != 0 and (train is None or _expect(bool, train, f"{field}.train", "true or false"))


def _message(turn: Mapping[str, Any], role: str, field: str, content_key: str) -> Message:
    """The message of a turn; keys that no template knows are left behind."""
    content = turn.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, f"{field}.{content_key}[{index}]") for index, part in enumerate(content))
    message: Message = {"role": role, "content": content}
    for key in ("name", "tool_call_id", *_REASONING):
        if turn.get(key) is not None:
            message.setdefault("reasoning_content" if key in _REASONING else key, _text(turn[key], f"{field}.{key}"))
    if turn.get("function_call") is not None:
        raise RowProblem(f"{field}.function_call", "the old form of a tool call", "write `tool_calls`")
    if turn.get("tool_calls"):
        if role != "assistant":
            raise RowProblem(f"{field}.tool_calls", f"a {role} turn cannot call tools", "remove the calls")
        message["tool_calls"] = _tool_calls(turn["tool_calls"], f"{field}.tool_calls")
        message["content"] = "" if content is None else content  # templates that print the content would print "None"
    return message


def _part(part: Any, field: str) -> str:
    kind = _expect(dict, part, field, "an object with type and text").get("type")
    if kind != "text":
        what = f"a part of type {kind!r}; images are not supported, nor is anything else but text"
        raise RowProblem(field, what, "keep only text parts")
    return _text(part.get("text"), f"{field}.text")


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls, nested as OpenAI's or flat, one or a list, as {type: function, id?, function: {name, arguments}}."""
    value = _json_text(value, field)
    calls = []
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        at = f"{field}[{index}]" if isinstance(value, list) else field
        function = _expect(dict, _expect(dict, item, at, _CALL).get("function", item), at, _CALL)
        arguments = _json_text(function.get("arguments"), f"{at}.arguments")
        if arguments is not None:
            _expect(dict, arguments, f"{at}.arguments", "an object with named values")
        name = _text(function.get("name"), f"{at}.name")
        call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
        if item.get("id") is not None:
            call["id"] = _text(item["id"], f"{at}.id")
        calls.append(call)
    return calls


def _tools(value: Any) -> list[Mapping[str, Any]] | None:
    """Tool definitions as {type: function, function: {...}}, the shape in which servers hand them to templates."""
    if not value or (isinstance(value, str) and value.isspace()):
        return None
    tools = []
    for index, tool in enumerate(_expect(list, _json_text(value, "tools"), "tools", "a list of tool definitions")):
        _expect(dict, tool, f"tools[{index}]", "an object with name, description and parameters")
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return tools or None


def _check_messages(messages: Sequence[Message], format: str, allow_empty_output: bool) -> None:
    if problem := find_message_problem(messages):
        raise RowProblem(*problem)
    last, columns = len(messages) - 1, _COLUMNS[format][0]
    for index, message in enumerate(messages):
        content = message["content"]
        if content and not content.isspace():
            continue
        field = columns[index - last - 1] if len(columns) == 2 and index >= last - 1 else f"messages[{index}].content"
        if message["role"] == "user":
            raise RowProblem(field, "the prompt is empty", "write it or remove the row")
        if index == last and not message.get("tool_calls") and not allow_empty_output:
            raise RowProblem(
                field, "the answer is empty", "write it, remove the row, or set `allow_empty_output: true`"
            )
