"""Hostile conversations: every row that is made of them is right, and none is dropped that could be trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.hostile import Message, as_the_template_takes_it, hostile_conversation
from tests.data.label_oracle import (
    Conversation,
    Tokenizer,
    decode,
    judge,
    special_tokens,
    trained_spans,
)
from tests.data.template_tokenizers import template_names, tokenizer_for

# Given text they raise or leave it out.
NO_TEXT = ("idefics3", "llava_next", "smolvlm")
# They raise on a system message.
NO_SYSTEM = ("gemma", "gemma_training")
NAMES = [name for name in template_names() if not name.startswith(NO_TEXT)]

FAST_SEEDS = 5
SLOW_CONVERSATIONS = 10_000


@dataclass
class Tally:
    """What became of many conversations."""

    turns: int = 0
    wrong: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        dropped = self.excused.total()
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.excused.most_common())
        counts = f"{self.turns} turns, {len(self.wrong)} faults, {len(self.needless)} dropped without need"
        return f"{counts}, {dropped} dropped for a reason ({dropped / max(1, self.turns):.2%}): {reasons}"


@cache
def labeller_for(name: str) -> Labeller:
    """A labeller on its own tokenizer; the oracle judges with another one."""
    return Labeller(
        attach_chat_template(tokenizer_for(name), TemplateSettings()),
        LabelSettings(max_length=None),
    )


@cache
def pristine(name: str) -> Tokenizer:
    """The tokenizer that the oracle uses."""
    return tokenizer_for(name)


def label_one(
    labeller: Labeller, messages: Sequence[Message], index: int
) -> tuple[LabelledBatch, str]:
    """The batch of one conversation, and why it was refused where it was."""
    try:
        return labeller.label([Example(messages, "hostile", index)]), ""
    except InputError as refusal:
        return LabelledBatch(), str(refusal)


def tally(
    tokenizer: Tokenizer,
    labeller: Labeller,
    conversations: Iterable[Sequence[Message]],
    name: str,
    into: Tally,
) -> None:
    """Label and judge conversations one by one."""
    for index, messages in enumerate(conversations):
        batch, refusal = label_one(labeller, messages, index)
        taken = as_the_template_takes_it(messages, tokenizer)
        rows = [(row.input_ids, row.labels) for row in batch.rows]
        dropped = [f"{row.reason}: {row.detail}" for row in batch.dropped]
        if refusal:
            dropped.append(refusal)
        verdict = judge(Conversation(tokenizer, taken), rows, dropped)
        into.turns += sum(message["role"] == "assistant" for message in messages)
        into.wrong += [f"{name} {index}: {fault}" for fault in verdict.wrong]
        into.needless += [f"{name} {index}: {turn}" for turn in verdict.needless]
        into.excused.update(verdict.excused)


def conversations_for(name: str, tokenizer: Tokenizer, seeds: Iterable[int]) -> list[list[Message]]:
    """Hostile conversations that spell the tokenizer's own control tokens."""
    tokens = special_tokens(tokenizer)
    return [
        hostile_conversation(f"{name}-{seed}", tokens, system=name not in NO_SYSTEM)
        for seed in seeds
    ]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_conversations_are_trained_right(name: str) -> None:
    """No text makes a label wrong, and no text that the template keeps makes a turn vanish."""
    tokenizer, found = pristine(name), Tally()
    tally(
        tokenizer,
        labeller_for(name),
        conversations_for(name, tokenizer, range(FAST_SEEDS)),
        name,
        found,
    )
    assert (found.wrong, found.needless) == ([], [])


@pytest.mark.slow
def test_ten_thousand_hostile_conversations() -> None:
    """The same over all templates; what had to be dropped is printed with its reasons."""
    each = -(-SLOW_CONVERSATIONS // len(NAMES))
    total = Tally()
    for name in NAMES:
        tokenizer = pristine(name)
        seeds = range(FAST_SEEDS, FAST_SEEDS + each)
        tally(tokenizer, labeller_for(name), conversations_for(name, tokenizer, seeds), name, total)
    print(total)
    print("\n".join([*total.wrong[:40], *total.needless[:40]]))
    assert (len(total.wrong), len(total.needless)) == (0, 0), str(total)


def test_the_generator_makes_what_it_promises() -> None:
    """The sweep meets answers that begin with whitespace, spelled control tokens and private characters."""
    made = [hostile_conversation(seed, ["<|im_end|>"]) for seed in range(300)]
    answers = [
        message["content"]
        for messages in made
        for message in messages
        if message["role"] == "assistant"
    ]
    assert {len(messages) for messages in made} >= {2, 4, 6, 8, 10, 12}
    assert all(answer.strip() for answer in answers)
    for needle in ("<|im_end|>", "\uf5e0", "\u2028", "</think>", "cafe\u0301"):
        assert any(needle in answer for answer in answers)
    assert sum(answer[0].isspace() for answer in answers) > len(answers) / 5


def without(values: list[int], index: int) -> list[int]:
    """The list without one element."""
    return [*values[:index], *values[index + 1 :]]


def planted(
    tokenizer: Tokenizer, ids: list[int], labels: list[int]
) -> dict[str, tuple[list[int], list[int]]]:
    """A right row with one fault each."""
    start, end = trained_spans(labels)[-1]
    faulty = {
        "first id missing": (ids[1:], labels[1:]),
        "first id twice": ([ids[0], *ids], [labels[0], *labels]),
        "an id of the prompt missing": (without(ids, start - 1), without(labels, start - 1)),
        "terminator untrained": (ids, [*labels[: end - 1], -100, *labels[end:]]),
        "terminator twice": (
            [*ids[:end], ids[end - 1], *ids[end:]],
            [*labels[:end], ids[end - 1], *labels[end:]],
        ),
        "nothing trained": (ids, [-100] * len(ids)),
        "labels one place late": (ids, [-100, *labels[:-1]]),
    }
    # Where whitespace follows a masked block the trained text may start on either side of it.
    if not decode(tokenizer, ids[start : start + 1]).isspace():
        faulty["first token untrained"] = (ids, [*labels[:start], -100, *labels[start + 1 :]])
    if not decode(tokenizer, ids[start - 1 : start]).isspace():
        faulty["header trained"] = (
            ids,
            [*labels[: start - 1], *ids[start - 1 : start], *labels[start:]],
        )
    if end < len(ids):
        faulty["trained past the terminator"] = (ids, [*labels[:end], ids[end], *labels[end + 1 :]])
        faulty["cut after the terminator"] = (ids[:end], labels[:end])
    return faulty


@pytest.mark.parametrize(
    "name", ["llama3", "phi3", "qwen3", "gemma3", "cohere2", "deepseekv3", "glm4moe", "gptoss"]
)
def test_the_oracle_finds_a_fault_planted_in_a_hostile_row(name: str) -> None:
    """No fault hides behind the liberties that the oracle grants to hostile texts."""
    tokenizer, labeller = pristine(name), labeller_for(name)
    for messages in conversations_for(name, tokenizer, range(4)):
        batch, _ = label_one(labeller, messages, 0)
        rows = [(row.input_ids, row.labels) for row in batch.rows]
        conversation = Conversation(tokenizer, as_the_template_takes_it(messages, tokenizer))
        assert judge(conversation, rows, ["dropped"]).wrong == []
        for fault, row in planted(tokenizer, *rows[-1]).items():
            assert judge(conversation, [*rows[:-1], row], ["dropped"]).wrong != [], (
                f"{fault}: {messages}"
            )
