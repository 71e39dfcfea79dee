"""The memory estimate by hand, beside what autograd keeps, and beside the peaks of real steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3Config
from trl import SFTConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from benchmarks.memory import SHAPES, WANTED_WITHIN, run_shape
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import Layout, largest_batch, plan_layout
from sft_recipes.training.construction import meta_model
from sft_recipes.training.memory import (
    TILE_POSITIONS,
    TILE_WORDS,
    Batch,
    Memory,
    Strategy,
    estimate_memory,
)
from tests.conftest import build_model
from tests.training.tiny import trainer_for

# Of `build_model(100)`: hidden 32, MLP 64, two layers, four heads of 8, two for keys and values.
WORDS = 100
HIDDEN = 32
LAYERS = 2
LAYER_MATRICES = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
BATCH = Batch(tokens=100, trained_tokens=10, mask_elements=500)
# A layer in float32: two norms, each with its input and the normalized vector; the inputs of
# attention and MLP; query, key, value (repeated) and result; four vectors of the MLP's width. And
# the mask.
LAYER = 100 * 4 * (2 * 2 * 32 + 2 * 32 + 4 * 32 + 4 * 64) + 4 * 500
# Under autocast norms stay in float32, and each of five matrices copies its input.
AUTOCAST_LAYER = 100 * (4 * 2 * 2 * 32 + 2 * (5 * 32 + 4 * 32 + 4 * 64)) + 2 * 500


def cpu_config(tmp_path: Path, **changed: Any) -> SFTConfig:
    """A run on a CPU without activation checkpointing."""
    settings = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, **changed}
    return SFTConfig(output_dir=str(tmp_path), **settings)


def cuda_config(tmp_path: Path, **changed: Any) -> SFTConfig:
    """A run on CUDA under bf16, which TRL would refuse to plan on a machine without it."""
    config = cpu_config(tmp_path, **changed)
    config.use_cpu, config.bf16 = False, True
    return config


def test_full_fine_tuning_by_hand(tmp_path: Path) -> None:
    """In float32 every part is what a sheet of paper says; the peak is where backward begins."""
    memory = estimate_memory(build_model(WORDS), cpu_config(tmp_path), BATCH)
    count = 2 * WORDS * HIDDEN + LAYERS * (LAYER_MATRICES + 2 * HIDDEN) + HIDDEN
    assert memory.by_name() == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "autocast copies": 0,
        "activations": LAYERS * LAYER,
        "recomputed layer": 0,
        "logits": 3 * 4 * 10 * WORDS,
        "head gradient": 0,
    }
    assert memory.peak == 12 * count + LAYERS * LAYER + 12_000
    assert memory.checkpoint == 12 * count


def test_activation_checkpointing_by_hand(tmp_path: Path) -> None:
    """Only the layers' inputs are kept; one layer comes again, with two gradients of the MLP's
    width; the peak is where the backward pass ends, with all gradients.
    """
    config = cpu_config(tmp_path, activation_checkpointing=True)
    memory = estimate_memory(build_model(WORDS), config, BATCH)
    assert memory.activations == LAYERS * 100 * HIDDEN * 4
    assert memory.recomputed_layer == LAYER + 100 * 2 * 64 * 4
    always = memory.weights + memory.optimizer
    assert memory.peak == always + memory.gradients + memory.recomputed_layer


def test_autocast_by_hand(tmp_path: Path) -> None:
    """Copies of the layers' matrices and of the head in 16 bits stand beside the float32 weights;
    with activation checkpointing only the head's is there at the peak.
    """
    model = build_model(WORDS)
    memory = estimate_memory(model, cpu_config(tmp_path, bf16=True), BATCH)
    assert memory.autocast_copies == 2 * LAYERS * LAYER_MATRICES
    assert memory.activations == LAYERS * AUTOCAST_LAYER
    assert memory.logits == 12 * 10 * WORDS + 2 * WORDS * HIDDEN
    config = cpu_config(tmp_path, bf16=True, activation_checkpointing=True)
    assert estimate_memory(model, config, BATCH).autocast_copies == 0


@pytest.mark.parametrize(("bf16", "matrices"), [(False, 2), (True, 1)])
def test_a_tied_head_waits_for_the_embedding(tmp_path: Path, bf16: bool, matrices: int) -> None:
    """A tied head takes one more matrix than the weight's gradient, and in float32 their sum."""
    model = build_model(WORDS, tie_word_embeddings=True)
    memory = estimate_memory(model, cpu_config(tmp_path, bf16=bf16), BATCH)
    assert memory.head_gradient == matrices * 4 * WORDS * HIDDEN


