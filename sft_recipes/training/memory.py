"""What a training step holds in memory, estimated on a model without memory (torch's meta device).

Weights, gradients and optimizer states are counted exactly. The rest follows from what autograd
keeps of a decoder layer with a gated MLP and grouped-query attention (read off with
`saved_tensors_hooks`, transformers 5.23) and from where this project and TRL compute logits.
Nothing is counted that a measurement did not show: `benchmarks/memory.py` holds the estimate beside
the peak of real runs on a CPU. What libraries take for themselves comes on top.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

# The first stage of ZeRO that splits a part over the processes; later ones do, too
# (Rajbhandari et al. 2020).
_FIRST_STAGE = {"weights": 3, "gradients": 2, "optimizer": 1}
# TRL's fused head computes logits in tiles of so many positions and words (`add_fused_lm_head`; a
# test compares).
TILE_POSITIONS = 4096
TILE_WORDS = 32768


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a launch spreads a model, by the `stage` of ZeRO that splits as much (0: nothing).

    `master_weights`: DeepSpeed keeps 16-bit weights and gradients, and float32 weights beside the
    optimizer's states. `offloaded`: what lies in the host's memory instead. `context`: so many
    processes share a batch, each with a part of every row.
    """

    name: str = "one process"
    processes: int = 1
    stage: int = 0
    master_weights: bool = False
    offloaded: tuple[str, ...] = ()
    context: int = 1

    @property
    def batches(self) -> int:
        """How many batches the processes read at a time."""
        return self.processes // self.context


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-batch of a device.

    `tokens`: positions that pass through the layers, padding included. `trained_tokens`: those with
    a label. `mask_elements`: of the masks that attention is given; 0 where it needs none.
    """

    tokens: int
    trained_tokens: int
    mask_elements: int = 0

    def cut(self, processes: int) -> "Batch":
        """What each of the processes holds that share the batch; context parallel drops the mask."""
        return Batch(-(-self.tokens // processes), -(-self.trained_tokens // processes))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device holds of each part, at the time when it holds most of it.

    `autocast_copies`: 16-bit copies of float32 weights, kept for the backward pass.
    `activations`: what the layers keep for it. `recomputed_layer`: what one layer keeps while
    activation checkpointing goes through it again. `logits`: what the head holds at its loss.
    `head_gradient`: what a tied head's gradient takes until the embedding's is added to it.
    `checkpoint`: what trained weights and optimizer states of all devices take on disk.
    `accumulates`: gradients are there already when a micro-batch begins.
    `offloaded`: parts in the host's memory.
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

        When the backward pass begins, all activations are there, with the logits or the last
        layer. When it ends, the gradients are, with the first layer or those of the embedding.
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


def estimate_memory(
    model: Any,
    config: SFTConfig,
    batch: Batch,
    strategy: Strategy | None = None,
    quantized: float | None = None,
) -> Memory:
    """Bytes a device, for a model with memory or without, with its adapter if it gets one.

    `config` is the run's; it says whether logits are computed as on a CPU or as on CUDA.
    `quantized`: bytes a weight of linear layers that are still to be quantized.
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
        # Of float32 weights, which are kept beside.
        states = 4 * trained_count + _optimizer_bytes(config, trained_count, 4 * trained_count)
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
    """Two moments as wide as the weights, or of 8 bits. Without moments it is next to nothing."""
    name = OptimizerNames(config.optim).value
    if "8bit" in name:
        return 2 * trained_count
    if "adam" in name:
        return 2 * trained_bytes
    return 0


def _share(size: float, part: str, strategy: Strategy) -> int:
    if strategy.stage >= _FIRST_STAGE[part]:
        size /= strategy.processes
    return round(size)


def _weight_bytes(model: Any, quantized: float | None) -> float:
    """Quantization covers frozen weights of linear layers, except the head."""
    total: float = sum(parameter.nbytes for parameter in model.parameters())
    if quantized is None:
        return total
    for weight in _layer_matrices(model):
        if not weight.requires_grad:
            total += weight.numel() * quantized - weight.nbytes
    return total


def _layer_matrices(model: Any) -> Iterator[torch.Tensor]:
    """The weights of all linear layers but the head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield module.weight


def _autocasts(config: SFTConfig) -> bool:
    return bool(config.bf16 or config.fp16)


def _compute_width(model: Any, config: SFTConfig) -> int:
    """Bytes of a number in the matrix products."""
    if _autocasts(config):
        return 2
    return int(model.get_input_embeddings().weight.element_size())


def _autocast_bytes(model: Any, config: SFTConfig, strategy: Strategy) -> int:
    """Of the layers' float32 weights; the head's copy counts as a part of the logits.

    With activation checkpointing they end with the forward pass, before the peak: measured on a
    94-million-parameter Llama, 0.31 GB above weights and optimizer states at that time and 0.56 GB
    at the peak. Where weights are sharded, or 16 bits wide beside float32 ones, they are made
    layer by layer or not at all.
    """
    if not _autocasts(config) or config.activation_checkpointing:
        return 0
    if strategy.stage == _FIRST_STAGE["weights"] or strategy.master_weights:
        return 0
    copied = 0
    for weight in _layer_matrices(model):
        if weight.dtype == torch.float32:
            copied += weight.numel()
    return 2 * copied


@dataclass(frozen=True, slots=True)
class _Widths:
    """Elements of one position's vectors in a layer; `normalized`: of all that go into norms."""

    hidden: int
    attention: int
    key_value: int
    mlp: int
    normalized: int


