"""An independent judge of labels, by teacher forcing.

It renders with `tokenizer.apply_chat_template`, encodes with the tokenizer, and shares no code with what it judges. For
every row it asks: are these the ids that a server and its model would have between them (those of the generation
prompt as the server encodes it, then those of the answer)? For every trained span: do exactly the ids of the generation
prompt stand before it, and is it exactly what the model then has to write, up to and including one terminator?

Places in a text are turned into places among the ids by encoding the text up to there, never by offsets and never by
decoding: tokenizers of the SentencePiece kind do not decode to the text that they were given.

Text of a message that spells a control token is marked before rendering and encoded as transformers'
`sanitize_control_tokens=True` does it, with transformers' own functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

Message = Mapping[str, Any]
Row = tuple[Sequence[int], Sequence[int]]
Tokenizer = Any  # transformers types its answers as unions over all options

IGNORED = -100
EMPTY_REASONING = re.compile(r"<think>\s*</think>|<\|channel>thought\s*<channel\|>")
THINK_TAGS = re.compile(r"</?think>")
LONGEST_OPENER = 40
PROBE = "zqxprobe"

# transformers puts these around text that spells a control token.
MARKERS = re.compile("[\U000f0000\U000f0001]")

# What may stand before a continuation without joining it: the ids of the rest are then the same after each.
NEUTRAL_CONTEXTS = ("a", "\n", "é", "a\n", ")", "1")


@dataclass(frozen=True)
class Reference:
    """Where the truth of a changed template comes from: the template that it was made of.

    `rewrite` makes the changed template's text from the original's. `always_opens`: the changed template writes the
    generation prompt whether it is asked to or not.
    """

    tokenizer: Tokenizer
    rewrite: Callable[[str], str]
    always_opens: bool = False


@dataclass(frozen=True)
class Conversation:
    """What is judged: the conversation as given, before any rendering."""

    tokenizer: Tokenizer
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    empty_think: str = "mask"
    reference: Reference | None = None
    known_ids: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of `messages`, spelled control tokens between markers."""
        template = self.tokenizer.get_chat_template(None, self.tools)
        control_tokens = self.tokenizer._get_control_tokens(template)
        pattern, _ = _get_control_token_patterns(control_tokens)
        return self.tokenizer.apply_chat_template(
            mark_control_tokens([dict(message) for message in messages], pattern),
            tools=mark_control_tokens(self.tools, pattern),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **(self.template_kwargs or {}),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text as a server makes them: no token that the text does not have."""
        if text not in self.known_ids:
            options = {"sanitize_control_tokens": True} if MARKERS.search(text) else {}
            self.known_ids[text] = self.tokenizer(text, add_special_tokens=False, **options)[
                "input_ids"
            ]
        return self.known_ids[text]

    def continuations(self, text: str) -> list[list[int]]:
        """Ids of a text that goes on where another ended: what it has after every context that it does not join."""
        found: list[list[int]] = []
        for context in NEUTRAL_CONTEXTS:
            before = self.encode(context)
            both = self.encode(context + text)
            if both[: len(before)] == before and both[len(before) :] not in found:
                found.append(both[len(before) :])
        return found

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant messages."""
        return [
            index for index, message in enumerate(self.messages) if message["role"] == "assistant"
        ]


@dataclass(frozen=True)
class Truth:
    """What has to be trained for one turn: `text[start:end]`, where start may lie anywhere in a gap of whitespace after
    a masked block. `text` is the row that ends with the turn; `closing` is the part of it that the template left out.
    """

    prompt: str
    text: str
    first_start: int
    last_start: int
    end: int
    closing: str

    @property
    def trained(self) -> str:
        """The text the model has to write."""
        return self.text[self.last_start : self.end]

    @property
    def continues_prompt(self) -> bool:
        """Whether the row begins with its generation prompt; it does not where that opens a think block."""
        return self.text.startswith(self.prompt)

    @property
    def starts_at_prompt(self) -> bool:
        """Whether the first trained character is the first after the generation prompt."""
        return self.continues_prompt and self.first_start == self.last_start == len(self.prompt)


def turn_truth(conversation: Conversation, index: int) -> Truth:
    """The truth for assistant message `index`, rendered as the last message."""
    if conversation.reference is not None:
        return _rewritten_truth(conversation, conversation.reference, index)
    messages = conversation.messages
    prompt = conversation.render(messages[:index], generation_prompt=True)
    full = conversation.render(messages[: index + 1])
    twin = _twin(conversation, index)
    end, closing = _end(conversation, index, full, twin)
    if is_served_otherwise(conversation, index) and PROBE in twin:
        answer = twin.rfind(PROBE)
        text = prompt + full[answer:] + closing
        return Truth(
            prompt,
            text,
            len(prompt),
            len(prompt),
            len(prompt) + end - answer + len(closing),
            closing,
        )
    first, last = _start(conversation.empty_think, prompt, full, twin)
    return Truth(prompt, full + closing, first, last, end + len(closing), closing)


def is_served_otherwise(conversation: Conversation, index: int) -> bool:
    """Whether the messages before a turn render differently once the turn follows: Mistral's template writes the system
    message only into a question that nobody has answered yet. What can be trained then is the answer after the prompt
    as it is served; a turn that is dropped for it is dropped for a reason.
    """
    messages = conversation.messages
    asked = conversation.render(messages[:index])
    prompt = conversation.render(messages[:index], generation_prompt=True)
    full = conversation.render(messages[: index + 1])
    return _shared(prompt, full) < _shared(prompt, asked)


def _rewritten_truth(conversation: Conversation, reference: Reference, index: int) -> Truth:
    """The truth under the original template, carried over into the text of the changed one."""
    original = replace(conversation, tokenizer=reference.tokenizer, reference=None, known_ids={})
    truth = turn_truth(original, index)
    messages = conversation.messages[: index + 1]
    text, end = truth.text, truth.end
    # A turn that the next role's token ends: what the template opens there stands in that token's place.
    if reference.always_opens and not truth.closing:
        text = original.render(messages, generation_prompt=True)
        if not text.startswith(truth.text[: truth.end]):
            end = _end_before_opening(original, index, text)
    if not truth.closing:
        changed = conversation.render(messages)
        assert reference.rewrite(text) == changed, "the changed template renders something else"

    def carried(place: int) -> int:
        return len(reference.rewrite(text[:place]))

    return Truth(
        reference.rewrite(truth.prompt),
        reference.rewrite(text),
        carried(truth.first_start),
        carried(truth.last_start),
        carried(end),
        reference.rewrite(truth.closing),
    )


def _end_before_opening(conversation: Conversation, index: int, text: str) -> int:
    """Where a turn ends in `text`, which goes on with a generation prompt: after its first run of special tokens."""
    special = special_tokens(conversation.tokenizer)
    probe = {**conversation.messages[index], "content": PROBE}
    twin = conversation.render([*conversation.messages[:index], probe], generation_prompt=True)
    tail = twin[twin.rfind(PROBE) + len(PROBE) :]
    return (
        len(text)
        - len(tail)
        + _end_of_first_run(tail, special, _opening_tokens(conversation, special))
    )


def _twin(conversation: Conversation, index: int) -> str:
    """The same conversation up to `index` with a harmless answer there, so that odd answers cannot mislead."""
    message = conversation.messages[index]
    if (message.get("content") or "").strip():
        message = {**message, "content": PROBE}
    return conversation.render([*conversation.messages[:index], message])


def _start(empty_think: str, prompt: str, full: str, twin: str) -> tuple[int, int]:
    """Between which two characters the trained text may start: the first after what a server puts in."""
    base = min(len(prompt), len(full))
    for place, characters in enumerate(zip(prompt, full, twin, strict=False)):
        if len(set(characters)) > 1:
            base = place
            break
    if full.startswith(prompt):
        base = len(prompt)
    if not full.startswith(prompt) or empty_think == "mask":
        for block in EMPTY_REASONING.finditer(full, max(0, base - LONGEST_OPENER)):
            # A block that the twin lacks was written by the answer, not by the template.
            is_injected = twin.startswith(full[: block.end()])
            if is_injected and block.end() > base and not full[base : block.start()].strip():
                return block.end(), len(full) - len(full[block.end() :].lstrip())
    return base, base


def _end(conversation: Conversation, index: int, full: str, twin: str) -> tuple[int, str]:
    """Where the trained text of the last turn ends, and what has to be appended to close it."""
    message, tokenizer = conversation.messages[index], conversation.tokenizer
    special = special_tokens(tokenizer)
    is_plain = PROBE in twin and not message.get("tool_calls")
    tail = full
    if is_plain:
        tail = twin[twin.rfind(PROBE) + len(PROBE) :]  # what the template writes after the content
    if is_plain and _ignores_the_flag(conversation):
        own_end = _end_of_first_run(tail, special, _opening_tokens(conversation, special))
        if own_end:
            return len(full) - len(tail) + own_end, ""
    closed, eos = tail.rstrip(), tokenizer.eos_token
    if closed.endswith(eos):
        before = closed[: -len(eos)]
        if before != before.rstrip() and _ends_in(before.rstrip(), special):
            closed = (
                before.rstrip()
            )  # the EOS of the whole text, after a turn that was already closed
    if _ends_in(closed, special):
        return len(full) - len(tail) + len(closed), ""
    return len(full), _follower_token(conversation, index, special)


def _ignores_the_flag(conversation: Conversation) -> bool:
    """Whether the template writes the same with and without `add_generation_prompt`."""
    asked = [{"role": "user", "content": PROBE}]
    return conversation.render(asked) == conversation.render(asked, generation_prompt=True)


def _opening_tokens(conversation: Conversation, special: Sequence[str]) -> set[str]:
    """Special tokens that stand before the first message: they open turns and end none."""
    before, _, _ = conversation.render([{"role": "user", "content": PROBE}]).partition(PROBE)
    return {token for token in special if token in before}


def _end_of_first_run(tail: str, special: Sequence[str], opening: set[str]) -> int:
    """Where the first special token ends, with those right after it that open no turn; 0 where there is none."""
    tokens = re.compile(
        "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    )
    end = 0
    for match in tokens.finditer(tail):
        if end and (match.start() != end or match.group() in opening):
            break
        end = match.end()
    return end


def _follower_token(conversation: Conversation, index: int, special: Sequence[str]) -> str:
    """The control token with which the next message starts, right after a turn that nothing closed; or ''."""
    messages = conversation.messages
    turn = {key: value for key, value in messages[index].items() if key != "reasoning_content"}
    if not turn.get("tool_calls"):
        turn["content"] = PROBE
    follower = (
        messages[index + 1] if index + 1 < len(messages) else {"role": "user", "content": PROBE}
    )
    alone = conversation.render([{"role": "user", "content": PROBE}, turn])
    longer = conversation.render([{"role": "user", "content": PROBE}, turn, follower])
    rest = longer[len(alone) :] if longer.startswith(alone) else ""
    return next((token for token in special if rest.startswith(token)), "")


def _ends_in(text: str, tokens: Sequence[str]) -> bool:
    return text.endswith(tuple(tokens))


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of the added tokens flagged special."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def holds_answer(truth: Truth, message: Message) -> bool:
    """Whether the content stands in what is trained. Trimming is allowed; so is a template that lays out a reasoning
    block in its own way or leaves it out, as long as something is left.
    """
    answer = _reasoning_and_answer(message)[-1].strip()
    return keeps_everything(truth, message) or (answer != "" and answer in _shown(truth))


def keeps_everything(truth: Truth, message: Message) -> bool:
    """Whether all of the content stands in what is trained, think tags aside."""
    shown = _shown(truth)
    return all(part.strip() in shown for part in _reasoning_and_answer(message))


def _shown(truth: Truth) -> str:
    return MARKERS.sub("", truth.text[truth.first_start :])


def _reasoning_and_answer(message: Message) -> list[str]:
    return THINK_TAGS.split(message.get("content") or "")


def find_faults(
    conversation: Conversation,
    rows: Sequence[Row],
    *,
    foreign: Sequence[str] = (),
    turns: Sequence[int] | None = None,
) -> list[str]:
    """Everything that is wrong with the rows made from one conversation; empty when all is right.

    `foreign`: marker words that only user, system and tool messages contain. `turns`: which messages have to be
    trained (default: every assistant message), each exactly once over all rows.
    """
    truths = {index: turn_truth(conversation, index) for index in conversation.assistant_turns}
    faults = [
        f"turn {index}: the template never closes it"
        for index, truth in truths.items()
        if not _ends_in(truth.trained, special_tokens(conversation.tokenizer))
    ]
    trained, problems = _judge_rows(conversation, truths, rows, foreign)
    faults += problems
    wanted = conversation.assistant_turns if turns is None else list(turns)
    if sorted(trained) != wanted:
        faults.append(f"turns trained: {sorted(trained)}, wanted: {wanted}")
    return faults


@dataclass(frozen=True)
class Verdict:
    """What became of one conversation. `wrong`: faults of its rows, and turns that vanished without a word; `needless`:
    turns that were dropped though they can be trained; `excused`: turns that were dropped, and why they had to be.
    """

    wrong: list[str]
    needless: list[str]
    excused: list[str]


def judge(
    conversation: Conversation,
    rows: Sequence[Row],
    dropped: Sequence[str],
    foreign: Sequence[str] = (),
) -> Verdict:
    """Judge the rows of one conversation and what was said about turns that are in none of them."""
    excuses = {turn: excuse(conversation, turn) for turn in conversation.assistant_turns}
    truths = {
        turn: turn_truth(conversation, turn)
        for turn, reason in excuses.items()
        if not reason.startswith("refused")
    }
    trained, wrong = _judge_rows(conversation, truths, rows, foreign)
    if len(set(trained)) != len(trained):
        wrong.append(f"a turn is trained twice: {sorted(trained)}")
    missing = [turn for turn in conversation.assistant_turns if turn not in trained]
    if missing and not dropped and not wrong:
        wrong.append(f"turns {missing} vanished without a word")
    needless = [
        f"turn {turn} ({'; '.join(dropped)})" for turn in missing if not excuses[turn] and not wrong
    ]
    excused = [excuses[turn] for turn in missing if excuses[turn]]
    return Verdict(wrong, needless, excused)


def _judge_rows(
    conversation: Conversation,
    truths: Mapping[int, Truth],
    rows: Sequence[Row],
    foreign: Sequence[str],
) -> tuple[list[int], list[str]]:
    """The turns that the rows train, and their faults."""
    trained: list[int] = []
    faults: list[str] = []
    for number, (ids, labels) in enumerate(rows):
        found, problems = _judge_row(conversation, truths, list(ids), list(labels), foreign)
        trained += found
        faults += [f"row {number}: {problem}" for problem in problems]
    return trained, faults


def _judge_row(
    conversation: Conversation,
    truths: Mapping[int, Truth],
    ids: list[int],
    labels: list[int],
    foreign: Sequence[str],
) -> tuple[list[int], list[str]]:
    faults = []
    if len(ids) != len(labels):
        faults.append(f"{len(ids)} ids, {len(labels)} labels")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=False)):
        faults.append("a label differs from its input id")
    last = next(
        (index for index, truth in truths.items() if ids in served_ids(conversation, truth)), None
    )
    if last is None:
        return [], [*faults, _nearest(conversation, truths, ids)]
    spans = trained_spans(labels)
    if not spans:
        faults.append("nothing is trained")
    found = []
    for start, end in spans:
        turn, problem = _judge_span(conversation, truths, last, ids, start, end)
        if turn is not None:
            found.append(turn)
        if problem:
            faults.append(problem)
        piece = decode(conversation.tokenizer, ids[start:end])
        faults += [f"trained text contains {word!r}" for word in foreign if word in piece]
    if found and max(found) != last:
        faults.append(f"the row ends with turn {last}, which it does not train")
    return found, faults


