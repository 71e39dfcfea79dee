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
from tests.data.label_oracle import Conversation, Tokenizer, judge, special_tokens
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
    return Labeller(attach_chat_template(tokenizer_for(name), TemplateSettings()), LabelSettings(max_length=None))


@cache
def pristine(name: str) -> Tokenizer:
    """The tokenizer that the oracle uses."""
    return tokenizer_for(name)


def label_one(labeller: Labeller, messages: Sequence[Message], index: int) -> tuple[LabelledBatch, str]:
    """The batch of one conversation, and why it was refused where it was."""
    try:
        return labeller.label([Example(messages, "hostile", index)]), ""
    except InputError as refusal:
        return LabelledBatch(), str(refusal)


def tally(
    tokenizer: Tokenizer, labeller: Labeller, conversations: Iterable[Sequence[Message]], name: str, into: Tally
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
    return [hostile_conversation(f"{name}-{seed}", tokens, system=name not in NO_SYSTEM) for seed in seeds]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_conversations_are_trained_right(name: str) -> None:
    """No text makes a label wrong, and no text that the template keeps makes a turn vanish."""
    tokenizer, found = pristine(name), Tally()
    tally(tokenizer, labeller_for(name), conversations_for(name, tokenizer, range(FAST_SEEDS)), name, found)
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
    """The sweep meets answers that begin with whitespace, spelled control tokens, private characters and one turn only."""
    made = [hostile_conversation(seed, ["<|im_end|>"]) for seed in range(300)]
    answers = [message["content"] for messages in made for message in messages if message["role"] == "assistant"]
    assert {len(messages) for messages in made} >= {2, 4, 6, 8, 10, 12}
    assert all(answer.strip() for answer in answers)
    for needle in ("<|im_end|>", "\uf5e0", "\u2028", "</think>", "cafe\u0301"):
        assert any(needle in answer for answer in answers)
    assert sum(answer[0].isspace() for answer in answers) > len(answers) / 5
