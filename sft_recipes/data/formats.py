"""Row formats: how a row of each kind becomes an `Example`.

    instruction         instruction, output, and where present input, system, history ([question, answer] pairs)
    messages            messages of {role, content}, OpenAI style, with tool_calls, reasoning_content, train, weight
    sharegpt            conversations of {from, value}, with function_call and observation turns; system, tools
    prompt_completion   prompt and completion, both text or both messages; only the completion is trained
    raw                 text as it stands; never assumed, always asked for

Types are checked, never converted; text is never edited. Tool definitions and calls are brought into the one shape
that chat templates and servers share.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.json_reader import RowProblem, parse_json, type_name
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import ROLE_ALIASES, Example, Message, find_message_problem

# The columns that a row of each format must have, then those it may have.
_COLUMNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "output"), ("input", "system", "history", "tools")),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "raw": (("text",), ()),
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Columns that other tools obey; a row that brings one unasked would change labels or template behind our back.
_REFUSED = frozenset({"labels", "input_ids", "attention_mask", "chat_template", "chat_template_kwargs"})
_CALL = "an object with name and arguments"


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one source are read.

    `column_mapping` is {our name: their name}; their name may lead into nested values, as in `instances.0.input`.
    `extra` are further columns to keep on the examples (under our name) of the rows that have them.
    """

    name: str
    column_mapping: Mapping[str, str]
    extra: Sequence[str] = ()
    allow_empty_output: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row, under our names."""
        return (*_COLUMNS[self.name][0], *_COLUMNS[self.name][1], *self.extra)

    def used_columns(self) -> set[str]:
        """The columns that are read, under the names they have in the rows; others are ignored."""
        names = {self.column_mapping.get(name, name) for name in self.columns}
        return names | {name.partition(".")[0] for name in names}

    def check(self, where: str) -> None:
        """Raise InputError for a format or a mapped name that does not exist."""
        if self.name not in _COLUMNS:
            raise InputError(Problem(where, "format", f"unknown format {self.name!r}", suggest(self.name, _COLUMNS)))
        for name in self.column_mapping:
            if name not in self.columns:
                fix = f"map one of {', '.join(self.columns)}; write it as {{our name: name in the file}}"
                raise InputError(Problem(where, "column_mapping", f"{name!r} is no column of format {self.name}", fix))


def detect_format(columns: Iterable[str], column_mapping: Mapping[str, str], where: str) -> str:
    """The format that rows with these columns have. Raises InputError where none or several fit; never says raw."""
    names = _our_names(columns, column_mapping)
    matching = [name for name, (required, _) in _COLUMNS.items() if name != "raw" and names.issuperset(required)]
    if len(matching) != 1:
        known = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in _COLUMNS.items())
        what = f"the columns ({', '.join(columns)}) fit {' and '.join(matching) or 'no format'}; known are {known}"
        mapping = "name the columns, as in `column_mapping: {instruction: question, output: answers.0.text}`"
        raise InputError(Problem(where, "format", what, f"{mapping}, or set `format` (raw is never assumed)"))
    return matching[0]


def convert_row(values: Mapping[str, Any], format: RowFormat, source: str, row: int, line: int | None) -> Example:
    """Convert one row. Raises RowProblem for any row that is not what its format says."""
    fields = _fields(values, format)
    columns = {name: fields[name] for name in format.extra if name in fields}
    if format.name == "raw":
        text = _text(fields["text"], "text")
        if not text.strip():
            raise RowProblem("text", "empty", "write the text or remove the row")
        return Example([], source, row, line, text=text, columns=columns)
    tools, messages = _tools(fields.get("tools")), _conversation(fields, format.name)
    train = tuple(message.pop("train", True) for message in messages)
    if problem := find_message_problem(messages):
        raise RowProblem(*problem)
    _refuse_empty(messages, format)
    return Example(messages, source, row, line, tools, () if all(train) else train, columns=columns)


def _our_names(columns: Iterable[str], column_mapping: Mapping[str, str]) -> set[str]:
    """The columns under our names; a column mapped to another name is no longer there under its own."""
    roots = {their_name.partition(".")[0] for their_name in column_mapping.values()}
    return (set(columns) - roots - set(column_mapping.values())) | set(column_mapping)


def _fields(values: Mapping[str, Any], format: RowFormat) -> dict[str, Any]:
    """The row's values under our names."""
    mapping, required = format.column_mapping, _COLUMNS[format.name][0]
    if refused := _REFUSED.intersection(values).difference(format.extra, mapping.values()):
        what = "this column is refused because labels and templates are made here, not taken from rows"
        raise RowProblem(min(refused), what, "remove the column, or list the columns to read under `columns`")
    names = _our_names(values, mapping)
    if missing := [name for name in required if name not in names]:
        for other, (columns, _) in _COLUMNS.items():
            if names.issuperset(columns):
                what = f"this row looks like {other} ({', '.join(columns)}), the file is {format.name}"
                raise RowProblem("", f"{what} ({', '.join(required)})", "keep one format per file")
        what = f"the column is missing (found: {', '.join(values) or 'none'})"
        raise RowProblem(missing[0], what, "add it or set `column_mapping`")
    return {name: _look_up(values, mapping.get(name, name)) for name in format.columns if name in names}


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
            raise RowProblem("", what, f"correct the mapping; the row has {', '.join(values) or 'no columns'}")
    return value


def _expect(kind: type, value: Any, field: str, what: str) -> Any:
    """The value, which must be of this type; `what` is how messages call what belongs there."""
    if not isinstance(value, kind):
        raise RowProblem(field, f"expected {what}, got {type_name(value)}", f"write {what}")
    return value


