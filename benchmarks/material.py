"""Rows, tokenizer and models made in-process, for benchmarks that are given none."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.chat_template_utils import qwen2_5_chat_template

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
).split()


def write_rows(path: Path, count: int) -> Path:
    """Prompt/completion rows: prompts of 20 to 400 words, completions of 1 to 60, a fixed seed."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = " ".join(generator.choices(WORDS, k=int(20 * 20 ** generator.random())))
            completion = " ".join(generator.choices(WORDS, k=int(60 ** generator.random())))
            file.write(json.dumps({"prompt": prompt + "?", "completion": completion + "."}) + "\n")
    return path


def made_up_words(count: int) -> list[str]:
    """Different words of two or three syllables; a fixed seed."""
    generator = random.Random(2)
    syllables = [
        f"{first}{vowel}{last}"
        for first in "bdfgklmnprstvz"
        for vowel in "aeiou"
        for last in ("", "n", "r", "s")
    ]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(generator.choices(syllables, k=generator.choice((2, 2, 3))))] = None
    return list(words)


def chatml_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A byte-level BPE tokenizer of 8,000 ids with Qwen2.5's chat template, saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(1)
    backend.train_from_iterator(
        (" ".join(generator.choices(words, k=50)) for _ in range(2000)), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
    )
    tokenizer.chat_template = qwen2_5_chat_template
    tokenizer.save_pretrained(folder)
    return folder


def small_model(vocab_size: int, hidden: int = 32, layers: int = 1) -> Any:
    """A random Llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        num_key_value_heads=max(hidden // 64, 2),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)
