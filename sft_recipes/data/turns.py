"""How a chat template lays out one assistant turn: what it writes around the content, and what ends the turn.

Nothing here searches for known strings such as `### Response:` or `<|im_end|>`. A conversation of the same structure
is rendered with every text replaced by a unique marker; what stands between the markers is the template's own. The
layout depends only on the structure (roles, which fields exist), so it is found once per structure and reused.

Where the terminator is (measured on the templates TRL 1.16 ships): usually a token such as `<|im_end|>` before a
newline that is not trained; two tokens in a row (Cohere); another token in the last turn than in earlier ones
(GPT-OSS); the next role's token (GLM-4), in which case the last turn has none and `closing` supplies it; EOS once at
the very end after the real terminator (Phi-3).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2

from sft_recipes.messages import Message

# Renders messages to text; the second argument adds the generation prompt.
Render = Callable[[Sequence[Message], bool], str]
Tools = Sequence[Mapping[str, Any]] | None

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
# What a template may raise on a row that it cannot render: its own raise_exception, or a type it did not expect.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The template's text around the last assistant turn of a conversation structure.

    G is the generation prompt before the turn, R the rendering that ends with it.
    `prompt_rest`: the end of G that R does not repeat ("" where G is a prefix of R; an opened think block where it is
    not). `header`: text of R between the shared part and the content in that case.
    `empty_think`: an empty reasoning block the template injects at the start of the turn, or "".
    `tail`: everything R writes after the turn's last text; `stop`: offset in `tail` just after the terminator.
    `terminator`: text of the special token that ends the turn, or None. `closing`: text to append to R because the
    template leaves a last turn open (the role token that ends earlier turns), or "".
    """

    prompt_rest: str
    header: str
    empty_think: str
    tail: str
    stop: int
    terminator: str | None
    closing: str


