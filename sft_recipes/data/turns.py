"""How a chat template lays out one assistant turn: what it writes around the content, and what ends the turn.

Nothing here searches for known strings such as `### Response:` or `<|im_end|>`. A conversation of the same structure
is rendered with every text replaced by a unique marker; what stands between the markers is the template's own. The
layout depends only on the structure (roles, which fields exist), so it is found once per structure and reused.

Where the terminator is (measured on the templates TRL 1.16 ships): usually a token such as `<|im_end|>` before a
newline that is not trained; two tokens in a row (Cohere); another token in the last turn than in earlier ones
(GPT-OSS); the next role's token (GLM-4), in which case the last turn has none and `closing` supplies it; EOS once at
the very end after the real terminator (Phi-3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from sft_recipes.messages import Message

if TYPE_CHECKING:
    from sft_recipes.data.chat_templates import ChatRenderer

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The template's text around the last assistant turn of a conversation structure.

    G is the generation prompt before the turn, R the rendering that ends with it.
    `prompt_cut`: characters at the end of G that R does not repeat (0 where G is a prefix of R; the length of an
    opened think block where it is not). `header`: text of R between the shared part and the content in that case.
    `empty_think`: an empty reasoning block the template injects at the start of the turn, or "".
    `tail`: everything R writes after the turn's last text; `stop`: offset in `tail` just after the terminator.
    `terminator`: text of the special token that ends the turn, or None. `closing`: text to append to R because the
    template leaves a last turn open (the role token that ends earlier turns), or "".
    """

    prompt_cut: int
    prompt_rest: str
    header: str
    empty_think: str
    tail: str
    stop: int
    terminator: str | None
    closing: str