@pytest.mark.parametrize("trained_tokens", [10, 10_000])
def test_fused_head_on_cuda_by_hand(tmp_path: Path, trained_tokens: int) -> None:
    """On CUDA logits take a tile, however many positions are trained, beside words of the head and
    its gradient.
    """
    batch = Batch(tokens=20_000, trained_tokens=trained_tokens)
    memory = estimate_memory(build_model(WORDS), cuda_config(tmp_path), batch)
    positions = min(trained_tokens, 4096)
    assert memory.logits == 2 * 32_768 * (positions + HIDDEN) + 4 * WORDS * HIDDEN


def test_tiles_are_those_of_trl() -> None:
    """The size of a tile is the one that the installed TRL computes."""
    assert TILE_POSITIONS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert TILE_WORDS == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE


def test_keys_are_not_repeated_without_a_mask_on_cuda(tmp_path: Path) -> None:
    """With a mask keys and values are as wide as the queries, without one on CUDA they are not."""
    model = build_model(WORDS)
    masked = estimate_memory(model, cuda_config(tmp_path), BATCH)
    plain = estimate_memory(model, cuda_config(tmp_path), Batch(100, 10))
    repeated = 2 * 100 * 2 * (32 - 16)
    assert masked.activations - plain.activations == LAYERS * (repeated + 2 * 500)


@pytest.mark.parametrize(("on_cuda", "byte"), [(False, 4), (True, 1)])
def test_dropout_of_lora_by_hand(tmp_path: Path, on_cuda: bool, byte: int) -> None:
    """LoRA trains no norm and no head; dropout gives five matrices inputs of their own, and keeps
    what it dropped.
    """
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(build_model(WORDS), lora)
    config = cuda_config(tmp_path) if on_cuda else cpu_config(tmp_path)
    memory = estimate_memory(model, config, BATCH)
    compute = 2 if on_cuda else 4
    vectors = compute * (5 * 32 + 4 * 32 + 4 * 64)
    dropped = byte * (6 * 32 + 64)
    layer = 100 * (4 * 2 * 32 + vectors + dropped) + compute * 500
    assert memory.activations == LAYERS * layer
    assert memory.head_gradient == 0


def test_quantized_weights_by_hand(tmp_path: Path) -> None:
    """Matrices of the layers take the width given; embedding, head and norms stay as they are."""
    model = build_model(WORDS).requires_grad_(False)
    memory = estimate_memory(model, cpu_config(tmp_path), BATCH, quantized=0.5)
    others = 2 * WORDS * HIDDEN + LAYERS * 2 * HIDDEN + HIDDEN
    assert memory.weights == LAYERS * LAYER_MATRICES * 0.5 + 4 * others


@pytest.mark.parametrize(("optimizer", "width"), [("adamw_8bit", 2), ("sgd", 0)])
def test_other_optimizers(tmp_path: Path, optimizer: str, width: int) -> None:
    """Two bytes a parameter for two moments of 8 bits, nothing without moments."""
    model = build_model(WORDS)
    memory = estimate_memory(model, cpu_config(tmp_path, optim=optimizer), BATCH)
    assert memory.optimizer == width * model.num_parameters()


def test_sharded_and_offloaded(tmp_path: Path) -> None:
    """DeepSpeed's stage 3 on four processes holds a quarter of 16-bit weights and gradients; the
    float32 ones are the optimizer's, and what is offloaded is no part of the peak.
    """
    strategy = Strategy("zero3", 4, stage=3, master_weights=True, offloaded=("optimizer",))
    model = build_model(WORDS)
    memory = estimate_memory(model, cpu_config(tmp_path, bf16=True), BATCH, strategy)
    quarter = model.num_parameters() / 4
    assert (memory.weights, memory.gradients) == (2 * quarter, 2 * quarter)
    assert memory.in_host_memory() == {"optimizer": 12 * quarter}
    assert memory.autocast_copies == 0
    assert memory.peak == memory.weights + memory.activations + memory.logits


def test_gradients_stay_between_micro_batches(tmp_path: Path) -> None:
    """With accumulation the gradients are there already when a later backward pass begins."""
    model = build_model(WORDS)
    once = estimate_memory(model, cpu_config(tmp_path), BATCH)
    twice = estimate_memory(model, cpu_config(tmp_path, gradient_accumulation_steps=2), BATCH)
    assert twice.peak - once.peak == once.gradients


