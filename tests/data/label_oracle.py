"""An independent judge of labels, by teacher forcing.

It renders with `tokenizer.apply_chat_template` only and asks, for every trained span: is what stands before it exactly
what a server would have put into the model (the generation prompt of the conversation up to there), and is the span
exactly what the model then has to write, up to and including one terminator? It never looks for where text is; it
only compares strings from the left end, so it shares no idea with placeholder rendering.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Row = tuple[Sequence[int], Sequence[int]]
Tokenizer = Any  # transformers types its answers as unions over all options

EMPTY_REASONING = re.compile(r"<think>\s*</think>|<\|channel>thought\s*<channel\|>")
LONGEST_OPENER = 40
PROBE = "zqxprobe"


@dataclass(frozen=True)
class Conversation:
    """What is judged: the conversation as given, before any rendering."""

    tokenizer: Tokenizer
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    empty_think: str = "mask"

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of `messages` under the conversation's tools and template arguments."""
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=self.tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **(self.template_kwargs or {}),
        )
        return self.as_decoded(text)

    def as_decoded(self, text: str) -> str:
        """`text` as ids decode to it: some tokenizers compose characters (NFC) before they cut."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Truth:
    """What has to be trained for one turn: `full[start:end] + appended`, where start may lie anywhere in a gap of
    whitespace after a masked block."""

    full: str
    first_start: int
    last_start: int
    end: int
    appended: str

    @property
    def trained(self) -> str:
        """The text the model has to write."""
        return self.full[self.last_start : self.end] + self.appended


def turn_truth(conversation: Conversation, index: int) -> Truth:
    """The truth for assistant message `index`, rendered as the last message."""
    messages = conversation.messages
    prompt = conversation.render(messages[:index], generation_prompt=True)
    full = conversation.render(messages[: index + 1])
    twin = _twin(conversation, index)
    first, last = _start(conversation.empty_think, prompt, full, twin)
    end, appended = _end(conversation, index, full, twin)
    return Truth(full, first, last, end, appended)


def _twin(conversation: Conversation, index: int) -> str:
    """The same conversation up to `index` with a harmless answer there, so that odd answers cannot mislead."""
    message = conversation.messages[index]
    if (message.get("content") or "").strip():
        message = {**message, "content": PROBE}
    return conversation.render([*conversation.messages[:index], message])


def _start(empty_think: str, prompt: str, full: str, twin: str) -> tuple[int, int]:
    """Between which two characters the trained text may start: the first after what a server puts in."""
    columns = zip(prompt, full, twin, strict=False)
    base = next((i for i, characters in enumerate(columns) if len(set(characters)) > 1), min(len(prompt), len(full)))
    is_prefix = full.startswith(prompt)
    if not is_prefix or empty_think == "mask":
        for block in EMPTY_REASONING.finditer(full, max(0, base - LONGEST_OPENER)):
            if block.end() > base and not full[base : block.start()].strip():
                return block.end(), len(full) - len(full[block.end() :].lstrip())
    return base, base


def _end(conversation: Conversation, index: int, full: str, twin: str) -> tuple[int, str]:
    """Where the trained text of the last turn ends, and what has to be appended to close it."""
    message, tokenizer = conversation.messages[index], conversation.tokenizer
    special = special_tokens(tokenizer)
    is_plain = PROBE in twin and not message.get("tool_calls")
    tail = twin[twin.rfind(PROBE) + len(PROBE) :] if is_plain else full  # what the template writes after the content
    closed, eos = tail.rstrip(), tokenizer.eos_token
    if closed.endswith(eos):
        before = closed[: -len(eos)]
        if before != before.rstrip() and _ends_in(before.rstrip(), special):
            closed = before.rstrip()  # the EOS of the whole text, after a turn that was already closed
    if _ends_in(closed, special):
        return len(full) - len(tail) + len(closed), ""
    return len(full), _follower_token(conversation, index, special)


def _follower_token(conversation: Conversation, index: int, special: Sequence[str]) -> str:
    """The control token with which the next message starts, right after a turn that nothing closed; or ''."""
    messages = conversation.messages
    turn = {key: value for key, value in messages[index].items() if key != "reasoning_content"}
    follower = messages[index + 1] if index + 1 < len(messages) else {"role": "user", "content": PROBE}
    alone = conversation.render([{"role": "user", "content": PROBE}, turn])
    longer = conversation.render([{"role": "user", "content": PROBE}, turn, follower])
    rest = longer[len(alone) :] if longer.startswith(alone) else ""
    return next((token for token in special if rest.startswith(token)), "")


def _ends_in(text: str, tokens: Sequence[str]) -> bool:
    return text.endswith(tuple(tokens))


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of the added tokens flagged special."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def find_faults(
    conversation: Conversation,
    rows: Sequence[Row],
    *,
    foreign: Sequence[str] = (),
    hostile: bool = False,
    turns: Sequence[int] | None = None,
) -> list[str]:
    """Everything that is wrong with the rows made from one conversation; empty when all is right.

    `foreign`: marker words that only user, system and tool messages contain. `hostile`: the text spells control
    tokens, so ids are compared with transformers' own sanitised encoding. `turns`: which messages have to be trained
    (default: every assistant message), each exactly once over all rows.
    """
    truths = {index: turn_truth(conversation, index) for index in conversation.assistant_turns}
    faults = [
        f"turn {index}: the template never closes it"
        for index, truth in truths.items()
        if not _ends_in(truth.trained, special_tokens(conversation.tokenizer))
    ]
    trained: list[int] = []
    for number, (ids, labels) in enumerate(rows):
        found, problems = _judge_row(conversation, truths, list(ids), list(labels), foreign, hostile)
        trained += found
        faults += [f"row {number}: {problem}" for problem in problems]
    wanted = conversation.assistant_turns if turns is None else list(turns)
    if sorted(trained) != wanted:
        faults.append(f"turns trained: {sorted(trained)}, wanted: {wanted}")
    return faults


def _judge_row(
    conversation: Conversation,
    truths: Mapping[int, Truth],
    ids: list[int],
    labels: list[int],
    foreign: Sequence[str],
    hostile: bool,
) -> tuple[list[int], list[str]]:
    tokenizer = conversation.tokenizer
    text = decode(tokenizer, ids)
    faults = [] if len(ids) == len(labels) else [f"{len(ids)} ids, {len(labels)} labels"]
    if any(label not in (-100, token) for token, label in zip(ids, labels, strict=False)):
        faults.append("a label differs from its input id")
    faults += _judge_ids(conversation, truths, ids, text, hostile)
    spans = trained_spans(labels)
    if not spans:
        faults.append("nothing is trained")
    found = []
    for start, end in spans:
        turn, problem = _judge_span(conversation, truths, ids, start, end)
        found += [turn] if turn is not None else []
        faults += [problem] if problem else []
        piece = decode(tokenizer, ids[start:end])
        faults += [f"trained text contains {word!r}" for word in foreign if word in piece]
    return found, faults


def _judge_ids(
    conversation: Conversation, truths: Mapping[int, Truth], ids: list[int], text: str, hostile: bool
) -> list[str]:
    tokenizer = conversation.tokenizer
    last = next((index for index, truth in truths.items() if text in (truth.full, truth.full + truth.appended)), None)
    if last is None:
        return [f"ids decode to no prefix of the conversation: {text[-80:]!r}"]
    if hostile:
        expected = tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages[: last + 1]],
            tools=conversation.tools,
            sanitize_control_tokens=True,
            return_dict=False,
            **(conversation.template_kwargs or {}),
        )
        if text != truths[last].full:
            expected = [*expected, tokenizer.convert_tokens_to_ids(truths[last].appended)]
    else:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    faults = [] if ids == list(expected) else ["ids differ from the tokenizer's own for this text"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids.count(bos) > 1:
        faults.append(f"{ids.count(bos)} BOS tokens")
    return faults


def _judge_span(
    conversation: Conversation, truths: Mapping[int, Truth], ids: list[int], start: int, end: int
) -> tuple[int | None, str]:
    tokenizer = conversation.tokenizer
    before, piece = decode(tokenizer, ids[:start]), decode(tokenizer, ids[start:end])
    place = len(before)
    for index, truth in truths.items():
        if not truth.full.startswith(before):
            continue
        previous = len(decode(tokenizer, ids[: start - 1]))
        crosses = previous < truth.first_start and not truth.full[truth.last_start : place].strip()
        if not (truth.first_start <= place <= truth.last_start or (place > truth.last_start and crosses)):
            continue
        expected = truth.full[place : truth.end] + truth.appended
        content = conversation.as_decoded((conversation.messages[index].get("content") or "").strip())
        if piece != expected:
            return index, f"turn {index}: trained {piece!r}, expected {expected!r}"
        if content not in truth.full[truth.first_start :]:
            return index, f"turn {index}: the template drops the content, yet the turn is trained"
        return index, ""
    return None, f"a span starts where no generation prompt ends: {before[-40:]!r} | {piece[:40]!r}"


def trained_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open token ranges of neighbouring trained positions."""
    padded = [-100, *labels, -100]
    starts = [i for i in range(1, len(padded)) if padded[i] != -100 and padded[i - 1] == -100]
    ends = [i for i in range(1, len(padded)) if padded[i] == -100 and padded[i - 1] != -100]
    return [(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)]


def trained_texts(tokenizer: Tokenizer, row: Row) -> list[str]:
    """The trained text of one row, span by span."""
    ids, labels = row
    return [decode(tokenizer, ids[start:end]) for start, end in trained_spans(labels)]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Ids as text, control tokens included, nothing tidied."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
