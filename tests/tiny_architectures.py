"""Tiny random base models, one per architecture that a shipped recipe names, each with a tokenizer that has the
special tokens, the BOS habit and the chat template of the real base: what a recipe relies on, at a size that trains in
a second. Written from what is publicly known of the real tokenizers; none of them was read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.conftest import build_tokenizer
from tests.data.template_tokenizers import read_template

CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")

# Widths are multiples of 64, so that 4-bit blocks are whole; more than one layer of each kind where there are two.
SHAPE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class Architecture:
    """What a base brings along. `template`: the one of trl's that the base ships; `pad` None: it names none."""

    config: type[PretrainedConfig]
    eos: str
    pad: str | None
    bos: str | None = None
    adds_bos: bool = False
    special: Sequence[str] = ()
    template: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
# One sliding and one full layer, and a window shorter than a pack: what packing has to get right.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen3": Architecture(
        Qwen3Config,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        special=(*CHATML, *THINK),
        template="qwen3",
        settings={"tie_word_embeddings": True},
    ),
    "qwen3_moe": Architecture(
        Qwen3MoeConfig,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        special=(*CHATML, *THINK),
        template="qwen3",
        settings={"tie_word_embeddings": False, **EXPERTS},
    ),
    "smollm3": Architecture(
        SmolLM3Config,
        eos="<|end_of_text|>",
        pad=None,
        bos="<|begin_of_text|>",
        special=(*CHATML, *THINK),
        # Every fourth layer has no rotary embedding.
        settings={"tie_word_embeddings": True, "num_hidden_layers": 4},
    ),
    "llama": Architecture(
        LlamaConfig,
        eos="<|end_of_text|>",
        pad=None,
        bos="<|begin_of_text|>",
        adds_bos=True,
        special=(
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|reserved_special_token_0|>",
        ),
        settings={"tie_word_embeddings": False},
    ),
    "mistral": Architecture(
        MistralConfig,
        eos="</s>",
        pad=None,
        bos="<s>",
        adds_bos=True,
        special=("<unk>", "[INST]", "[/INST]"),
        settings={"tie_word_embeddings": False, "sliding_window": None},
    ),
    "gemma3_text": Architecture(
        Gemma3TextConfig,
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        adds_bos=True,
        special=("<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        settings={"tie_word_embeddings": True, **SLIDING},
    ),
}

# The shape of the real checkpoints, for counting; the totals are those of the model cards.
REAL_SHAPES: Mapping[str, Mapping[str, int]] = {
    "qwen3": dict(zip(SIZES, (151936, 1024, 3072, 28, 16, 8, 128), strict=True)),
    "qwen3_moe": dict(zip(SIZES, (151936, 2048, 6144, 48, 32, 4, 128), strict=True))
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "smollm3": dict(zip(SIZES, (128256, 2048, 11008, 36, 16, 4, 128), strict=True)),
    "llama": dict(zip(SIZES, (128256, 4096, 14336, 32, 32, 8, 128), strict=True)),
    "mistral": dict(zip(SIZES, (32768, 4096, 14336, 32, 32, 8, 128), strict=True)),
    "gemma3_text": dict(zip(SIZES, (262144, 1152, 6912, 26, 4, 1, 256), strict=True)),
}


def build_real_shape(name: str) -> Any:
    """The real model without its weights (on the meta device), to count parameters with."""
    architecture = ARCHITECTURES[name]
    settings: dict[str, Any] = {
        **REAL_SHAPES[name],
        "tie_word_embeddings": architecture.settings["tie_word_embeddings"],
    }
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture.config(**settings))


def build_base(name: str, folder: Path) -> Path:
    """Save the tiny base of an architecture, model and tokenizer, in `folder`; the same weights every time."""
    architecture = ARCHITECTURES[name]
    tokenizer = _tokenizer(architecture)
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # Real embeddings are longer than their vocabulary; this one is, too.
    vocabulary = -(-len(tokenizer) // 64) * 64
    config = architecture.config(
        **{
            **SHAPE,
            **architecture.settings,
            **ids,
            "pad_token_id": tokenizer.pad_token_id,
            "vocab_size": vocabulary,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _tokenizer(architecture: Architecture) -> Any:
    special = [token for token in (architecture.bos, *architecture.special) if token]
    tokenizer = build_tokenizer(special, eos=architecture.eos)
    tokenizer.pad_token = architecture.pad
    if architecture.bos:
        tokenizer.bos_token = architecture.bos
    if architecture.adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{architecture.bos} $A",
            special_tokens=[(architecture.bos, tokenizer.bos_token_id)],
        )
    if architecture.template:
        tokenizer.chat_template = read_template(architecture.template)
    return tokenizer
