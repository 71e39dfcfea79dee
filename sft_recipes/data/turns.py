"""How a chat template lays out one assistant turn: what it writes around the content, and what ends the turn.

Nothing here searches for known strings such as `### Response:` or `<|im_end|>`. A conversation of the same structure
is rendered with every text replaced by a unique marker; what stands between the markers is the template's own. The
layout depends only on the structure (roles, which fields exist), so it is found once per structure and reused.

Where the terminator is (measured on the templates TRL 1.16 ships): usually a token such as `<|im_end|>` before a
newline that is not trained; two tokens in a row (Cohere); another token in the last turn than in earlier ones
(GPT-OSS); the next role's token (GLM-4), in which case the last turn has none and `closing` supplies it; EOS once at
the very end after the real terminator (Phi-3). Texts are compared token by token, never inside a control token, and a
token that opens the assistant's own turn never ends one (some templates open it after every conversation).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from sft_recipes.messages import Message

# Renders messages to text; the second argument adds the generation prompt.
Render = Callable[[Sequence[Message], bool], str]
Tools = Sequence[Mapping[str, Any]] | None

# What a template may raise on a row that it cannot render: its own raise_exception, or a type it did not expect.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)

_THINK_TAG = re.compile(r"(</?think>)")
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_ANY_MARKER = re.compile(r"QZ[0-9a-zx]+ZQ|90\d{8}09")
_NEXT, _LATER, _ANSWER, _REASON = "QZnextZQ", "QZlaterZQ", "QZanswerZQ", "QZreasonZQ"


@dataclass(frozen=True, slots=True)
class Terminator:
    """What ends a turn. `stop`: offset just after it in the text that follows the content; `token`: its last control
    token, or None where nothing ends the turn. `closing`: text to put at `stop` because the template leaves a last
    turn open (the role token that ends earlier turns), or "".
    """

    stop: int
    token: str | None
    closing: str = ""


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The template's text around the last assistant turn of a conversation structure.

    G is the generation prompt before the turn, R the rendering that ends with it.
    `prompt_rest`: the end of G that R does not repeat ("" where G is a prefix of R; an opened think block where it is
    not). `header`: text of R between the shared part and the content in that case.
    `empty_think`: an empty reasoning block the template injects at the start of the turn, or "".
    `tail`: everything R writes after the turn's last text. `prompt_tail`: None, or what G writes after the last text of
    the conversation where R writes the conversation itself otherwise than G does (Mistral shows the system message only
    while a question waits for its answer); then the answer has to be put behind G.
    """

    prompt_rest: str
    header: str
    empty_think: str
    tail: str
    terminator: Terminator
    prompt_tail: str | None = None


@dataclass(slots=True)
class MarkedMessage:
    """A message with each text and number replaced by a marker, and the markers in the order they were made."""

    message: Message
    markers: list[str] = field(default_factory=list)


