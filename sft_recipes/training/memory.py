"""What a training step holds in memory, estimated on a model without memory (torch's meta device).

Weights, gradients and optimizer states are counted exactly. The rest follows from what autograd keeps of a decoder
layer with a gated MLP and grouped-query attention (read off with `saved_tensors_hooks`, transformers 5.23) and from
where this project and TRL compute logits. Nothing is counted that a measurement did not show: `benchmarks/memory.py`
holds the estimate beside the peak of real runs on a CPU. What libraries take for themselves comes on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.tuners.lora import LoraLayer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

# The first stage of ZeRO that splits a part over the processes; later ones do, too (Rajbhandari et al. 2020).
_FIRST_STAGE = {"weights": 3, "gradients": 2, "optimizer": 1}
# TRL's fused head computes logits in tiles of so many positions and words (`add_fused_lm_head`; a test compares).
TILE_POSITIONS = 4096
TILE_WORDS = 32768


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a launch spreads a model, by the `stage` of ZeRO that splits as much (0: nothing is split).

    `master_weights`: DeepSpeed keeps 16-bit weights and gradients, and float32 weights beside the optimizer's states.
    `offloaded`: what lies in the host's memory instead.
    """

    name: str = "one process"
    processes: int = 1
    stage: int = 0
    master_weights: bool = False
    offloaded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-batch of a device.

    `tokens`: positions that pass through the layers, padding included. `trained_tokens`: those with a label.
    `mask_elements`: of the masks that attention is given, over all sequences; 0 where it needs none.
    """

    tokens: int
    trained_tokens: int
    mask_elements: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device holds of each part, at the time when it holds most of it.

    `autocast_copies`: 16-bit copies of float32 weights that the backward pass waits for.
    `activations`: what the layers keep for the backward pass; `recomputed_layer`: what one layer keeps while activation
    checkpointing goes through it again. `logits`: what the head holds between its forward and its backward pass.
    `head_gradient`: what a tied head's gradient takes until the embedding's is added to it.
    `checkpoint`: what the trained weights and the optimizer's states of all devices take on disk.
    `accumulates`: gradients are there already when a micro-batch begins. `offloaded`: parts in the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    autocast_copies: int
    activations: int
    recomputed_layer: int
    logits: int
    head_gradient: int
    checkpoint: int
    accumulates: bool = False
    offloaded: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the fuller of two moments.

        When the backward pass begins, all activations are there, with the logits or the last layer; when it ends, they
        are gone and the gradients are there, with the first layer or the gradients of the embedding.
        """
        begin = self.autocast_copies + self.activations + max(self.logits, self.recomputed_layer)
        if self.accumulates:
            begin += self.gradients
        end = self.gradients + max(self.recomputed_layer, self.head_gradient)
        held = self.by_name()
        always = held.get("weights", 0) + held.get("optimizer", 0)
        return always + max(begin, end)

    def by_name(self) -> dict[str, int]:
        """The parts on the device."""
        parts = self._all_parts()
        return {name: size for name, size in parts.items() if name not in self.offloaded}

    def in_host_memory(self) -> dict[str, int]:
        """The parts that were offloaded."""
        parts = self._all_parts()
        return {name: parts[name] for name in self.offloaded}

    def _all_parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "autocast copies": self.autocast_copies,
            "activations": self.activations,
            "recomputed layer": self.recomputed_layer,
            "logits": self.logits,
            "head gradient": self.head_gradient,
        }


