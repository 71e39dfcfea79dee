"""A conversation as a chat template needs it: reasoning and calls in the form that it reads.

Templates differ in whether they have a place for reasoning, in whether arguments of a call are an
object or its JSON text, and in the ids of calls that they accept. What a template needs is found
once by rendering probes; then every conversation is brought into that form, so that the same data
trains under every template that has a place for it.
"""

import base64
import hashlib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sft_recipes.data.turns import TEMPLATE_ERRORS, Tools
from sft_recipes.messages import Message

# Renders messages and tools.
RenderWithTools = Callable[[Sequence[Message], Tools], str]

_WORD = {
    "type": "object",
    "properties": {"word": {"type": "string", "description": "A word."}},
    "required": ["word"],
}
LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks a word up.", "parameters": _WORD},
}
_LONG_ID = "call_0123456789"
_SHORT_ID = "abcDEF123"
_SHORT_ID_PATTERN = re.compile(r"[a-zA-Z0-9]{9}")
_INLINE_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_INLINE_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>\s*", re.DOTALL)
_INLINE_RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TemplateNeeds:
    """What a template reads of a message.

    `reasoning_apart`: it has a place for reasoning, or leaves it out of the text. `writes_calls`:
    it writes tool calls at all, and where it does: `arguments_as_text`, and `short_ids` (ids of
    nine letters and digits). `call_tag` and `result_tag`: it writes `<tool_call>` and
    `<tool_response>` itself.
    """

    reasoning_apart: bool = False
    writes_calls: bool = False
    arguments_as_text: bool = False
    short_ids: bool = False
    call_tag: bool = False
    result_tag: bool = False


def find_needs(render: RenderWithTools) -> TemplateNeeds:
    """What the template behind `render` needs, from renderings of probes."""
    reasoning_apart = _wants_reasoning_apart(render)
    for as_text, call_id in product((False, True), (_LONG_ID, _SHORT_ID)):
        needs_short_ids = call_id == _SHORT_ID
        text = _try(render, _call_probe(as_text, call_id), [LOOK_UP])
        if text is None or not _holds_call(text):
            continue
        if not needs_short_ids and _try(render, _call_probe(as_text, None), [LOOK_UP]) is None:
            continue
        return TemplateNeeds(
            reasoning_apart,
            writes_calls=True,
            arguments_as_text=as_text,
            short_ids=needs_short_ids,
            call_tag="<tool_call>" in text,
            result_tag="<tool_response>" in text,
        )
    return TemplateNeeds(reasoning_apart)


def _try(render: RenderWithTools, messages: Sequence[Message], tools: Tools = None) -> str | None:
    """The rendering, or None where the template refuses it."""
    try:
        return render(messages, tools)
    except TEMPLATE_ERRORS:
        return None


def _wants_reasoning_apart(render: RenderWithTools) -> bool:
    question: Message = {"role": "user", "content": "QZuserZQ"}
    # transformers hands reasoning to templates under every name that one of them reads.
    separate: Message = {
        "role": "assistant",
        "content": "QZanswerZQ",
        "reasoning_content": "QZreasonZQ",
    }
    inline: Message = {
        "role": "assistant",
        "content": "<think>\nQZreasonZQ\n</think>\n\nQZanswerZQ",
    }
    text = _try(render, [question, separate])
    text_of_inline = _try(render, [question, inline])
    if text is None or text_of_inline is None or "QZanswerZQ" not in text:
        return False
    return "QZreasonZQ" in text or "QZreasonZQ" not in text_of_inline


