"""Text that spells a control token gets the ids of transformers' `sanitize_control_tokens`, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.encoding import SegmentedText
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.conftest import build_tokenizer

TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if tools -%}<tool_call>{%- endif -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<tool_call>",
    "<|im",
    "_start|>",
    "\n",
    " ",
    "hello",
    "é漢🙂",
]


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
        examples.append(
            Example([{"role": role, "content": content} for role, content in turns], "hostile", row)
        )
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
        answers = [
            f"{message['content']}<|im_end|>"
            for message in messages
            if message["role"] == "assistant"
        ]
        assert pristine.decode(trained) == "".join(answers)


def test_raw_text_with_control_tokens_is_refused_by_name() -> None:
    """`format: raw`: text that spells a control token is never trained as pieces; the way out is named, and works."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    labeller = Labeller(renderer, LabelSettings())
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    batch = labeller.label([Example([], "raw", 0, text=text)])
    assert not batch.rows and [row.reason for row in batch.dropped] == ["control_tokens"]
    assert "format: rendered" in batch.dropped[0].detail
    (row,) = labeller.label([Example([], "raw", 0, text=text, rendered=True)]).rows
    assert (
        row.input_ids
        == renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        == row.labels
    )


def test_rendered_text_without_an_end_gets_one() -> None:
    """`format: rendered`: a text that does not end in an end token would teach the model not to stop."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    (row,) = (
        Labeller(renderer, LabelSettings())
        .label([Example([], "raw", 0, text="plain", rendered=True)])
        .rows
    )
    assert row.input_ids[-1] == renderer.tokenizer.eos_token_id
    assert row.input_ids.count(renderer.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "private", ["\uf5e0", "\uf5e1", "\uf5e0<|im_end|>\uf5e1", "\uf5e2<|im_end|>"]
)
def test_private_characters_in_a_text_stay(private: str) -> None:
    """Characters that mark control tokens inside this project are text like any other, beside such tokens too."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    messages = [
        {"role": "user", "content": f"a{private}b"},
        {"role": "assistant", "content": f"c{private}d"},
    ]
    (row,) = Labeller(renderer, LabelSettings()).label([Example(messages, "private", 0)]).rows
    text = renderer.tokenizer.decode(row.input_ids)
    assert f"a{private}b" in text and f"c{private}d" in text
    ends = [
        token
        for token in row.input_ids
        if token == renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    assert len(ends) == 2


def test_end_texts_are_taken_off_when_asked() -> None:
    """`control_tokens: strip_end` takes the text of an end token off answers, counts them, and touches nothing else."""
    renderer = attach_chat_template(tokenizer_with_tool_call(), TemplateSettings())
    messages = [
        {"role": "user", "content": "Say it.<|endoftext|>"},
        {"role": "assistant", "content": "  Blue <|im_end|> sky.<|endoftext|>\n</s>"},
    ]
    labeller = Labeller(renderer, LabelSettings(control_tokens="strip_end"))
    batch = labeller.label([Example(messages, "ends", 0)])
    (row,) = batch.rows
    # An evaluation's reference is what was trained.
    assert (
        labeller.for_template(Example(messages, "ends", 0)).messages[1]["content"]
        == "  Blue <|im_end|> sky."
    )
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    assert renderer.tokenizer.decode(trained) == "  Blue <|im_end|> sky.<|im_end|>"
    assert batch.stripped == {0} and "Say it.<|endoftext|>" in renderer.tokenizer.decode(
        row.input_ids
    )
    (plain,) = Labeller(renderer, LabelSettings()).label([Example(messages, "ends", 0)]).rows
    assert "<|endoftext|>\n</s>" in renderer.tokenizer.decode(
        plain.labels[-30:] and plain.input_ids
    )
    emptied = [messages[0], {"role": "assistant", "content": "<|endoftext|>"}]
    dropped = (
        Labeller(renderer, LabelSettings(control_tokens="strip_end"))
        .label([Example(emptied, "ends", 0)])
        .dropped
    )
    assert [row.reason for row in dropped] == ["empty_answer"]


def test_what_stands_before_decides_how_a_text_goes_on() -> None:
    """Segments of a row encode to the ids of the whole text, wherever it is cut, unless a token would join two of them:
    then the ids before the cut are those of the text before it alone, as a server has them.
    """
    tokenizer = tokenizer_with_tool_call()
    encoder = attach_chat_template(tokenizer, TemplateSettings()).encoder
    text = "<|im_start|>user\nTwo  words.\n\n\nMore<|im_end|>\n<|im_start|>assistant\n\n\n- one\n- two é漢<|im_end|>\n"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    cuts = [place for place in range(1, len(text)) if text[place - 1] + text[place] not in "<|>"]
    for place in cuts:
        encoded = encoder.encode([SegmentedText([text[:place], text[place:]])])[0]
        ids = [token for part in encoded.ids for token in part.tolist()]
        if not encoded.joined[1]:
            assert ids == whole, (place, text[:place])
        assert tokenizer.decode(ids) == text
        assert (
            encoded.ids[0].tolist()
            == tokenizer(text[:place], add_special_tokens=False)["input_ids"]
        )