class TurnLayouts:
    """Finds layouts and remembers them by conversation structure. `special_tokens`: texts that may end a turn."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._known: dict[str, TurnLayout | None] = {}
        self._openers: frozenset[str] | None = None

    def find(
        self, render: Render, messages: Sequence[Message], has_tools: bool
    ) -> TurnLayout | None:
        """Layout of the last turn of `messages` (an assistant's), or None where the template gives no clear one."""
        structure = f"{has_tools}{_structure(messages)}"
        if structure not in self._known:
            if self._openers is None:
                self._openers = _find_openers(render, self._special)
            try:
                self._known[structure] = _find_layout(
                    render, messages, self._special, self._openers
                )
            except TEMPLATE_ERRORS:
                self._known[structure] = None
        return self._known[structure]


# -- markers -----------------------------------------------------------------------------------------------------------


def _structure(messages: Sequence[Message]) -> str:
    """What the layout of a conversation depends on: its messages with every text replaced."""
    call_ids: dict[str, str] = {}
    parts: list[Any] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if len(message) == 2 and isinstance(content, str) and "think>" not in content:
            # Most messages are plain text, and finding their layout is most of this function's calls.
            parts.append((message["role"], "text" if content.strip() else f"blank: {content}"))
        else:
            parts.append(_with_markers(message, index, call_ids).message)
    return repr(parts)


def _marker(index: int, count: int) -> str:
    return f"QZ{index}x{count}ZQ"


def _with_markers(message: Message, index: int, call_ids: dict[str, str]) -> MarkedMessage:
    """The message with markers in place of its texts and numbers. Blank texts but an answer stay.

    `call_ids` collects the markers of call ids, equal ones for equal ids; some templates demand nine letters or digits.
    """
    marked = MarkedMessage({})
    is_plain_answer = message["role"] == "assistant" and "tool_calls" not in message
    always_marked = "content" if is_plain_answer else ""
    for key, value in message.items():
        if value is not None:
            marked.message[key] = _marked_value(
                value, key, index, marked.markers, call_ids, always_marked
            )
    return marked


def _marked_value(
    value: Any,
    key: str,
    index: int,
    markers: list[str],
    call_ids: dict[str, str],
    always_marked: str,
) -> Any:
    if isinstance(value, Mapping):
        marked: dict[str, Any] = {}
        for name, part in value.items():
            part_key = key if key == "arguments" else name
            marked[name] = _marked_value(part, part_key, index, markers, call_ids, always_marked)
        return marked
    if isinstance(value, list | tuple):
        return [_marked_value(part, key, index, markers, call_ids, always_marked) for part in value]
    if key in ("role", "type") or value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and not value.strip() and key != always_marked:
        return value
    if key == always_marked and isinstance(value, str) and "think>" in value:
        return _marked_around_tags(value, index, markers)
    marker: str | int = _marker(index, len(markers))
    if key in ("id", "tool_call_id"):
        marker = call_ids.setdefault(str(value), f"QZ{len(call_ids):05}ZQ")
    elif not isinstance(value, str):
        marker = int(f"90{index:04}{len(markers):04}09")
    markers.append(str(marker))
    return marker


def _marked_around_tags(text: str, index: int, markers: list[str]) -> str:
    """An answer with markers in place of the texts around its reasoning tags, which some templates look for."""
    pieces: list[str] = []
    for piece in _THINK_TAG.split(text):
        if piece.strip() and not _THINK_TAG.fullmatch(piece):
            piece = _marker(index, len(markers))
            markers.append(piece)
        pieces.append(piece)
    if not markers:  # nothing but tags
        markers.append(_marker(index, 0))
        pieces.append(markers[0])
    return "".join(pieces)


# -- layouts -----------------------------------------------------------------------------------------------------------


def _find_layout(
    render: Render, messages: Sequence[Message], special: re.Pattern[str], openers: frozenset[str]
) -> TurnLayout | None:
    call_ids: dict[str, str] = {}
    marked = [_with_markers(message, index, call_ids) for index, message in enumerate(messages)]
    conversation = [part.message for part in marked]
    prompt = render(conversation[:-1], True)
    text = render(conversation, False)
    places = {marker: text.rfind(marker) for marker in marked[-1].markers if marker in text}
    if not places:
        return None
    last_marker = max(places, key=lambda marker: places[marker])
    end = places[last_marker] + len(last_marker)
    tail = text[end:]
    shared = _shared_prefix_length(special, prompt, text)
    last_text_end = _end_of_last_text(prompt)
    gap = _gap_to_next_turn(render, conversation, text[:end], last_marker)
    in_prompt = frozenset(special.findall(prompt, last_text_end))
    terminator = _find_terminator(special, tail, gap, openers, in_prompt)
    if shared < last_text_end:
        return TurnLayout("", "", "", tail, terminator, prompt[last_text_end:])

    brings_tags = "think>" in (conversation[-1].get("content") or "")
    if brings_tags and shared < len(prompt):
        # A tag of the answer's own may begin like what the prompt ends with.
        shared = min(shared, _shared_with_plain_answer(render, conversation, prompt))
    lead = text[shared : max(shared, min(places.values()))]
    plain = _plain_lead(render, conversation, shared)
    header = ""
    if shared < len(prompt):
        header = lead
        # A call begins with text of the template's own, and an answer may begin with tags; only what a plain answer has
        # before it is the header.
        beyond_plain = lead[common_prefix_length(lead, plain.lead) :]
        if conversation[-1].get("tool_calls"):
            header = lead[: len(lead) - len(beyond_plain.lstrip())]
        elif brings_tags:
            header = lead[: len(lead) - len(beyond_plain)]

    empty_think = ""
    if not conversation[-1].get("reasoning_content"):
        empty_think = _empty_think(lead, plain, brings_tags)
    return TurnLayout(prompt[shared:], header, empty_think, tail, terminator)


@dataclass(frozen=True, slots=True)
class _PlainLead:
    """What stands before a plain answer, and whether that is a reasoning block with nothing in it."""

    lead: str
    is_empty_block: bool


def _shared_with_plain_answer(render: Render, conversation: Sequence[Message], prompt: str) -> int:
    """How far the generation prompt goes along with a plain answer in this place."""
    answer: Message = {"role": "assistant", "content": _ANSWER}
    try:
        return common_prefix_length(prompt, render([*conversation[:-1], answer], False))
    except TEMPLATE_ERRORS:
        return len(prompt)


def _empty_think(lead: str, plain: _PlainLead, brings_tags: bool) -> str:
    """The empty reasoning block with which the template begins the turn, or ""; one of the answer's own is text."""
    if plain.is_empty_block and lead.startswith(plain.lead):
        return plain.lead
    match = None if brings_tags else _EMPTY_THINK.match(lead)
    return match.group() if match else ""


def _plain_lead(render: Render, conversation: Sequence[Message], shared: int) -> _PlainLead:
    """What stands before a plain answer in this place.

    It is an empty reasoning block if a reasoning text appears inside it when the turn brings one, and nothing else
    changes.
    """
    answer: Message = {"role": "assistant", "content": _ANSWER}
    try:
        bare = render([*conversation[:-1], answer], False)[shared:].partition(_ANSWER)[0]
        reasoned = render([*conversation[:-1], {**answer, "reasoning_content": _REASON}], False)[
            shared:
        ]
    except TEMPLATE_ERRORS:
        return _PlainLead("", False)
    emptied = reasoned.replace(_REASON, "", 1).startswith(bare + _ANSWER)
    return _PlainLead(bare, bool(bare) and _REASON in reasoned and emptied)


def _gap_to_next_turn(
    render: Render, conversation: Sequence[Message], up_to_turn: str, last_marker: str
) -> str | None:
    """What stands between the turn and the text of the next one when the conversation goes on.

    After a tool call the next turn is the tool's. None where the template cannot go on.
    """
    following: Message = {"role": "user", "content": _NEXT}
    calls = conversation[-1].get("tool_calls")
    if calls:
        following = {"role": "tool", "content": _NEXT, "name": "QZnameZQ"}
        if "id" in calls[-1]:
            following["tool_call_id"] = calls[-1]["id"]
    try:
        text = render([*conversation, following, {"role": "assistant", "content": _LATER}], False)
    except TEMPLATE_ERRORS:
        return None
    # A template may render the turn differently once it is not the last, but its last text stands in both.
    end = len(up_to_turn)
    if not text.startswith(up_to_turn):
        if last_marker not in text:
            return None
        end = text.find(last_marker) + len(last_marker)
    next_text = text.find(_NEXT, end)
    return text[end:next_text] if next_text >= 0 else None


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Number of characters (or ids) both begin with."""
    shorter = min(len(left), len(right))
    for index in range(shorter):
        if left[index] != right[index]:
            return index
    return shorter


def _shared_prefix_length(special: re.Pattern[str], left: str, right: str) -> int:
    """Number of characters that both begin with, never ending inside a control token."""
    length = common_prefix_length(left, right)
    for text in (left, right):
        for token in special.finditer(text):
            if token.start() < length < token.end():
                length = token.start()
    return length


# -- terminators -------------------------------------------------------------------------------------------------------


def _end_of_last_text(prompt: str) -> int:
    """Where the last text of a marked conversation ends in its generation prompt."""
    end = 0
    for match in _ANY_MARKER.finditer(prompt):
        end = match.end()
    return end


def _find_openers(render: Render, special: re.Pattern[str]) -> frozenset[str]:
    """Control tokens that open a message: before the first text of a conversation, and again before a later one.

    In the gap to a later message the first token is the end of the message before it, which some templates write
    before the first message, too (BOS that is also EOS).
    """
    exchange: list[Message] = [
        {"role": "user", "content": _marker(1, 0)},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
        {"role": "assistant", "content": _LATER},
    ]
    # With a system message of its own the conversation brings none of the template's.
    system: Message = {"role": "system", "content": _marker(0, 0)}
    for conversation in ([system, *exchange], exchange):
        try:
            text = render(conversation, False)
        except TEMPLATE_ERRORS:
            continue
        first_text = text.find(conversation[0]["content"])
        answer = text.find(_ANSWER)
        next_text = text.find(_NEXT)
        if 0 <= first_text < answer < next_text:
            before_first = special.findall(text[:first_text])
            before_later = special.findall(text[answer + len(_ANSWER) : next_text])
            return frozenset(before_first).intersection(before_later[1:])
    return frozenset()


def _find_terminator(
    special: re.Pattern[str],
    tail: str,
    gap: str | None,
    openers: frozenset[str],
    in_prompt: frozenset[str],
) -> Terminator:
    """What ends the turn, by the cases of the module docstring. `tail`: what follows the turn when it is the last,
    `gap`: when another follows.
    """
    own = _before_any(openers, _shared_tokens(special, tail, tail if gap is None else gap))
    if own:
        return Terminator(own[-1].end(), own[-1].group())
    # The last turn ends in another token than earlier ones: the first, with those that directly follow it.
    last_only = _first_run(_before_any(openers | in_prompt, special.finditer(tail)))
    if last_only:
        return Terminator(last_only[-1].end(), last_only[-1].group())
    if gap is not None:
        next_role = special.search(gap)
        if next_role is not None and next_role.group() not in in_prompt | openers:
            # Text before the next role's token belongs to the turn as far as the last turn has it, too.
            start = min(_shared_prefix_length(special, tail, gap), next_role.start())
            is_open = not tail[start:].strip() or special.match(tail, start) is not None
            if is_open:
                return Terminator(start, next_role.group(), gap[start : next_role.end()])
    return Terminator(len(tail), None)


def _before_any(excluded: frozenset[str], tokens: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """The tokens up to the first one that is excluded."""
    kept: list[re.Match[str]] = []
    for token in tokens:
        if token.group() in excluded:
            break
        kept.append(token)
    return kept


def _first_run(tokens: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """The first token and those that follow it without anything between."""
    run: list[re.Match[str]] = []
    for token in tokens:
        if run and run[-1].end() != token.start():
            break
        run.append(token)
    return run


def _shared_tokens(special: re.Pattern[str], tail: str, gap: str) -> list[re.Match[str]]:
    """The control tokens of `tail` up to the first place where `gap` differs; a token is alike as a whole or not."""
    shared: list[re.Match[str]] = []
    end = 0
    for ours, theirs in zip(special.finditer(tail), special.finditer(gap), strict=False):
        if tail[end : ours.end()] != gap[end : theirs.end()]:
            break
        shared.append(ours)
        end = ours.end()
    return shared