class TurnLayouts:
    """Finds layouts through one renderer and remembers them by conversation structure."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._known: dict[tuple[Any, ...], TurnLayout | None] = {}

    def find(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> TurnLayout | None:
        """Layout of the last turn of `messages` (an assistant's), or None where the template gives no clear one."""
        key = (bool(tools), *[_shape(message) for message in messages])
        if key not in self._known:
            try:
                self._known[key] = _find_layout(self._renderer, messages, tools)
            except _RENDER_ERRORS:
                self._known[key] = None
        return self._known[key]


def _shape(value: Any) -> Any:
    """The structure of a message: roles and which fields hold text, without the text itself."""
    if isinstance(value, str):
        return "text" if value.strip() else "blank"
    if isinstance(value, Mapping):
        return tuple((key, item if key == "role" else _shape(item)) for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ("list", *[_shape(item) for item in value])
    # Numbers get markers of their own; true, false and null stand in the layout as they are.
    return type(value).__name__ if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _marker(index: int, count: int) -> str:
    return f"QZ{index}x{count}ZQ"


def _number_marker(index: int, count: int) -> int:
    return int(f"90{index:04}{count:04}09")


def _with_markers(message: Message, index: int, is_last: bool) -> tuple[Message, list[str]]:
    """The message with each text and number replaced by a marker, and the markers used. Blank texts stay."""
    markers: list[str] = []

    def mark(value: Any, key: str) -> Any:
        if isinstance(value, str):
            answer = is_last and key == "content" and "tool_calls" not in message
            if key in ("role", "type", "id", "tool_call_id") or not (value.strip() or answer):
                return value
            markers.append(_marker(index, len(markers)))
            return markers[-1]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = _number_marker(index, len(markers))
            markers.append(str(number))
            return number
        if isinstance(value, Mapping):
            return {name: mark(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(item, key) for item in value]
        return value

    marked = {key: mark(value, key) for key, value in message.items() if value is not None}
    return marked, markers


def _find_layout(
    renderer: ChatRenderer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> TurnLayout | None:
    last = len(messages) - 1
    marked = [_with_markers(message, index, index == last) for index, message in enumerate(messages)]
    conversation = [message for message, _ in marked]
    markers = marked[last][1]
    prompt = renderer.render(conversation[:-1], tools, add_generation_prompt=True)
    text = renderer.render(conversation, tools)
    places = [text.rfind(marker) for marker in markers]
    ends = [place + len(marker) for place, marker in zip(places, markers, strict=True) if place >= 0]
    if not ends:
        return None
    first_text = min(place for place in places if place >= 0)
    shared = common_prefix_length(prompt, text)
    lead = text[shared:first_text] if shared <= first_text else ""
    tail = text[max(ends) :]
    gap = _gap_to_next_turn(renderer, conversation, text[: max(ends)], markers, tools)
    stop, terminator, closing = _find_terminator(renderer, tail, gap)
    is_prefix = shared == len(prompt)
    return TurnLayout(
        prompt_cut=len(prompt) - shared,
        prompt_rest=prompt[shared:],
        header="" if is_prefix else _header(renderer, conversation, tools, lead, shared),
        empty_think=_empty_think(renderer, conversation, tools, lead, shared),
        tail=tail,
        stop=stop,
        terminator=terminator,
        closing=closing,
    )


def _gap_to_next_turn(
    renderer: ChatRenderer,
    conversation: Sequence[Message],
    up_to_turn: str,
    markers: Sequence[str],
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[str, str] | None:
    """What stands between the turn and the next one when the conversation goes on: (text, next role's header).

    After a tool call the next turn is the tool's. None where the template cannot go on.
    """
    calls_tool = bool(conversation[-1].get("tool_calls"))
    following: list[Message] = [
        {"role": "tool", "content": "QZnextZQ", "name": "QZnameZQ"}
        if calls_tool
        else {"role": "user", "content": "QZnextZQ"},
        {"role": "assistant", "content": "QZlaterZQ"},
    ]
    try:
        text = renderer.render([*conversation, *following], tools)
    except _RENDER_ERRORS:
        return None
    # A template may render the turn differently once it is not the last, but its last text stands in both.
    last_text = max(markers, key=up_to_turn.rfind)
    end = len(up_to_turn) if text.startswith(up_to_turn) else text.find(last_text) + len(last_text)
    following_at = text.find("QZnextZQ", end)
    if last_text not in text or following_at < 0:
        return None
    gap = text[end:following_at]
    always_opens = renderer.render(conversation, tools) == renderer.render(conversation, tools, True)
    opening = text[: text.find(_marker(0, 0))] if always_opens and conversation[0]["role"] == "user" else ""
    return gap, _common_suffix(opening, gap)


def _common_suffix(left: str, right: str) -> str:
    length = common_prefix_length(left[::-1], right[::-1])
    return right[len(right) - length :]


def common_prefix_length(left: str, right: str) -> int:
    """Number of characters both texts begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _find_terminator(renderer: ChatRenderer, tail: str, gap: tuple[str, str] | None) -> tuple[int, str | None, str]:
    """(offset in `tail` after the terminator, its text, closing) by the cases of the module docstring."""
    specials = _special_matches(renderer, tail)
    if gap is not None:
        gap_text, next_header = gap
        common = common_prefix_length(tail, gap_text)
        # What both renderings write is the turn's own, except the next turn's header where a template (an older
        # Llama-3 one) writes that after the last turn as well.
        limit = min(common, len(gap_text) - len(next_header)) if next_header else common
        within = [match for match in specials if match.end() <= limit]
        if within:
            return within[-1].end(), within[-1].group(), ""
    elif specials:
        return specials[-1].end(), specials[-1].group(), ""
    if specials:
        chosen = _first_run(specials)
        return chosen.end(), chosen.group(), ""
    if gap is not None and gap[0].startswith(tail):
        role_token = next(iter(_special_matches(renderer, gap[0])), None)
        if role_token is not None:
            return len(tail), role_token.group(), gap[0][len(tail) : role_token.end()]
    return len(tail), None, ""


def _special_matches(renderer: ChatRenderer, text: str) -> list[re.Match[str]]:
    if not renderer.special_tokens:
        return []
    longest_first = sorted(renderer.special_tokens, key=len, reverse=True)
    return list(re.finditer("|".join(map(re.escape, longest_first)), text))


def _first_run(matches: Sequence[re.Match[str]]) -> re.Match[str]:
    """The last of the special tokens that directly follow the first one."""
    chosen = matches[0]
    for match in matches[1:]:
        if match.start() != chosen.end():
            break
        chosen = match
    return chosen


def _header(
    renderer: ChatRenderer,
    conversation: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    lead: str,
    shared: int,
) -> str:
    """Of what stands before the turn's first text, the part that a plain answer has as well, and space after it.

    The rest belongs to the answer: a tool call begins with text of the template's own.
    """
    if not conversation[-1].get("tool_calls"):
        return lead
    plain: Message = {"role": "assistant", "content": "QZanswerZQ"}
    bare = renderer.render([*conversation[:-1], plain], tools)[shared:].partition("QZanswerZQ")[0]
    length = common_prefix_length(lead, bare)
    return lead[: len(lead) - len(lead[length:].lstrip())]


def _empty_think(
    renderer: ChatRenderer,
    conversation: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    lead: str,
    shared: int,
) -> str:
    """The empty reasoning block at the beginning of `lead`: what the template writes around reasoning, around nothing.

    Found by rendering a plain answer with a reasoning text and taking that text out again; a block spelled
    `<think></think>` is recognised as well for templates that take no reasoning field.
    """
    if not lead or conversation[-1].get("reasoning_content"):
        return ""
    plain = {"role": "assistant", "content": "QZanswerZQ"}
    try:
        bare = renderer.render([*conversation[:-1], plain], tools)[shared:]
        reasoned = renderer.render([*conversation[:-1], {**plain, "reasoning_content": "QZreasonZQ"}], tools)[shared:]
    except _RENDER_ERRORS:
        bare = reasoned = ""
    block = bare.partition("QZanswerZQ")[0]
    emptied = reasoned.replace("QZreasonZQ", "", 1).startswith(block + "QZanswerZQ")
    if block and "QZreasonZQ" in reasoned and emptied and lead.startswith(block):
        return block
    match = _EMPTY_THINK.match(lead)
    return match.group() if match else ""