def kept_by_autograd(model: Any, batch: dict[str, torch.Tensor], bf16: bool) -> int:
    """Bytes that the forward pass leaves for the backward pass, the weights themselves aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(**batch, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": build_model,
    "qwen3": lambda words, **sizes: AutoModelForCausalLM.from_config(
        Qwen3Config(vocab_size=words, head_dim=16, **sizes)
    ),
    "gemma3": lambda words, **sizes: AutoModelForCausalLM.from_config(
        Gemma3TextConfig(vocab_size=words, head_dim=16, sliding_window=64, **sizes)
    ),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(tmp_path: Path, family: str, bf16: bool) -> None:
    """Two more layers make autograd keep as much more as the estimate says, within a tenth: norms
    of heads, norms after attention and MLP, and copies under autocast included.
    """
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 416,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[0, 40:] = 0
    inputs = {"input_ids": torch.ones(3, 50, dtype=torch.long), "attention_mask": mask}
    kept, estimated = [], []
    for layers in (1, 3):
        model = FAMILIES[family](WORDS, num_hidden_layers=layers, **sizes)
        kept.append(kept_by_autograd(model, inputs, bf16))
        batch = Batch(tokens=150, trained_tokens=10, mask_elements=3 * 50**2)
        memory = estimate_memory(model, cpu_config(tmp_path, bf16=bf16), batch)
        estimated.append(memory.activations + memory.autocast_copies)
    assert estimated[1] - estimated[0] == pytest.approx(kept[1] - kept[0], rel=0.1)


def rows_of(lengths: list[int]) -> Dataset:
    """Rows of these lengths, the last two tokens of each trained."""
    return Dataset.from_dict(
        {
            "input_ids": [[1] * length for length in lengths],
            "labels": [[-100] * (length - 2) + [1, 1] for length in lengths],
        }
    )


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(flattened=True, masked=False), Batch(60, 6)),
        (Layout(flattened=True, masked=True), Batch(60, 6, 60**2)),
        (Layout(flattened=False, masked=True), Batch(90, 6, 3 * 30**2)),
        (Layout(flattened=False, masked=False), Batch(90, 6)),
    ],
)
def test_tokens_of_a_batch(tmp_path: Path, layout: Layout, expected: Batch) -> None:
    """A flattened batch holds the sum of its rows, a padded one its rows times the longest; a mask
    is as large as the square of each sequence.
    """
    config = cpu_config(tmp_path, per_device_train_batch_size=3)
    assert largest_batch(rows_of([10, 20, 30]), 30, config, layout) == expected


def test_tokens_of_packs(tmp_path: Path) -> None:
    """Packs are full, and as much of them is trained as of the rows."""
    config = cpu_config(tmp_path, per_device_train_batch_size=2, packing=True, max_length=40)
    layout = Layout(flattened=True, masked=False)
    assert largest_batch(rows_of([10, 20, 30]), 30, config, layout) == Batch(80, 8)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"padding_free": False},
        {"per_device_train_batch_size": 1},
        {"attn_implementation": "eager"},
        {"packing": True},
    ],
)
def test_the_layout_is_the_one_that_trains(
    keys: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    """Whether batches are flattened is planned as the trainer then does it."""
    path = write_recipe(**keys)
    recipe = load_recipe(path)
    planned = plan_layout(recipe, meta_model(recipe))
    assert planned.flattened == trainer_for(path).padding_free


def test_the_peak_is_the_fuller_moment() -> None:
    """Logits and a recomputed layer never meet, nor do all activations and all gradients."""
    begins = Memory(
        weights=0,
        gradients=30,
        optimizer=0,
        autocast_copies=0,
        activations=50,
        recomputed_layer=7,
        logits=9,
        head_gradient=5,
        checkpoint=0,
    )
    ends = dataclasses.replace(begins, activations=20)
    assert (begins.peak, ends.peak) == (59, 37)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide vocabulary, LoRA", "packed 2 x 1,024"])
def test_the_estimate_is_near_the_measured_peak(name: str, tmp_path: Path) -> None:
    """Two of the benchmark's shapes, trained for two steps, take what is estimated, within 25 %."""
    shape = next(shape for shape in SHAPES if shape.name == name)
    assert run_shape(shape, tmp_path).ratio == pytest.approx(1, abs=WANTED_WITHIN)
