"""How long a step takes on this machine, before any weight is loaded: operations counted, speed measured.

One layer of the model is made with random weights and trained on rows as long as the recipe's; what
its matrix products take there, with norms, attention and activation function around them, is the
price of an operation. A step is all operations of its layers and its head at that price.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from sft_recipes.models import model_dtype
from sft_recipes.recipe import Recipe
from sft_recipes.training.construction import adapted, base_config
from sft_recipes.training.precision import (
    LEAST_GAIN,
    may_take_bfloat16,
    settle_frozen_weights,
)

# One layer is tried at most so often and so long, after one round to warm up. The fastest round
# counts, for what other programs take only adds.
_ROUNDS = 9
_SECONDS = 1.0
# A round of more operations is made shorter: 0.3 s on two cores at 170 billion operations a second.
_MOST_OPERATIONS = 5e10
# The words of the model that is tried: its head and its embedding are not what is measured.
_FEW_WORDS = 8


@dataclass(frozen=True, slots=True)
class MeanBatch:
    """A micro-batch as most of them are: `tokens` go through the layers, padding included, in rows
    of `length`; `trained_tokens` of them have a label.
    """

    tokens: int
    length: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """What an optimizer step computes, how fast this machine is at it, and what follows.

    `bfloat16_gain`: how many times as fast as in float32, where a run is thought to take bfloat16.
    """

    operations: float
    operations_a_second: float
    bfloat16_gain: float = 1.0

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.operations / self.operations_a_second


def estimate_step_time(recipe: Recipe, model: Any, config: SFTConfig, batch: MeanBatch) -> StepTime:
    """The time of a step of this process. `model`: of shapes alone, with its adapter.

    Raises what libraries raise for a model that is not made with one layer.
    """
    layers = layer_operations(model, recompute=bool(config.activation_checkpointing))
    head = model.get_output_embeddings().weight
    in_a_batch = layers * batch.tokens + _passes(head) * head.numel() * batch.trained_tokens
    speed = measure_speed(recipe, config, batch)
    gain = 1.0
    if may_take_bfloat16(recipe, model):
        # The run tries both on its weights; here they are thought to give the same loss.
        gain = measure_speed(recipe, config, batch, bfloat16=True) / speed
        if gain < LEAST_GAIN:
            gain = 1.0
    return StepTime(in_a_batch * config.gradient_accumulation_steps, speed * gain, gain)


def layer_operations(model: Any, recompute: bool = False) -> float:
    """Operations of the layers' matrix products for one token, forward and backward.

    `recompute`: activation checkpointing goes forward twice.
    """
    operations = 0.0
    for weight in _matrices(model):
        passes = _passes(weight.parameter)
        if recompute:
            passes += 2
        operations += passes * weight.parameter.numel() * weight.share
    return operations


def _passes(weight: torch.Tensor) -> int:
    """Operations of a weight for a token: a product is two forward and two for what came in.

    Two more are the weight's own gradient, which a frozen one does not need.
    """
    return 6 if weight.requires_grad else 4


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight of the layers; `share`: of the tokens that are multiplied with it."""

    parameter: torch.Tensor
    share: float


def _matrices(model: Any) -> Iterator[_Matrix]:
    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    outside = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(parameter is weight for weight in outside):
            continue
        share = 1.0
        if experts and chosen and ".experts." in name:
            share = chosen / experts
        yield _Matrix(parameter, share)


def measure_speed(
    recipe: Recipe, config: SFTConfig, batch: MeanBatch, bfloat16: bool = False
) -> float:
    """Operations a second, of one layer of the model with the recipe's adapter.

    `bfloat16`: as a run on a CPU that decides for it.
    """
    autocast: torch.dtype | None = None
    if config.bf16 or bfloat16:
        autocast = torch.bfloat16
    elif config.fp16:
        autocast = torch.float16
    device = torch.device("cpu")
    if not config.use_cpu:
        device = torch.accelerator.current_accelerator() or device
    with device:
        layer = _one_layer(recipe, device, bfloat16)
        tokens = min(batch.tokens, int(_MOST_OPERATIONS / layer_operations(layer)) + 1)
        length = min(batch.length, tokens)
        rows = max(tokens // length, 1)
        hidden = layer.config.get_text_config().hidden_size
        vectors = torch.randn(rows, length, hidden, requires_grad=True)
    seconds: list[float] = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        _train(layer, vectors, autocast, device)
        seconds.append(time.perf_counter() - begin)
        if sum(seconds[1:]) > _SECONDS:
            break
    return layer_operations(layer) * rows * length / min(seconds[1:])


def _one_layer(recipe: Recipe, device: torch.device, bfloat16: bool) -> Any:
    """The model with one layer and next to no words, its adapter included, weights by chance."""
    config = base_config(recipe.model_name, recipe.model.get("model_revision", "main"))
    text = config.get_text_config()
    text.num_hidden_layers = 1
    text.vocab_size = _FEW_WORDS
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    dtype = getattr(torch, model_dtype(recipe))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bfloat16:
        settle_frozen_weights(recipe, model, {"bf16": True})
    return adapted(recipe, model, str(device)).train()


def _train(
    layer: Any, vectors: torch.Tensor, autocast: torch.dtype | None, device: torch.device
) -> None:
    """Forward and backward once, in the precision of the run."""
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        logits = layer(inputs_embeds=vectors, use_cache=False).logits
    logits.float().sum().backward()
    if device.type != "cpu":
        torch.accelerator.synchronize()