def served_ids(conversation: Conversation, truth: Truth) -> list[list[int]]:
    """The ids that the row of a turn may have: the tokenizer's own for the whole text, except where a token would join
    the generation prompt and the answer. The prompt is then encoded alone, as it is served, and the answer goes on.

    Where a masked block follows the prompt nothing is trained at the joint, so that both are right.
    """
    whole = conversation.encode(truth.text)
    if not is_joined(conversation, truth):
        return [whole]
    prompt = conversation.encode(truth.prompt)
    answer = truth.text[len(truth.prompt) :]
    split = [prompt + rest for rest in conversation.continuations(answer)]
    return split if truth.starts_at_prompt else [whole, *split]


def is_joined(conversation: Conversation, truth: Truth) -> bool:
    """Whether the tokenizer joins the end of the generation prompt with the answer."""
    prompt = conversation.encode(truth.prompt)
    return truth.continues_prompt and conversation.encode(truth.text)[: len(prompt)] != prompt


def _nearest(conversation: Conversation, truths: Mapping[int, Truth], ids: list[int]) -> str:
    """How the ids differ from those of the turn that they have most in common with."""
    best, wanted = -1, []
    for truth in truths.values():
        for candidate in served_ids(conversation, truth):
            shared = _shared(ids, candidate)
            if (shared, -len(candidate)) > (best, -len(wanted)):
                best, wanted = shared, candidate
    tokens = conversation.tokenizer.convert_ids_to_tokens
    given, right = tokens(ids[best : best + 8]), tokens(wanted[best : best + 8])
    return f"ids are not those of any turn: from token {best} on {given}, served {right}"