def _widths(model: Any) -> _Widths:
    text = model.config.get_text_config()
    hidden = int(text.hidden_size)
    heads = getattr(text, "num_attention_heads", None) or 1
    head_width = getattr(text, "head_dim", None) or hidden // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    attention = heads * head_width
    key_value = groups * head_width
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        # An expert also keeps what it is given and what it returns, beside four vectors of its own.
        mlp = experts * (getattr(text, "moe_intermediate_size", mlp) + hidden // 2)
    norms = [norm.weight.numel() for norm in _norms(model)]
    normalized = norms.count(hidden) // text.num_hidden_layers * hidden
    if head_width != hidden and head_width in norms:
        normalized += attention + key_value
    return _Widths(hidden, attention, key_value, mlp, normalized)


def _norms(model: Any) -> Iterator[Any]:
    """Layer norms and RMS norms with a scale."""
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm")
        if is_norm and getattr(module, "weight", None) is not None:
            yield module


def _activation_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """What all layers keep from the forward pass on; with activation checkpointing their inputs."""
    text = model.config.get_text_config()
    layers = int(text.num_hidden_layers)
    if not config.activation_checkpointing:
        return layers * _layer_bytes(model, config, batch)
    # Autocast leaves the sum over layers in the embedding's type.
    width = int(model.get_input_embeddings().weight.element_size())
    return layers * batch.tokens * int(text.hidden_size) * width


def _recomputed_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """One layer again, and two gradients of the MLP's width that its backward pass holds beside it.

    Without these, 4 rows of 2,048 tokens were estimated at 0.84 of the peak, with them at 0.94.
    """
    if not config.activation_checkpointing:
        return 0
    gradients = 2 * _widths(model).mlp * _compute_width(model, config)
    return _layer_bytes(model, config, batch) + batch.tokens * gradients


def _layer_bytes(model: Any, config: SFTConfig, batch: Batch) -> int:
    """What autograd keeps of one layer: vectors of each position, and the mask as numbers."""
    compute = _compute_width(model, config)
    position = _norm_bytes(model) + _dropout_bytes(model, config)
    position += compute * _vectors(model, config, batch)
    return batch.tokens * position + compute * batch.mask_elements


def _vectors(model: Any, config: SFTConfig, batch: Batch) -> int:
    """Elements of a position that go into matrix products, attention and activation function."""
    widths = _widths(model)
    # Query, key and value share an input, gate and up another ...
    inputs = 2 * widths.hidden
    if _autocasts(config) or _dropped_out(model):
        # ... unless each makes a copy of its own.
        inputs = 5 * widths.hidden
    key_value = widths.key_value
    if config.use_cpu or batch.mask_elements:
        # Repeated for every query head; only kernels without a mask on CUDA do without.
        key_value = widths.attention
    query_and_result = 2 * widths.attention
    gate_activation_up_product = 4 * widths.mlp
    return inputs + query_and_result + 2 * key_value + gate_activation_up_product


def _norm_bytes(model: Any) -> int:
    """Norms compute in float32; where their scales are trained, they keep the normalized vector."""
    kept = 4 * _widths(model).normalized
    if any(norm.weight.requires_grad for norm in _norms(model)):
        kept *= 2
    return kept


def _dropout_bytes(model: Any, config: SFTConfig) -> int:
    """Which numbers LoRA dropped: CPUs keep that as float32, CUDA as one byte each."""
    dropped_out = _dropped_out(model) // int(model.config.get_text_config().num_hidden_layers)
    if config.use_cpu:
        return 4 * dropped_out
    return dropped_out


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
    """Whole for trained positions where `RecipeTrainer` computes them (CPU, MPS), else in tiles."""
    head = model.get_output_embeddings().weight
    if not config.use_cpu and not torch.backends.mps.is_available():
        return _tile_bytes(head, _compute_width(model, config), batch.trained_tokens)
    # Log-probabilities, their gradient and that of the logits, in float32. Measured: 1,626 MB for
    # 514 positions of 262,144 words, by this count 1,617.
    whole = 3 * 4 * batch.trained_tokens * head.shape[0]
    if _autocasts(config) and head.dtype == torch.float32:
        whole += 2 * head.numel()
    return whole


def _tile_bytes(head: torch.Tensor, compute: int, positions: int) -> int:
    """TRL's fused head: logits and words of one tile, and the head's gradient summed in float32."""
    logits = min(positions, TILE_POSITIONS) * TILE_WORDS
    words = TILE_WORDS * head.shape[1]
    gradient = 0
    if head.requires_grad:
        gradient = 4 * head.numel()
    return compute * (logits + words) + gradient


def _head_gradient_bytes(model: Any, config: SFTConfig) -> int:
    """A tied head's gradient waits for the embedding's, which counts as the weight's own.

    Measured on a CPU with 262,144 x 640 weights: three matrices at that time in float32, where the
    sum takes one of its own, and two under autocast.
    """
    head = model.get_output_embeddings().weight
    if not head.requires_grad or head is not model.get_input_embeddings().weight:
        return 0
    if config.use_cpu and not _autocasts(config):
        return 2 * 4 * head.numel()
    return 4 * head.numel()
