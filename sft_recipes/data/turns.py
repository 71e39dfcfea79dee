"""How a chat template lays out a turn: what it writes around the content, and what ends it.

Nothing here searches for known strings such as `### Response:` or `<|im_end|>`. A conversation of
the same structure is rendered with every text replaced by a unique marker (`turn_markers.py`); what
stands between the markers is the template's own. The layout depends only on the structure (roles,
which fields exist), so it is found once per structure and reused.

Where the terminator is (measured on the templates TRL 1.16 ships): usually a token such as
`<|im_end|>` before a newline that is not trained; two tokens in a row (Cohere); another token in
the last turn than in earlier ones (GPT-OSS); the next role's token (GLM-4), in which case the last
turn has none and `closing` supplies it; EOS once at the very end after the real terminator (Phi-3).
Texts are compared token by token, never inside a control token, and a token that opens the
assistant's own turn never ends one (some templates open it after every conversation).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from sft_recipes.data.turn_markers import (
    ANSWER,
    LATER,
    NEXT,
    REASON,
    end_of_last_marker,
    mark_conversation,
    marker,
    structure,
)
from sft_recipes.messages import Message

# Renders messages to text; the second argument adds the generation prompt.
Render = Callable[[Sequence[Message], bool], str]
Tools = Sequence[Mapping[str, Any]] | None
Token = re.Match[str]

# What a template may raise on a row that it cannot render: its own raise_exception, or what Python
# raises for a type, a number or a depth that it did not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_PLAIN_ANSWER: Message = {"role": "assistant", "content": ANSWER}


@dataclass(frozen=True, slots=True)
class Terminator:
    """What ends a turn.

    `stop`: offset just after it in the text that follows the content; `token`: its last control
    token, or None where nothing ends the turn. `closing`: text to put at `stop` because the
    template leaves a last turn open (the role token that ends earlier turns), or "".
    """

    stop: int
    token: str | None
    closing: str = ""


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The template's text around the last assistant turn of a conversation structure.

    G is the generation prompt before the turn, R the rendering that ends with it. `prompt_rest`:
    the end of G that R does not repeat ("" where G is a prefix of R; an opened think block where it
    is not). `header`: text of R between the shared part and the content in that case.
    `empty_think`: an empty reasoning block the template injects at the start of the turn, or "".
    `tail`: everything R writes after the turn's last text. `prompt_tail`: None, or what G writes
    after the last text of the conversation where R writes the conversation itself otherwise than G
    does (Mistral shows the system message only while a question waits for its answer); then the
    answer has to be put behind G.
    """

    prompt_rest: str
    header: str
    empty_think: str
    tail: str
    terminator: Terminator
    prompt_tail: str | None = None


class TurnLayouts:
    """Finds layouts and remembers them by conversation structure.

    `special_tokens`: texts that may end a turn.
    """

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._known: dict[str, TurnLayout | None] = {}
        self._openers: frozenset[str] | None = None

    def find(
        self, render: Render, messages: Sequence[Message], has_tools: bool
    ) -> TurnLayout | None:
        """Layout of the last turn of `messages`, an assistant's.

        None where there is no clear one.
        """
        key = f"{has_tools}{structure(messages)}"
        if key not in self._known:
            if self._openers is None:
                self._openers = _find_openers(render, self._special)
            try:
                layout = _find_layout(render, messages, self._special, self._openers)
            except TEMPLATE_ERRORS:
                layout = None
            self._known[key] = layout
        return self._known[key]


# -- layouts ---------------------------------------------------------------------------------------