def _shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many characters or ids both begin with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _judge_span(
    conversation: Conversation,
    truths: Mapping[int, Truth],
    last: int,
    ids: list[int],
    start: int,
    end: int,
) -> tuple[int | None, str]:
    tokenizer = conversation.tokenizer
    for index, truth in truths.items():
        if not truths[last].text.startswith(truth.text[: truth.end]):
            continue
        if start not in _start_positions(conversation, truth, ids):
            continue
        if end != _position(conversation, truth, ids, truth.end):
            piece = decode(tokenizer, ids[start:end])
            return index, f"turn {index}: trained {piece!r}, expected {truth.trained!r}"
        if not holds_answer(truth, conversation.messages[index]):
            return index, f"turn {index}: the template drops the content, yet the turn is trained"
        return index, ""
    before, piece = decode(tokenizer, ids[:start]), decode(tokenizer, ids[start:end])
    return None, f"a span starts where no generation prompt ends: {before[-40:]!r} | {piece[:40]!r}"


def _start_positions(conversation: Conversation, truth: Truth, ids: list[int]) -> set[int]:
    """Among the ids, where the trained part of the turn may start."""
    if truth.starts_at_prompt:
        prompt = conversation.encode(truth.prompt)
        return {len(prompt)} if ids[: len(prompt)] == prompt else set()
    found = set()
    for place in range(truth.first_start, truth.last_start + 1):
        position = _position(conversation, truth, ids, place)
        if position is not None:
            found.add(position)
    place = truth.last_start + 1
    # One token may cover the end of a masked block and whitespace with which the answer begins.
    while not found and place < truth.end and truth.text[truth.last_start : place].isspace():
        position = _position(conversation, truth, ids, place)
        if position is not None:
            found.add(position)
        place += 1
    return found