def read_strategy(config: Path, processes: int | None) -> Strategy:
    """The strategy of an accelerate config, read as `accelerate launch` reads it."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    count = processes or int(content.get("num_processes") or 1)
    name = f"{config.stem} on {count} processes"
    kind = content.get("distributed_type")
    if kind == "FSDP":
        reshards = content.get("fsdp_config", {}).get("fsdp_reshard_after_forward", True)
        return Strategy(name, count, stage=3 if reshards else 2)
    if kind != "DEEPSPEED":
        return Strategy(name, count)
    deepspeed: Mapping[str, Any] = content["deepspeed_config"]
    offloaded = []
    if deepspeed.get("offload_param_device", "none") != "none":
        offloaded.append("weights")
    if deepspeed.get("offload_optimizer_device", "none") != "none":
        offloaded.append("optimizer")
    return Strategy(
        name,
        count,
        stage=int(deepspeed["zero_stage"]),
        master_weights=True,
        offloaded=tuple(offloaded),
    )


def estimate_memory(
    model: Any,
    config: SFTConfig,
    batch: Batch,
    strategy: Strategy | None = None,
    quantized: float | None = None,
) -> Memory:
    """Bytes a device, for a model with memory or without, with its adapter if it gets one.

    `config` is the run's; it says whether logits are computed as on a CPU or as on CUDA. `quantized`: bytes a weight
    of linear layers that are still to be quantized.
    """
    strategy = strategy or Strategy()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_count = sum(parameter.numel() for parameter in trained)
    weights = _weight_bytes(model, quantized)
    gradients = sum(parameter.nbytes for parameter in trained)
    states = _optimizer_bytes(config, trained_count, gradients)
    if strategy.master_weights and _autocasts(config):
        weights = 2 * sum(parameter.numel() for parameter in model.parameters())
        gradients = 2 * trained_count
        # Weights and two moments in float32.
        states = 12 * trained_count if states else 0
    return Memory(
        weights=_share(weights, "weights", strategy),
        gradients=_share(gradients, "gradients", strategy),
        optimizer=_share(states, "optimizer", strategy),
        autocast_copies=_autocast_bytes(model, config, strategy),
        activations=_activation_bytes(model, config, batch),
        recomputed_layer=_recomputed_bytes(model, config, batch),
        logits=_logits_bytes(model, config, batch),
        head_gradient=_head_gradient_bytes(model, config),
        checkpoint=gradients + states,
        accumulates=config.gradient_accumulation_steps > 1,
        offloaded=strategy.offloaded,
    )


def _optimizer_bytes(config: SFTConfig, trained_count: int, trained_bytes: int) -> int:
    """Two moments as wide as the weights, or of 8 bits; optimizers without moments keep next to nothing."""
    name = OptimizerNames(config.optim).value
    if "8bit" in name:
        return 2 * trained_count
    return 2 * trained_bytes if "adam" in name else 0


def _share(size: float, part: str, strategy: Strategy) -> int:
    if strategy.stage >= _FIRST_STAGE[part]:
        size /= strategy.processes
    return round(size)


def _autocasts(config: SFTConfig) -> bool:
    return bool(config.bf16 or config.fp16)


def _compute_width(model: Any, config: SFTConfig) -> int:
    """Bytes of a number in the matrix products."""
    return 2 if _autocasts(config) else int(model.get_input_embeddings().weight.element_size())


def _hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _weight_bytes(model: Any, quantized: float | None) -> float:
    """Quantization covers frozen weights of linear layers, except the head."""
    total: float = sum(parameter.nbytes for parameter in model.parameters())
    if quantized is None:
        return total
    head = model.get_output_embeddings()
    for module in model.modules():
        frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if frozen and module is not head:
            total += module.weight.numel() * quantized - module.weight.nbytes
    return total


def _autocast_bytes(model: Any, config: SFTConfig, strategy: Strategy) -> int:
    """Of the layers' float32 weights; the head's copy counts as a part of the logits.

    With activation checkpointing they end with the forward pass, before the peak: measured on a 94-million-parameter
    Llama, 0.31 GB above weights and optimizer states at that time and 0.56 GB at the peak. Where weights are sharded,
    or 16 bits wide beside float32 ones, they are made layer by layer or not at all.
    """
    if not _autocasts(config) or config.activation_checkpointing:
        return 0
    if strategy.stage == _FIRST_STAGE["weights"] or strategy.master_weights:
        return 0
    head = model.get_output_embeddings()
    copied = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            copied += module.weight.numel() if module.weight.dtype == torch.float32 else 0
    return 2 * copied


@dataclass(frozen=True, slots=True)
class _Widths:
    """Elements of one position's vectors in a layer."""

    hidden: int
    attention: int
    key_value: int
    mlp: int
    normalized: int


