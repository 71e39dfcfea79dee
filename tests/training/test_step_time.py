"""The time of a step follows from operations that are counted and a speed that is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import step_time
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.check import Layout, mean_batch
from sft_recipes.training.construction import meta_model
from sft_recipes.training.step_time import (
    MeanBatch,
    StepTime,
    estimate_step_time,
    layer_operations,
    measure_speed,
)
from tests.tiny_architectures import ARCHITECTURES, build_base
from tests.training.test_memory import rows_of


def empty(config: Any) -> Any:
    """A model of shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_operations_are_those_of_the_matrices() -> None:
    """Known by hand for a Llama: 6 operations a trained weight of a layer and token, 4 a frozen one, 2 more where
    the forward pass is repeated; embedding, head and norms are not counted.
    """
    model = empty(
        LlamaConfig(
            vocab_size=100,
            hidden_size=8,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20)
    assert layer_operations(model) == 6 * weights
    assert layer_operations(model, recompute=True) == 8 * weights
    model.requires_grad_(False)
    assert layer_operations(model) == 4 * weights


def test_experts_count_as_often_as_a_token_passes_one() -> None:
    """Of 8 experts a token passes 2: a quarter of their weights is multiplied."""
    shape = {
        "vocab_size": 100,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    router = 8 * 8
    operations = layer_operations(empty(Qwen3MoeConfig(**shape)))
    assert operations == 6 * (attention + router + 8 * 3 * 8 * 16 / 4)


def test_a_step_is_all_its_operations_at_the_measured_price(
    write_recipe: Callable[..., Path],
) -> None:
    """Twice the accumulation and twice the tokens are twice the operations each; the time is their quotient."""
    assert StepTime(operations=6e9, operations_a_second=2e9).seconds == 3
    recipe = load_recipe(write_recipe(gradient_accumulation_steps=2))
    model = meta_model(recipe)
    step = estimate_step_time(recipe, model, sft_config(recipe), MeanBatch(64, 16, 20))
    head = model.get_output_embeddings().weight.numel()
    assert step.operations == 2 * (64 * layer_operations(model) + 20 * 6 * head)
    assert step.operations_a_second > 0


@pytest.mark.parametrize(
    ("in_bfloat16", "speed", "gain"), [(150.0, 150.0, 1.5), (101.0, 100.0, 1.0)]
)
def test_bfloat16_counts_where_it_is_faster(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    in_bfloat16: float,
    speed: float,
    gain: float,
) -> None:
    """A run that may take bfloat16 is timed in it where that pays, and how much it pays is kept."""

    def measured(*_: Any, bfloat16: bool = False) -> float:
        return in_bfloat16 if bfloat16 else 100.0

    monkeypatch.setattr(step_time, "measure_speed", measured)
    monkeypatch.setattr(step_time, "may_take_bfloat16", lambda *_: True)
    recipe = load_recipe(write_recipe())
    step = estimate_step_time(recipe, meta_model(recipe), sft_config(recipe), MeanBatch(64, 16, 20))
    assert (step.operations_a_second, step.bfloat16_gain) == (speed, gain)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_layer_of_every_architecture_is_measured(
    name: str, lora: bool, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A layer with the recipe's adapter runs forward and backward, whatever the model is called."""
    base = build_base(name, tmp_path / "base")
    adapter = {"use_peft": True, "lora_dropout": 0.0} if lora else {}
    recipe = load_recipe(write_recipe(model_name_or_path=str(base), **adapter))
    assert measure_speed(recipe, sft_config(recipe), MeanBatch(32, 16, 8)) > 0


def test_the_mean_batch_is_what_passes_through_the_layers(
    write_recipe: Callable[..., Path],
) -> None:
    """Rows of 10, 20 and 30 tokens: flattened three of them are 60 tokens; padded each is as long as the longest."""
    recipe = load_recipe(write_recipe(per_device_train_batch_size=3))
    rows = rows_of([10, 20, 30])
    flattened = mean_batch(rows, sft_config(recipe), Layout(flattened=True, masked=False))
    padded = mean_batch(rows, sft_config(recipe), Layout(flattened=False, masked=True))
    assert (flattened.tokens, flattened.length) == (60, 20)
    assert (padded.tokens, padded.length) == (90, 30)
    assert flattened.trained_tokens == padded.trained_tokens