def _position(conversation: Conversation, truth: Truth, ids: list[int], place: int) -> int | None:
    """How many ids stand for `text[:place]`, or None where no token ends there."""
    candidates = [conversation.encode(truth.text[:place])]
    if truth.continues_prompt and place > len(truth.prompt):
        prompt = conversation.encode(truth.prompt)
        answer = truth.text[len(truth.prompt) : place]
        candidates += [prompt + rest for rest in conversation.continuations(answer)]
    return next((len(one) for one in candidates if ids[: len(one)] == one), None)


def excuse(conversation: Conversation, turn: int) -> str:
    """Why a turn may be dropped, found without the product: or '' where it has to be trained."""
    try:
        truth = turn_truth(conversation, turn)
        served_ids(conversation, truth)
        if is_served_otherwise(conversation, turn):
            return "the template renders the question otherwise once it is answered"
    except Exception as error:  # noqa: BLE001  a template raises what it likes
        return f"refused by the template or tokenizer: {type(error).__name__}"
    if (conversation.messages[turn].get("content") or "").strip() not in _shown(truth):
        return "the template rewrites the answer"
    if not _ends_in(truth.trained, special_tokens(conversation.tokenizer)):
        return "the template never closes the turn"
    return ""


def trained_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open token ranges of neighbouring trained positions."""
    padded = [IGNORED, *labels, IGNORED]
    starts = [i for i in range(1, len(padded)) if padded[i] != IGNORED and padded[i - 1] == IGNORED]
    ends = [i for i in range(1, len(padded)) if padded[i] == IGNORED and padded[i - 1] != IGNORED]
    return [(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)]


def trained_texts(tokenizer: Tokenizer, row: Row) -> list[str]:
    """The trained text of one row, span by span."""
    ids, labels = row
    return [decode(tokenizer, ids[start:end]) for start, end in trained_spans(labels)]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Ids as text, control tokens included, nothing tidied."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
