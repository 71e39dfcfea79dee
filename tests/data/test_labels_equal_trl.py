"""Our labels against TRL's own assistant masks, on every template for which TRL has `{% generation %}` markers.

Where the two differ, the difference is policy, is written down in DIFFERENCES, and is asserted to be exactly that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from trl.chat_template_utils import has_generation_markers

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.conversations import generate
from tests.data.label_oracle import trained_spans, trained_texts
from tests.data.template_tokenizers import read_template, template_names, tokenizer_for

REFUSED = (
    "idefics3_training",
    "llava_next_training",
    "smolvlm_training",
)  # no text content, see the template tests
TEMPLATES = [
    name
    for name in template_names()
    if has_generation_markers(read_template(name)) and name not in REFUSED
]


@dataclass(frozen=True)
class Difference:
    """Text that TRL trains and we do not: before each answer, after each, and after the last one instead."""

    before: str = ""
    after: str = ""
    after_last: str | None = None


NEWLINE = Difference(after="\n")  # the line break that the template writes after the terminator
THINK = Difference(
    before="<think>\n\n</think>\n\n", after="\n"
)  # and an empty reasoning block (empty_think: mask)
DIFFERENCES: dict[str, Difference] = {
    "deepseek_r1_distill_training": Difference(
        before="<｜Assistant｜>"
    ),  # the header, as think is opened after it
    "deepseekv3_training": Difference(before="<｜Assistant｜>"),
    "glm4moe_training": Difference(before="\n<think></think>\n"),
    "gptoss_training": Difference(before="<|start|>assistant"),  # the whole header
    "muse_glimmer_training": Difference(before="<|start|>assistant"),
    "qwen2_5_training": Difference(before="\n", after="\n"),  # the line break of the header
    **dict.fromkeys(
        ("phi3_training", "phi3_5_training"), Difference(after="\n", after_last="\n<|endoftext|>")
    ),
    **{
        name: NEWLINE for name in TEMPLATES if name.startswith(("gemma", "diffusion_gemma", "lfm2"))
    },
    **dict.fromkeys(
        ("qwen2_5_vl_training", "qwen3_instruct_2507_training", "qwen3_vl_training"), NEWLINE
    ),
    **{
        name: replace(THINK, before="<think></think>")
        for name in TEMPLATES
        if name.startswith("nemotron")
    },
    **{
        name: THINK
        for name in TEMPLATES
        if name.startswith(("qwen3_5", "qwen3_6", "qwen3_8", "qwen3_training"))
    },
}
EQUAL = {"cohere_training", "cohere2_training", "llama3_training"}

# Earlier turns end in <|end|>, the last in <|return|>, so each turn is a row of its own here and TRL has one row.
EXPANDED = ("gptoss_training",)


def test_the_table_names_every_template() -> None:
    """No template is left out, and none is listed twice."""
    assert sorted([*DIFFERENCES, *EQUAL]) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_trls_apart_from_the_named_difference(name: str) -> None:
    """Same ids, same number of spans, and TRL's text is ours plus exactly what the table says."""
    tokenizer: Any = tokenizer_for(name)
    labeller = Labeller(
        attach_chat_template(tokenizer_for(name), TemplateSettings()),
        LabelSettings(max_length=None),
    )
    difference = DIFFERENCES.get(name, Difference())
    kinds = ["single"] if name in EXPANDED else ["single", "multi"]
    for generated in [generate(kind, seed) for kind in kinds for seed in range(3)]:
        (row,) = labeller.label([Example(generated.messages, "generated", 0)]).rows
        theirs = tokenizer.apply_chat_template(
            generated.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.input_ids == theirs["input_ids"]
        masked = [
            i if on else -100
            for i, on in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        ]
        ours = trained_texts(tokenizer, (row.input_ids, row.labels))
        afters = [difference.after] * len(ours)
        if difference.after_last is not None:
            afters[-1] = difference.after_last
        expected = [
            difference.before + text + after for text, after in zip(ours, afters, strict=True)
        ]
        assert trained_texts(tokenizer, (theirs["input_ids"], masked)) == expected
        pairs = zip(trained_spans(row.labels), trained_spans(masked), strict=True)
        assert all(
            theirs_start <= start and end <= theirs_end
            for (start, end), (theirs_start, theirs_end) in pairs
        )


@pytest.mark.parametrize("name", EXPANDED)
def test_turns_that_end_differently_in_context_become_rows(name: str) -> None:
    """TRL trains `<|end|>` after earlier answers; here each answer is a row that ends as it does when served."""
    tokenizer: Any = tokenizer_for(name)
    labeller = Labeller(
        attach_chat_template(tokenizer_for(name), TemplateSettings()),
        LabelSettings(max_length=None),
    )
    generated = generate("multi", 0)
    rows = labeller.label([Example(generated.messages, "generated", 0)]).rows
    answers = [
        message["content"] for message in generated.messages if message["role"] == "assistant"
    ]
    texts = [trained_texts(tokenizer, (row.input_ids, row.labels)) for row in rows]
    assert texts == [[f"<|channel|>final<|message|>{answer}<|return|>"] for answer in answers]


def test_training_empty_think_is_trls_policy_for_qwen3() -> None:
    """With `empty_think: train` only the trailing line break is left of the difference."""
    name = "qwen3_training"
    tokenizer: Any = tokenizer_for(name)
    settings = LabelSettings(max_length=None, empty_think="train")
    labeller = Labeller(attach_chat_template(tokenizer_for(name), TemplateSettings()), settings)
    messages = generate("multi", 1).messages
    (row,) = labeller.label([Example(messages, "generated", 0)]).rows
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [
        i if on else -100
        for i, on in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    ]
    expected = [text + "\n" for text in trained_texts(tokenizer, (row.input_ids, row.labels))]
    assert trained_texts(tokenizer, (theirs["input_ids"], masked)) == expected