class TurnLayouts:
    """Finds layouts and remembers them by conversation structure. `special_tokens`: texts that may end a turn."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._known: dict[str, TurnLayout | None] = {}

    def find(self, render: Render, messages: Sequence[Message], has_tools: bool) -> TurnLayout | None:
        """Layout of the last turn of `messages` (an assistant's), or None where the template gives no clear one."""
        ids: dict[str, str] = {}
        # Most messages are plain text, and finding their layout is most of this function's calls.
        parts = [_plain(message) or _with_markers(message, index, ids) for index, message in enumerate(messages)]
        structure = f"{has_tools}{parts}"
        if structure not in self._known:
            ids.clear()
            marked = [_with_markers(message, index, ids) for index, message in enumerate(messages)]
            try:
                conversation = [message for message, _ in marked]
                self._known[structure] = _find_layout(render, conversation, marked[-1][1], self._special)
            except TEMPLATE_ERRORS:
                self._known[structure] = None
        return self._known[structure]


def _plain(message: Message) -> tuple[str, str] | None:
    """What a message of nothing but a role and text has as its structure: whether the text is blank, and which then."""
    content = message.get("content")
    if len(message) != 2 or not isinstance(content, str):
        return None
    return message["role"], "text" if content.strip() else f"blank: {content}"


def _marker(index: int, count: int) -> str:
    return f"QZ{index}x{count}ZQ"


def _with_markers(message: Message, index: int, ids: dict[str, str]) -> tuple[Message, list[str]]:
    """The message with each text and number replaced by a marker, and the markers used. Blank texts but an answer stay.

    `ids` collects the markers of call ids, equal ones for equal ids; some templates demand nine letters and digits.
    """
    markers: list[str] = []
    answer = "content" if message["role"] == "assistant" and "tool_calls" not in message else ""

    def mark(value: Any, key: str) -> Any:
        marker: str | int
        if isinstance(value, Mapping):
            return {name: mark(item, key if key == "arguments" else name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(item, key) for item in value]
        if key in ("role", "type") or value is None or isinstance(value, bool):
            return value
        if key in ("id", "tool_call_id"):
            marker = ids.setdefault(value, f"QZ{len(ids):05}ZQ")
        elif not isinstance(value, str):
            marker = int(f"90{index:04}{len(markers):04}09")
        elif value.strip() or key == answer:
            marker = _marker(index, len(markers))
        else:
            return value
        markers.append(str(marker))
        return marker

    return {key: mark(value, key) for key, value in message.items() if value is not None}, markers


def _find_layout(
    render: Render, conversation: Sequence[Message], last_markers: Sequence[str], special: re.Pattern[str]
) -> TurnLayout | None:
    prompt, text = render(conversation[:-1], True), render(conversation, False)
    places = {marker: text.rfind(marker) for marker in last_markers if marker in text}
    if not places:
        return None
    last_text = max(places, key=lambda marker: places[marker])
    end = places[last_text] + len(last_text)
    shared = common_prefix_length(prompt, text)
    lead = text[shared : max(shared, min(places.values()))]
    gap = _gap_to_next_turn(render, conversation, text[:end], last_text)
    stop, terminator, closing = _find_terminator(special, text[end:], gap)
    bare, block = _plain_lead(render, conversation, shared)
    header = ""
    if shared < len(prompt):
        # A tool call begins with text of the template's own; only what a plain answer has before it is the header.
        own = lead[common_prefix_length(lead, bare) :] if conversation[-1].get("tool_calls") else ""
        header = lead[: len(lead) - len(own.lstrip())]
    match = _EMPTY_THINK.match(lead)
    think = block if block and lead.startswith(block) else match.group() if match else ""
    if conversation[-1].get("reasoning_content"):
        think = ""
    return TurnLayout(prompt[shared:], header, think, text[end:], stop, terminator, closing)


def _plain_lead(render: Render, conversation: Sequence[Message], shared: int) -> tuple[str, str]:
    """What stands before a plain answer in this place, and that again if it is an empty reasoning block, else "".

    It is one if a reasoning text appears inside it when the turn brings one, and nothing else changes.
    """
    plain: Message = {"role": "assistant", "content": "QZanswerZQ"}
    try:
        bare = render([*conversation[:-1], plain], False)[shared:].partition("QZanswerZQ")[0]
        reasoned = render([*conversation[:-1], {**plain, "reasoning_content": "QZreasonZQ"}], False)[shared:]
    except TEMPLATE_ERRORS:
        return "", ""
    emptied = reasoned.replace("QZreasonZQ", "", 1).startswith(bare + "QZanswerZQ")
    return bare, bare if "QZreasonZQ" in reasoned and emptied else ""


def _gap_to_next_turn(
    render: Render, conversation: Sequence[Message], up_to_turn: str, last_text: str
) -> tuple[str, str] | None:
    """What stands between the turn and the next one when the conversation goes on: (text, next role's header).

    After a tool call the next turn is the tool's. None where the template cannot go on. The header is only looked for
    in templates that write one after the last turn as well (an older Llama-3 one).
    """
    following: Message = {"role": "user", "content": "QZnextZQ"}
    if conversation[-1].get("tool_calls"):
        following = {"role": "tool", "content": "QZnextZQ", "name": "QZnameZQ"}
    try:
        text = render([*conversation, following, {"role": "assistant", "content": "QZlaterZQ"}], False)
    except TEMPLATE_ERRORS:
        return None
    # A template may render the turn differently once it is not the last, but its last text stands in both.
    end = len(up_to_turn) if text.startswith(up_to_turn) else text.find(last_text) + len(last_text)
    following_at = text.find("QZnextZQ", end)
    if last_text not in text or following_at < 0:
        return None
    gap = text[end:following_at]
    always_opens = render(conversation, False) == render(conversation, True)
    opening = text[: text.find(_marker(0, 0))] if always_opens and conversation[0]["role"] == "user" else ""
    return gap, gap[len(gap) - common_prefix_length(opening[::-1], gap[::-1]) :]


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Number of characters (or ids) both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def _find_terminator(special: re.Pattern[str], tail: str, gap: tuple[str, str] | None) -> tuple[int, str | None, str]:
    """(offset in `tail` after the terminator, its text, closing) by the cases of the module docstring."""
    found = list(special.finditer(tail))
    gap_text, next_header = gap or (tail, "")
    # What stands here in mid-conversation too is the turn's own, the next turn's header excepted.
    limit = common_prefix_length(tail, gap_text)
    limit = min(limit, len(gap_text) - len(next_header)) if next_header else limit
    own = [match for match in found if match.end() <= limit]
    if own:
        return own[-1].end(), own[-1].group(), ""
    if found:
        # The last turn ends in another token than earlier ones: the first, with those that directly follow it.
        pairs = zip(found[1:], found, strict=False)
        run = [found[0], *[match for match, _ in takewhile(lambda pair: pair[0].start() == pair[1].end(), pairs)]]
        return run[-1].end(), run[-1].group(), ""
    role_token = special.search(gap_text) if gap_text.startswith(tail) else None
    if role_token is not None:
        return len(tail), role_token.group(), gap_text[len(tail) : role_token.end()]
    return len(tail), None, ""
