"""The label contract on templates that TRL does not ship: each of its templates, changed in one way or two."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.conversations import FOREIGN, KINDS, generate
from tests.data.label_oracle import Conversation, judge, special_tokens
from tests.data.template_tokenizers import template_names
from tests.data.template_variants import LLAMA3_FIRST_NAME, VARIANTS, make_variant, original

# Given text they raise or leave it out.
NO_TEXT = ("idefics3", "llava_next", "smolvlm")
NAMES = [LLAMA3_FIRST_NAME, *(name for name in template_names() if not name.startswith(NO_TEXT))]

# A turn of GLM-4 ends in the token with which the next role begins. A template that always writes the assistant's
# there leaves no place for the one that the model has to write.
MAY_BE_REFUSED = {
    ("glm4moe", "always_opens"),
    ("glm4moe", "always_opens+no_gap"),
    ("glm4moe", "always_opens+shared_suffix"),
    ("glm4moe_training", "always_opens"),
    ("glm4moe_training", "always_opens+no_gap"),
    ("glm4moe_training", "always_opens+shared_suffix"),
}


def faults(name: str, variant: str, seeds: Iterable[int]) -> list[str]:
    """What is wrong with the labels of generated conversations under a variant; skips where there is none."""
    made = make_variant(name, variant)
    if made is None:
        pytest.skip("the change has no effect on this template")
    try:
        renderer = attach_chat_template(made.fresh(), TemplateSettings())
        labeller = Labeller(renderer, LabelSettings(max_length=None))
    except CheckFailed as refusal:
        return [] if (name, variant) in MAY_BE_REFUSED else [f"refused: {refusal}"]
    tokens = special_tokens(original(name))
    # Renamed tokens are not those of the template that the truth comes from.
    kinds = [kind for kind in KINDS if kind != "hostile" or "shared_suffix" not in variant]
    conversations = [generate(kind, seed, tokens) for kind in kinds for seed in seeds]
    batch = labeller.label(
        [Example(one.messages, one.kind, index) for index, one in enumerate(conversations)]
    )
    tokenizer = made.fresh()
    found = []
    for index, one in enumerate(conversations):
        conversation = Conversation(tokenizer, one.messages, reference=made.reference)
        rows = [(row.input_ids, row.labels) for row in batch.rows if row.example == index]
        dropped = [f"{row.reason}: {row.detail}" for row in batch.dropped if row.example == index]
        verdict = judge(conversation, rows, dropped, FOREIGN)
        found += [f"{one.kind} {index}: {fault}" for fault in verdict.wrong]
        found += [f"{one.kind} {index}: dropped without need: {turn}" for turn in verdict.needless]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_template_trains_what_the_original_trains(name: str, variant: str) -> None:
    """Whatever surrounds the turns, each is trained from its generation prompt to its own terminator, no further."""
    assert faults(name, variant, [0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_template_on_many_conversations(name: str, variant: str) -> None:
    """The same property on more conversations."""
    assert faults(name, variant, range(1, 8)) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_most_templates_have_the_variant(variant: str) -> None:
    """The sweep is not empty: a change that takes effect nowhere would test nothing."""
    effective = [name for name in NAMES if make_variant(name, variant) is not None]
    assert len(effective) > len(NAMES) / 2
