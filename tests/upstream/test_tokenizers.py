"""transformers' tokenizers still do what `sft_recipes/upstream/tokenizers.py` takes from them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from sft_recipes.upstream.tokenizers import control_tokens
from tests.conftest import build_tokenizer

TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{%- endfor -%}"
    "{%- if tools -%}<tool_call>{%- endif -%}"
)


@pytest.fixture
def tokenizer() -> Any:
    """Special tokens, and added ones that are not: written by the template, blank, and unused."""
    tokenizer = build_tokenizer()
    added = ["<tool_call>", "<other>", "\n\n"]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts of the added tokens that the tokenizer calls special."""
    tokens = tokenizer.added_tokens_decoder.values()
    return {token.content for token in tokens if token.special}


def test_control_tokens_are_the_special_ones_and_those_of_the_template(tokenizer: Any) -> None:
    """An added token that is not special counts where the template writes it, a blank one never."""
    special = special_tokens(tokenizer)
    assert {"<|im_start|>", "<|im_end|>"} <= special
    assert set(control_tokens(tokenizer, TEMPLATE)) == special | {"<tool_call>"}
    assert set(control_tokens(tokenizer, "<other>\n\n")) == special | {"<other>"}
    assert set(control_tokens(tokenizer, "{{ messages }}")) == special


def test_the_tokenizers_own_list_is_obeyed(tokenizer: Any) -> None:
    """A tokenizer that lists its control tokens decides; its special tokens stay among them."""
    tokenizer.chat_control_tokens = ["<other>"]
    expected = special_tokens(tokenizer) | {"<other>"}
    assert set(control_tokens(tokenizer, TEMPLATE)) == expected


def test_sanitizing_makes_the_same_choice(tokenizer: Any) -> None:
    """What the public call keeps as text is what we are told: no id of such a token, and that of any other."""
    tokenizer.chat_template = TEMPLATE
    vocabulary = tokenizer.get_vocab()
    for token in tokenizer.added_tokens_decoder.values():
        messages = [{"role": "user", "content": f"a {token.content} b"}]
        ids = tokenizer.apply_chat_template(
            messages,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        # The template itself writes one of these two around each message.
        written = ["<|im_start|>", "<|im_end|>"].count(token.content)
        spelled = ids.count(vocabulary[token.content]) - written
        is_control = token.content in control_tokens(tokenizer, TEMPLATE)
        assert spelled == (0 if is_control else 1), token.content