def _call_probe(as_text: bool, call_id: str | None) -> list[Message]:
    """A call, its result and the answer to it."""
    arguments: Any = {"word": "QZvalueZQ"}
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": "look_up", "arguments": arguments},
    }
    result: Message = {"role": "tool", "name": "look_up", "content": "QZresultZQ"}
    if as_text:
        call["function"]["arguments"] = json.dumps(arguments)
    if call_id is not None:
        call["id"] = call_id
        result["tool_call_id"] = call_id
    return [
        {"role": "user", "content": "QZuserZQ"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        result,
        {"role": "assistant", "content": "QZanswerZQ"},
    ]


def _holds_call(text: str) -> bool:
    """Whether a probe's rendering shows the call with its argument as it should.

    Not as Python, or as JSON inside JSON.
    """
    position = text.rfind("QZvalueZQ")
    before = text[:position].rstrip()
    is_python = before.endswith("'") and "'word'" in text
    is_quoted_twice = before.endswith('\\"')
    return position >= 0 and "look_up" in text and not is_python and not is_quoted_twice


def fit_messages(messages: Sequence[Message], needs: TemplateNeeds) -> Sequence[Message]:
    """The conversation in the form that the template needs.

    The same object where nothing changes.
    """
    fitted = [_fit_message(message, needs) for message in messages]
    if needs.short_ids:
        fitted = _with_short_ids(fitted)
    if all(map(operator.is_, messages, fitted)):
        return messages
    return fitted


def _fit_message(message: Message, needs: TemplateNeeds) -> Message:
    if message["role"] == "tool" and needs.result_tag:
        return _without_result_tag(message)
    if message["role"] != "assistant":
        return message
    if needs.reasoning_apart:
        message = _with_reasoning(message)
    if needs.writes_calls:
        if needs.call_tag and "tool_calls" not in message:
            message = _with_inline_calls(message)
        if needs.arguments_as_text and "tool_calls" in message:
            message = _with_text_arguments(message)
    return message


def _without_result_tag(message: Message) -> Message:
    """The message without `<tool_response>` around its content."""
    result = _INLINE_RESULT.fullmatch(message["content"])
    if result is None:
        return message
    return {**message, "content": result[1]}


def _with_reasoning(message: Message) -> Message:
    """The message with its inline reasoning in its own field.

    Left inline its tags would be text of a message like any other, never the control tokens a
    reasoning model writes.
    """
    if message.get("reasoning_content"):
        return message
    inline = _INLINE_REASONING.fullmatch(message.get("content") or "")
    if inline is None:
        return message
    return {
        **message,
        "reasoning_content": inline[1].strip("\n"),
        "content": inline[2].lstrip("\n"),
    }


def _with_inline_calls(message: Message) -> Message:
    """The message with calls that its content spells as `<tool_call>{...}</tool_call>` as calls.

    Where anything else follows them, or one is no call, it stays as it is.
    """
    content = message["content"] or ""
    first = content.find("<tool_call>")
    if first < 0:
        return message
    calls: list[Mapping[str, Any]] = []
    position = first
    while position < len(content):
        match = _INLINE_CALL.match(content, position)
        if match is None:
            return message
        call = _parse_call(match[1])
        if call is None:
            return message
        calls.append(call)
        position = match.end()
    return {**message, "content": content[:first].rstrip("\n"), "tool_calls": calls}


def _parse_call(text: str) -> Mapping[str, Any] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    is_call = isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
    if not is_call or len(call) != 2:
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _with_text_arguments(message: Message) -> Message:
    calls: list[Mapping[str, Any]] = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The conversation with ids of nine letters and digits, alike in a call and its result.

    An id that fits stays. A call without an id gets one from its place, and results without one
    take those of the calls before them, in order.
    """
    fitted: list[Message] = []
    waiting: list[str] = []  # ids of the calls whose results come next
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls: list[Mapping[str, Any]] = []
            for number, call in enumerate(message["tool_calls"]):
                calls.append({**call, "id": _short_id(call.get("id") or f"{index}.{number}")})
            waiting = [call["id"] for call in calls]
            fitted.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            call_id = _short_id(message.get("tool_call_id") or str(index))
            if waiting:
                next_id = waiting.pop(0)
                if not message.get("tool_call_id"):
                    call_id = next_id
            fitted.append({**message, "tool_call_id": call_id})
        else:
            fitted.append(message)
    return fitted


def _short_id(name: str) -> str:
    if _SHORT_ID_PATTERN.fullmatch(name):
        return name
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=6).digest()
    return base64.b32encode(digest).decode("ascii")[:9]