def _text(value: Any, field: str) -> str:
    return _expect(str, value, field, "a string")


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    return "" if fields.get(name) is None else _text(fields[name], name)


def _json_text(value: Any, field: str) -> Any:
    """A value that formats may spell as JSON inside a string."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except RowProblem as error:
        raise RowProblem(field, f"{error.what} in the JSON text", "write valid JSON, or the object itself") from error


def _conversation(fields: Mapping[str, Any], format: str) -> list[Message]:
    """The row's messages; `train: False` marks those that must not be trained."""
    system = _optional_text(fields, "system")
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    if format == "instruction":
        return start + _from_instruction(fields)
    if format == "messages":
        return _turns(fields["messages"], "messages")
    if format == "sharegpt":
        return start + _turns(fields["conversations"], "conversations", "from", "value")
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list):
        return _exchange(_text(prompt, "prompt"), _text(completion, "completion"))
    return [turn | {"train": False} for turn in _turns(prompt, "prompt")] + _turns(completion, "completion")


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
    instruction, context = _text(fields["instruction"], "instruction"), _optional_text(fields, "input")
    prompt = "\n\n".join(part for part in (instruction, context) if part)
    question, answer = _exchange(prompt, _text(fields["output"], "output"))
    if instruction:  # Some sets keep the whole prompt in `input`; an empty instruction section would teach nothing.
        question |= {"instruction": instruction} | ({"input": context} if context else {})
    return [*messages, question, answer]


def _turns(turns: Any, column: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """Messages with our roles and fields; a function_call turn joins the assistant turn right before it."""
    messages: list[Message] = []
    for index, turn in enumerate(_expect(list, turns, column, "a list of messages")):
        field = f"{column}[{index}]"
        if role_key not in _expect(dict, turn, field, f"an object with {role_key} and {content_key}"):
            raise RowProblem(field, f"no {role_key!r} (found: {', '.join(turn)})", "write who speaks in every turn")
        role = _text(turn[role_key], f"{field}.{role_key}")
        is_call = role == "function_call"
        if is_call:
            calls = _json_text(_text(turn.get(content_key), field), field)
            turn = turn | {content_key: "", "tool_calls": calls or {}}  # no call at all is reported as one without name
        message = _message(turn, ROLE_ALIASES.get(role, role), field, content_key)
        if is_call and messages and messages[-1]["role"] == "assistant":
            before = messages[-1]
            before["content"] = "" if before["content"] is None else before["content"]
            before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
            before["train"] = before["train"] and message["train"]
        else:
            messages.append(message)
    return messages


def _message(turn: Mapping[str, Any], role: str, field: str, content_key: str) -> Message:
    """The message of a turn; keys that no template knows are left behind."""
    content = turn.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, f"{field}.{content_key}[{index}]") for index, part in enumerate(content))
    message: Message = {"role": role, "content": content, "train": _may_train(turn, field)}
    for key in ("name", "tool_call_id", *_REASONING):
        if turn.get(key) is not None:
            message.setdefault("reasoning_content" if key in _REASONING else key, _text(turn[key], f"{field}.{key}"))
    if (calls := turn.get("tool_calls", turn.get("function_call"))) not in (None, [], ""):
        if role != "assistant":
            raise RowProblem(f"{field}.tool_calls", f"a {role} turn cannot call tools", "remove the calls")
        message["tool_calls"] = _tool_calls(calls, f"{field}.tool_calls")
        message["content"] = "" if content is None else content  # templates that print the content would print "None"
    return message


def _may_train(turn: Mapping[str, Any], field: str) -> bool:
    """`train: false` (ours) or `weight: 0` (OpenAI's) keep a turn from being trained."""
    train, weight = turn.get("train"), turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowProblem(f"{field}.weight", f"expected 0 or 1, got {weight!r}", "write 0 to leave the turn untrained")
    return weight != 0 and (train is None or _expect(bool, train, f"{field}.train", "true or false"))


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
        at = f"{field}[{index}]"
        function = _expect(dict, _expect(dict, item, at, _CALL).get("function", item), at, _CALL)
        given = {} if function.get("arguments") is None else _json_text(function["arguments"], f"{at}.arguments")
        arguments = _expect(dict, given, f"{at}.arguments", "an object with named values")
        function = {"name": _text(function.get("name"), f"{at}.name"), "arguments": arguments}
        identity = {} if item.get("id") is None else {"id": _text(item["id"], f"{at}.id")}
        calls.append({"type": "function", **identity, "function": function})
    return calls


def _tools(value: Any) -> list[Mapping[str, Any]] | None:
    """Tool definitions as {type: function, function: {...}}, the shape in which servers hand them to templates."""
    if not value or (isinstance(value, str) and value.isspace()):
        return None
    tools = _expect(list, _json_text(value, "tools"), "tools", "a list of tool definitions")
    for index, tool in enumerate(tools):
        _expect(dict, tool, f"tools[{index}]", "an object with name, description and parameters")
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    ] or None


def _refuse_empty(messages: Sequence[Message], format: RowFormat) -> None:
    last, columns = len(messages) - 1, _COLUMNS[format.name][0]
    for index, message in enumerate(messages):
        if message["content"].strip():
            continue
        field = columns[index - last - 1] if len(columns) == 2 and index >= last - 1 else f"messages[{index}].content"
        if message["role"] == "user":
            raise RowProblem(field, "the prompt is empty", "write it or remove the row")
        if index == last and not message.get("tool_calls") and not format.allow_empty_output:
            fix = "write it, remove the row, or set `allow_empty_output: true`"
            raise RowProblem(field, "the answer is empty", fix)
