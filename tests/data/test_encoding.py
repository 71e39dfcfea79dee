"""Text that spells a control token gets the ids of transformers' `sanitize_control_tokens`, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.conftest import build_tokenizer

TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if tools -%}<tool_call>{%- endif -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
PIECES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|im", "_start|>", "\n", " ", "hello", "é漢🙂"]


def tokenizer_with_tool_call() -> Any:
    """Special tokens, and one added token that is not special but that the template writes."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def hostile_examples(generator: random.Random) -> list[Example]:
    """100 conversations whose texts are made of control tokens and parts of them."""

    def text() -> str:
        return "".join(generator.choices(PIECES, k=generator.randint(1, 8)))

    examples = []
    for row in range(100):
        turns = [("user", f"u{text()}"), ("assistant", f"a{text()}")] * generator.randint(1, 3)
        examples.append(Example([{"role": role, "content": content} for role, content in turns], "hostile", row))
    return examples


@pytest.mark.parametrize("seed", range(3))
def test_hostile_rows_are_sanitized_exactly(seed: int) -> None:
    """300 random rows full of control tokens, special or not: ids are transformers', labels the answers and no more."""
    pristine = tokenizer_with_tool_call()
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    labeller = Labeller(renderer, LabelSettings(max_length=None))
    generator = random.Random(seed)
    examples = hostile_examples(generator)
    batch = labeller.label(examples)
    assert not batch.dropped and len(batch.rows) == len(examples)
    for row in batch.rows:
        messages = list(examples[row.example].messages)
        expected = pristine.apply_chat_template(
            messages, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
        assert row.input_ids == expected
        trained = [label for label in row.labels if label != IGNORE_INDEX]
        answers = [f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert pristine.decode(trained) == "".join(answers)


def test_batches_in_threads_equal_batches_alone() -> None:
    """Ids and labels do not depend on which thread encoded a batch while which other was joined, nor does the order."""
    examples = hostile_examples(random.Random(7))
    batches = [examples[start : start + 3] for start in range(0, len(examples), 3)]

    def labeller() -> Labeller:
        return Labeller(attach_chat_template(tokenizer_with_tool_call(), TemplateSettings()), LabelSettings())

    together, alone = labeller(), labeller()
    found = list(together.label_batches(batches))
    assert [rows for rows, _ in found] == batches
    for _, batch in found:
        expected = alone.label(batches.pop(0))
        rows = [[(row.example, row.input_ids, row.labels, row.turns) for row in one.rows] for one in (batch, expected)]
        assert rows[0] == rows[1] and rows[0]
        assert batch.dropped == expected.dropped


def test_raw_text_keeps_control_tokens_as_text() -> None:
    """`format: raw`: a spelled control token stays text, the one EOS at the end is the only control id."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    text = "one <|im_end|> two <tool_call> three <|endoftext|>"
    (row,) = Labeller(renderer, LabelSettings()).label([Example([], "raw", 0, text=text)]).rows
    added = set(renderer.tokenizer.added_tokens_decoder)
    assert [token for token in row.input_ids if token in added] == [renderer.tokenizer.eos_token_id]
    assert renderer.tokenizer.decode(row.input_ids[:-1]) == text
    assert row.labels == row.input_ids


@pytest.mark.parametrize("cuts_at_tokens", [True, False])
def test_offsets_are_there_where_asked_and_ids_are_the_same(cuts_at_tokens: bool) -> None:
    """Whichever characters are asked for: the ids, their tokens, and where those begin are as with all asked for."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    encoder = renderer.control_tokens
    encoder._cuts_at_tokens = cuts_at_tokens
    generator = random.Random(3)
    texts = [renderer.render(encoder.mark(example.messages)) for example in hostile_examples(generator)]
    everything = encoder.encode(texts, [range(len(text)) for text in texts])
    places = [generator.sample(range(len(text)), 2) for text in texts]
    for full, partial, asked in zip(everything, encoder.encode(texts, places), places, strict=True):
        assert partial.ids.tolist() == full.ids.tolist()
        for place in asked:
            token = full.token_at(place)
            assert partial.token_at(place) == token
            assert token is None or partial.first_char(token) == full.first_char(token)
