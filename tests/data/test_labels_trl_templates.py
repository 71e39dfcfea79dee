"""The label contract on every text template TRL ships, judged by the oracle on generated conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import supports_tool_calling

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.template_checks import check_template
from sft_recipes.errors import CheckFailed, InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.conversations import FOREIGN, KINDS, Generated, generate
from tests.data.label_oracle import (
    Conversation,
    Tokenizer,
    judge,
    served_ids,
    special_tokens,
    trained_texts,
    turn_truth,
)
from tests.data.template_tokenizers import read_template, template_names, tokenizer_for

# Their content is a list of images and texts: given a string they raise or leave the text out without a word.
NO_TEXT = ("idefics3", "llava_next", "smolvlm")
# Its tool arguments are concatenated as strings; given the mapping every other template wants, it raises.
NO_TOOL_MAPPINGS = ("deepseek",)

TEXT_TEMPLATES = [name for name in template_names() if not name.startswith(NO_TEXT)]
FAST_SEEDS = range(2)
SLOW_SEEDS = range(2, 40)


@cache
def labeller_for(name: str, kwargs: tuple[tuple[str, bool], ...] = ()) -> Labeller:
    """A labeller on its own tokenizer: attaching changes the tokenizer, and the oracle judges with a pristine one."""
    renderer = attach_chat_template(
        tokenizer_for(name), TemplateSettings(chat_template_kwargs=dict(kwargs))
    )
    return Labeller(renderer, LabelSettings(max_length=None))


@cache
def pristine(name: str) -> Tokenizer:
    return tokenizer_for(name)


def kinds_for(name: str) -> list[str]:
    """Kinds of conversation the template can express."""
    has_tools = not name.startswith(NO_TOOL_MAPPINGS) and supports_tool_calling(pristine(name))
    has_reasoning = "reasoning_content" in read_template(name)
    return [*KINDS, *(["reasoning"] if has_reasoning else []), *(["tools"] if has_tools else [])]


def faults(
    tokenizer: Tokenizer,
    labeller: Labeller,
    generated: Sequence[Generated],
    kwargs: tuple[tuple[str, bool], ...] = (),
) -> list[str]:
    """Label all conversations in one batch; what is wrong with every one, and what was dropped without need."""
    batch = labeller.label(
        [Example(g.messages, "generated", i, tools=g.tools) for i, g in enumerate(generated)]
    )
    found = []
    for index, made in enumerate(generated):
        conversation = Conversation(tokenizer, made.messages, made.tools, dict(kwargs))
        rows = [(row.input_ids, row.labels) for row in batch.rows if row.example == index]
        dropped = [f"{row.reason}: {row.detail}" for row in batch.dropped if row.example == index]
        verdict = judge(conversation, rows, dropped, FOREIGN)
        found += [f"{made.kind} {index}: {fault}" for fault in verdict.wrong]
        found += [f"{made.kind} {index}: dropped without need: {turn}" for turn in verdict.needless]
    return found


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_every_generated_conversation_is_labelled_as_served(name: str) -> None:
    """Each span is what the model must write after the generation prompt, each turn trained once, nothing else."""
    tokens = special_tokens(pristine(name))
    generated = [generate(kind, seed, tokens) for kind in kinds_for(name) for seed in FAST_SEEDS]
    assert faults(pristine(name), labeller_for(name), generated) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_many_generated_conversations(name: str) -> None:
    """The same property on many more conversations."""
    tokens = special_tokens(pristine(name))
    generated = [generate(kind, seed, tokens) for kind in kinds_for(name) for seed in SLOW_SEEDS]
    assert faults(pristine(name), labeller_for(name), generated) == []


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "name", [name for name in TEXT_TEMPLATES if "enable_thinking" in read_template(name)]
)
def test_labels_follow_the_template_arguments_the_model_is_served_with(
    name: str, thinking: bool
) -> None:
    """`enable_thinking` moves the end of the generation prompt; the labels move with it."""
    kwargs = (("enable_thinking", thinking),)
    generated = [
        generate(kind, seed)
        for kind in ("single", "multi", "system", "near_empty")
        for seed in FAST_SEEDS
    ]
    generated = [
        made for made in generated if made.kind != "system" or not name.startswith("gemma_")
    ]
    assert faults(pristine(name), labeller_for(name, kwargs), generated, kwargs) == []


@pytest.mark.parametrize("name", [name for name in template_names() if name.startswith(NO_TEXT)])
def test_templates_that_cannot_render_text_are_refused(name: str) -> None:
    """A template that drops the text or raises on it verifies nothing, so it is refused before any row is read."""
    with pytest.raises((CheckFailed, InputError), match="chat_template"):
        Labeller(attach_chat_template(tokenizer_for(name), TemplateSettings()), LabelSettings())


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_control_tokens_in_text_stay_text(name: str) -> None:
    """A row whose text spells control tokens has exactly as many control ids as the same row without them."""
    tokenizer = pristine(name)
    tokens = special_tokens(tokenizer)
    hostile = [generate("hostile", seed, tokens) for seed in range(4)]
    if name in ("gemma", "gemma_training"):
        hostile = [made for made in hostile if made.messages[0]["role"] != "system"]
    batch = labeller_for(name).label(
        [Example(made.messages, "hostile", i) for i, made in enumerate(hostile)]
    )
    ids = set(tokenizer.convert_tokens_to_ids(tokens))
    assert batch.rows
    rewritten = {row.example for row in batch.dropped}
    for row in (row for row in batch.rows if row.example not in rewritten):
        messages = hostile[row.example].messages[
            : _length_of(tokenizer, hostile[row.example], row.input_ids)
        ]
        harmless = Example(
            [{**message, "content": "plain words"} for message in messages], "harmless", 0
        )
        benign = labeller_for(name).label([harmless]).rows[-1]
        assert sum(token in ids for token in row.input_ids) == sum(
            token in ids for token in benign.input_ids
        )


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_no_named_check_is_a_false_alarm(name: str) -> None:
    """On correct labels none of the checks before a run fails, and generation stops at every token that ends a turn."""
    labeller = labeller_for(name)
    made = [
        generate(kind, seed)
        for kind in ("single", "multi", "unicode", "reasoning", "tools")
        for seed in range(2)
    ]
    examples = [Example(one.messages, one.kind, 0, tools=one.tools) for one in made]
    checks = check_template(labeller, examples)
    assert [check for check in checks if check.outcome == "failed"] == []


def _length_of(tokenizer: Tokenizer, made: Generated, ids: Sequence[int]) -> int:
    """How many messages of the conversation a row holds."""
    conversation = Conversation(tokenizer, made.messages)
    for turn in conversation.assistant_turns:
        if list(ids) in served_ids(conversation, turn_truth(conversation, turn)):
            return turn + 1
    raise AssertionError("the row is that of no turn")


@pytest.mark.skipif(
    "SFT_RECIPES_TOKENIZER" not in os.environ,
    reason="SFT_RECIPES_TOKENIZER names no tokenizer folder",
)
def test_a_real_tokenizer() -> None:
    """The property holds with a real vocabulary: its merges differ from those of the in-process tokenizers."""
    folder = os.environ["SFT_RECIPES_TOKENIZER"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    attached = AutoTokenizer.from_pretrained(folder)
    labeller = Labeller(
        attach_chat_template(attached, TemplateSettings()), LabelSettings(max_length=None)
    )
    kinds = [*KINDS, *(["tools"] if supports_tool_calling(tokenizer) else [])]
    generated = [
        generate(kind, seed, special_tokens(tokenizer)) for kind in kinds for seed in range(10)
    ]
    assert faults(tokenizer, labeller, generated) == []
    assert trained_texts(tokenizer, _first_row(labeller)) == [f"Good day.{attached.eos_token}"]


def _first_row(labeller: Labeller) -> tuple[list[int], list[int]]:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    row = labeller.label([Example(messages, "one", 0)]).rows[0]
    return row.input_ids, row.labels