def _find_layout(
    render: Render, messages: Sequence[Message], special: re.Pattern[str], openers: frozenset[str]
) -> TurnLayout | None:
    marked = mark_conversation(messages)
    conversation = [marked_message.message for marked_message in marked]
    prompt = render(conversation[:-1], True)
    text = render(conversation, False)
    places = {marker: text.rfind(marker) for marker in marked[-1].markers if marker in text}
    if not places:
        return None
    last_marker = max(places, key=lambda marker: places[marker])
    end = places[last_marker] + len(last_marker)
    tail = text[end:]
    shared = _shared_prefix_length(special, prompt, text)
    last_text_end = end_of_last_marker(prompt)
    gap = _gap_to_next_turn(render, conversation, text[:end], last_marker)
    in_prompt = frozenset(special.findall(prompt, last_text_end))
    terminator = _find_terminator(special, tail, gap, openers, in_prompt)
    if shared < last_text_end:
        return TurnLayout("", "", "", tail, terminator, prompt_tail=prompt[last_text_end:])

    if _brings_tags(conversation[-1]) and shared < len(prompt):
        # A tag of the answer's own may begin like what the prompt ends with.
        shared = min(shared, _shared_with_plain_answer(render, conversation, prompt))
    lead = text[shared : max(shared, min(places.values()))]
    plain = _plain_lead(render, conversation, shared)
    header = ""
    if shared < len(prompt):
        header = _header(lead, plain, conversation[-1])
    empty_think = _empty_think(lead, plain, conversation[-1])
    return TurnLayout(prompt[shared:], header, empty_think, tail, terminator)


@dataclass(frozen=True, slots=True)
class _PlainLead:
    """What stands before a plain answer, and whether that is an empty reasoning block."""

    lead: str
    is_empty_block: bool


def _brings_tags(answer: Message) -> bool:
    """Whether an answer has reasoning tags in its own text."""
    return "think>" in (answer.get("content") or "")


def _shared_with_plain_answer(render: Render, conversation: Sequence[Message], prompt: str) -> int:
    """How far the generation prompt goes along with a plain answer in this place."""
    try:
        answered = render([*conversation[:-1], _PLAIN_ANSWER], False)
    except TEMPLATE_ERRORS:
        return len(prompt)
    return _common_prefix_length(prompt, answered)


def _header(lead: str, plain: _PlainLead, answer: Message) -> str:
    """What the template itself writes of the text before an answer's first marker.

    A call begins with text of the template's own, and an answer may begin with tags; only what a
    plain answer has before it is the header.
    """
    beyond_plain = lead[_common_prefix_length(lead, plain.lead) :]
    if answer.get("tool_calls"):
        return lead.removesuffix(beyond_plain.lstrip())
    if _brings_tags(answer):
        return lead.removesuffix(beyond_plain)
    return lead


def _empty_think(lead: str, plain: _PlainLead, answer: Message) -> str:
    """The empty reasoning block with which the template begins the turn, or "".

    One of the answer's own is text.
    """
    if answer.get("reasoning_content"):
        return ""
    if plain.is_empty_block and lead.startswith(plain.lead):
        return plain.lead
    match = _EMPTY_THINK.match(lead)
    if match is None or _brings_tags(answer):
        return ""
    return match.group()


def _plain_lead(render: Render, conversation: Sequence[Message], shared: int) -> _PlainLead:
    """What stands before a plain answer in this place.

    It is an empty reasoning block if a reasoning text appears inside it when the turn brings one,
    and nothing else changes.
    """
    before = conversation[:-1]
    with_reasoning = {**_PLAIN_ANSWER, "reasoning_content": REASON}
    try:
        bare = render([*before, _PLAIN_ANSWER], False)[shared:].partition(ANSWER)[0]
        reasoned = render([*before, with_reasoning], False)[shared:]
    except TEMPLATE_ERRORS:
        return _PlainLead("", False)
    emptied = reasoned.replace(REASON, "", 1)
    is_empty_block = bool(bare) and REASON in reasoned and emptied.startswith(bare + ANSWER)
    return _PlainLead(bare, is_empty_block)


def _gap_to_next_turn(
    render: Render, conversation: Sequence[Message], up_to_turn: str, last_marker: str
) -> str | None:
    """What stands between the turn and the text of the next one when the conversation goes on.

    After a tool call the next turn is the tool's. None where the template cannot go on.
    """
    following: Message = {"role": "user", "content": NEXT}
    calls = conversation[-1].get("tool_calls")
    if calls:
        following = {"role": "tool", "content": NEXT, "name": "QZnameZQ"}
        if "id" in calls[-1]:
            following["tool_call_id"] = calls[-1]["id"]
    later: Message = {"role": "assistant", "content": LATER}
    try:
        text = render([*conversation, following, later], False)
    except TEMPLATE_ERRORS:
        return None
    # A template may render the turn differently once it is not the last, but its last text stands
    # in both.
    end = len(up_to_turn)
    if not text.startswith(up_to_turn):
        if last_marker not in text:
            return None
        end = text.find(last_marker) + len(last_marker)
    next_text = text.find(NEXT, end)
    if next_text < 0:
        return None
    return text[end:next_text]


