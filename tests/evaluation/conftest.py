"""A byte-level tokenizer, a tiny random Llama and a renderer with the smallest interface evaluation
needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sft_recipes.messages import Example, Message


class PlainRenderer:
    """Stands in for `ChatRenderer`: one header per turn, EOS after each answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = (tokenizer.eos_token_id,)

    def render(
        self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(f"### {message['role']}:\n{message['content']}\n" for message in messages)
        return text + "### assistant:\n" if add_generation_prompt else text

    def prompt_ids(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        return self.tokenizer(self.render(messages, tools, True), add_special_tokens=False)[
            "input_ids"
        ]


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def build_model(seed: int = 0, **settings: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Wide initial weights: greedy answers differ between prompts instead of repeating one token.
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(
        **(small | heads | settings),
        vocab_size=258,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def renderer(tokenizer: Any) -> PlainRenderer:
    return PlainRenderer(tokenizer)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Six rows of three task types; row 4 has no task type of its own kind but an expected
    format."""
    rows = [
        ("Name a colour.", "Blue.", {"task_type": "name"}),
        ("Count to three.", "1 2 3", {"task_type": "count"}),
        (
            "List two birds.",
            "- tit\n- owl",
            {"task_type": "list", "expected_format": {"type": "bullets", "n": 2}},
        ),
        ("Name a bird.", "Owl.", {"task_type": "name"}),
        ("Give JSON.", '{"a": 1}', {"task_type": "list", "expected_format": {"type": "json"}}),
        ("Say a very long thing, please.", "x" * 40, {"task_type": "name"}),
    ]
    return [
        Example(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "test.jsonl",
            index,
            line=index + 1,
            columns=columns,
        )
        for index, (question, answer, columns) in enumerate(rows)
    ]