def _widths(model: Any) -> _Widths:
    text = model.config.get_text_config()
    hidden = _hidden_size(model)
    heads = getattr(text, "num_attention_heads", None) or 1
    head_width = getattr(text, "head_dim", None) or hidden // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    attention, key_value = heads * head_width, groups * head_width
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        # Each expert also keeps the vectors that it is given and that it returns, beside four of its own width.
        mlp = experts * (getattr(text, "moe_intermediate_size", mlp) + hidden // 2)
    norms = [_norm_width(module) for module in model.modules()]
    normalized = norms.count(hidden) // text.num_hidden_layers * hidden
    if head_width != hidden and head_width in norms:
        normalized += attention + key_value
    return _Widths(hidden, attention, key_value, mlp, normalized)


def _norm_width(module: Any) -> int:
    """Width of a layer norm or RMS norm; 0 for other modules."""
    if not type(module).__name__.endswith("Norm"):
        return 0
    weight = getattr(module, "weight", None)
    return 0 if weight is None else int(weight.numel())


def _activation_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """What all layers keep from the forward pass on; with activation checkpointing it is their inputs."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    if not config.activation_checkpointing:
        return layers * _layer_bytes(model, config, batch)
    # Autocast leaves the sum over layers in the embedding's type.
    residual = _hidden_size(model) * model.get_input_embeddings().weight.element_size()
    return layers * batch.tokens * int(residual)


def _recomputed_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """One layer again, and the gradients of two vectors of the MLP's width that its backward pass holds beside it.

    Without those, 4 rows of 2,048 tokens were estimated at 0.84 of the peak, with them at 0.94.
    """
    if not config.activation_checkpointing:
        return 0
    gradients = 2 * _widths(model).mlp * _compute_width(model, config)
    return _layer_bytes(model, config, batch) + batch.tokens * gradients


def _layer_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """What autograd keeps of one layer: the inputs of its norms, matrices, attention and activation function."""
    widths = _widths(model)
    compute = _compute_width(model, config)
    # Norms compute in float32; a trained scale needs the normalized vector, too.
    norms = 4 * widths.normalized * (2 if _trains_norms(model) else 1)
    dropped_out = _dropped_out(model)
    # Query, key and value share an input, gate and up another, unless each makes a copy of its own.
    inputs = 5 if _autocasts(config) or dropped_out else 2
    repeated = config.use_cpu or batch.mask_elements > 0
    key_value = widths.attention if repeated else widths.key_value
    # Query, key, value and result; gate, its activation, up, and their product.
    elements = inputs * widths.hidden + 2 * widths.attention + 2 * key_value + 4 * widths.mlp
    # CPUs keep which numbers were dropped as float32, CUDA as one byte each.
    layers = model.config.get_text_config().num_hidden_layers
    dropout = dropped_out // layers * (4 if config.use_cpu else 1)
    return batch.tokens * (norms + compute * elements + dropout) + compute * batch.mask_elements


def _trains_norms(model: Any) -> bool:
    norms = [module for module in model.modules() if _norm_width(module)]
    return any(norm.weight.requires_grad for norm in norms)


def _dropped_out(model: Any) -> int:
    """Elements of a position that LoRA's dropout goes over, in all layers."""
    elements = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            dropouts = module.lora_dropout.values()
            if any(isinstance(dropout, torch.nn.Dropout) for dropout in dropouts):
                elements += int(module.in_features or 0)
    return elements


def _logits_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    head = model.get_output_embeddings().weight
    words, hidden = head.shape
    if _computes_logits_in_tiles(config):
        tile = min(batch.trained_tokens, TILE_POSITIONS) * TILE_WORDS
        gradient = 4 * words * hidden if head.requires_grad else 0
        return _compute_width(model, config) * (tile + TILE_WORDS * hidden) + gradient
    # Log-probabilities, their gradient and that of the logits, in float32: 1,626 MB measured for 514 positions of
    # 262,144 words, 1,617 by this count. Beside them autocast's copy of the head.
    copied = _autocasts(config) and head.dtype == torch.float32
    return 3 * 4 * batch.trained_tokens * words + (2 * words * hidden if copied else 0)


def _computes_logits_in_tiles(config: SFTConfig) -> bool:
    """Whether TRL's fused head is used; `RecipeTrainer` computes logits of trained positions whole on CPU and MPS."""
    return not config.use_cpu and not torch.backends.mps.is_available()


def _head_gradient_bytes(model: Any, config: SFTConfig) -> int:
    """A tied head's gradient waits for the embedding's, which counts as the weight's own.

    Measured on a CPU with 262,144 x 640 weights: three matrices at that time in float32, where the sum takes one of its
    own, and two under autocast.
    """
    head = model.get_output_embeddings().weight
    if not head.requires_grad or head is not model.get_input_embeddings().weight:
        return 0
    sums_apart = config.use_cpu and not _autocasts(config)
    return 4 * head.numel() * (2 if sums_apart else 1)
