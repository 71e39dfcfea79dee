"""Tokenizers, models and rows made in-process: no test needs the network or a file from elsewhere."""

from __future__ import annotations

import os

# Read when the libraries are imported; a test that reaches for the network fails at once instead of retrying.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Tiny tensors gain nothing from a second thread, and threads that wait for one another cost up to seven times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "### Instruction:\nName a colour.\n\n### Response:\nBlue.",
    "system user assistant tool answer question yes no one two three four five six seven eight nine ten",
    "Paris is the capital of France. Berlin is the capital of Germany.",
]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def build_tokenizer(
    special: Sequence[str] = CHATML_TOKENS, eos: str = "<|endoftext|>", **kwargs: Any
) -> Any:
    """A byte-level BPE tokenizer of about 400 ids with the given special tokens; no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys([eos, "<|pad|>", *special])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<|pad|>",
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
        **kwargs,
    )


def build_model(vocab_size: int, **overrides: Any) -> Any:
    """A random two-layer Llama in float32, the same for the same arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`build_tokenizer`, for tests that change their tokenizer."""
    return build_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny base model with its tokenizer and no chat template. Read only."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines below tmp_path and return the file."""
    import json

    def write(rows: Sequence[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        return path

    return write


def instruction_rows(count: int) -> list[dict[str, str]]:
    """Different short instruction rows of different lengths."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {
            "instruction": f"Say {numbers[index % 10]} and {numbers[index // 10 % 10]} ({index}).",
            "input": "the quick brown fox" if index % 3 == 0 else "",
            "output": " ".join(numbers[: index % 7 + 1]),
        }
        for index in range(count)
    ]


@pytest.fixture
def write_recipe(
    tmp_path: Path, base_folder: Path, write_rows: Callable[..., Path]
) -> Callable[..., Path]:
    """Write a recipe below tmp_path that trains the tiny base on 40 rows in seconds; keys given as None are left out.

    The rows stand in `train.jsonl` beside it unless the test wrote its own there; the run folder is `run`.
    """
    import yaml

    def write(name: str = "recipe.yaml", **keys: Any) -> Path:
        if not (tmp_path / "train.jsonl").is_file():
            write_rows(instruction_rows(40))
        defaults = {
            "model_name_or_path": str(base_folder),
            "dataset_name": "./train.jsonl",
            "output_dir": "./run",
            "max_length": 128,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
        }
        values = {key: value for key, value in {**defaults, **keys}.items() if value is not None}
        if "datasets" in values:
            values.pop("dataset_name")
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write