def _common_prefix_length(left: str, right: str) -> int:
    """Number of characters that both begin with."""
    length = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        length += 1
    return length


def _shared_prefix_length(special: re.Pattern[str], left: str, right: str) -> int:
    """Number of characters that both begin with, never ending inside a control token."""
    length = _common_prefix_length(left, right)
    for text in (left, right):
        for token in special.finditer(text):
            if token.start() < length < token.end():
                length = token.start()
    return length


# -- terminators -----------------------------------------------------------------------------------


def _find_openers(render: Render, special: re.Pattern[str]) -> frozenset[str]:
    """Control tokens that open a message.

    They stand before the first text of a conversation, and again before a later one. In the gap to
    a later message the first token is the end of the message before it, which some templates write
    before the first message, too (BOS that is also EOS).
    """
    exchange: list[Message] = [
        {"role": "user", "content": marker(1, 0)},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT},
        {"role": "assistant", "content": LATER},
    ]
    # With a system message of its own the conversation brings none of the template's.
    system: Message = {"role": "system", "content": marker(0, 0)}
    for conversation in ([system, *exchange], exchange):
        try:
            text = render(conversation, False)
        except TEMPLATE_ERRORS:
            continue
        first_text = text.find(conversation[0]["content"])
        answer = text.find(ANSWER)
        next_text = text.find(NEXT)
        if 0 <= first_text < answer < next_text:
            before_first = special.findall(text[:first_text])
            before_later = special.findall(text[answer + len(ANSWER) : next_text])
            return frozenset(before_first).intersection(before_later[1:])
    return frozenset()


def _find_terminator(
    special: re.Pattern[str],
    tail: str,
    gap: str | None,
    openers: frozenset[str],
    in_prompt: frozenset[str],
) -> Terminator:
    """What ends the turn, by the cases of the module docstring.

    `tail`: what follows the turn when it is the last, `gap`: when another follows.
    """
    in_both = list(special.finditer(tail))
    if gap is not None:
        in_both = _shared_tokens(special, tail, gap)
    ending = _before_any(openers, in_both)
    if not ending:
        # The last turn ends in another token than earlier ones: the first, with those that directly
        # follow it.
        ending = _first_run(_before_any(openers | in_prompt, special.finditer(tail)))
    if ending:
        return Terminator(ending[-1].end(), ending[-1].group())
    if gap is not None:
        next_role = special.search(gap)
        if next_role is not None and next_role.group() not in in_prompt | openers:
            # Text before the next role's token belongs to the turn as far as the last turn has it,
            # too.
            start = min(_shared_prefix_length(special, tail, gap), next_role.start())
            is_open = not tail[start:].strip() or special.match(tail, start) is not None
            if is_open:
                return Terminator(start, next_role.group(), gap[start : next_role.end()])
    return Terminator(len(tail), None)


def _before_any(excluded: frozenset[str], tokens: Iterable[Token]) -> list[Token]:
    """The tokens up to the first one that is excluded."""
    before: list[Token] = []
    for token in tokens:
        if token.group() in excluded:
            break
        before.append(token)
    return before


def _first_run(tokens: Iterable[Token]) -> list[Token]:
    """The first token and those that follow it without anything between."""
    run: list[Token] = []
    for token in tokens:
        if run and run[-1].end() != token.start():
            break
        run.append(token)
    return run


def _shared_tokens(special: re.Pattern[str], tail: str, gap: str) -> list[Token]:
    """The control tokens of `tail` up to the first place where `gap` differs.

    A token is alike as a whole or not at all.
    """
    shared: list[Token] = []
    end = 0
    for ours, theirs in zip(special.finditer(tail), special.finditer(gap), strict=False):
        if tail[end : ours.end()] != gap[end : theirs.end()]:
            break
        shared.append(ours)
        end = ours.end()
    return shared
