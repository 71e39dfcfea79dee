"""Attention for flattened batches: each row attends within its own boundaries, without a mask over the whole batch.

Packed and padding-free batches hold several rows in one sequence of T tokens. Under sdpa transformers keeps them apart
by a T x T mask, which is built, read and mostly wasted. TRL hands over where rows begin (`cu_seq_lens`), so here
attention runs row by row: on CUDA in torch's own kernel (`torch.nn.attention.varlen`, torch 2.11 and later), on a CPU
in one sdpa call a row.

Rows and window come from the mask, as under sdpa, and not from what a model passes to its attention beside it: some
models pass no boundaries on (StableLM, Nemotron), others a window that their mask does not have (PhiMoE). Where a mask
is more than causal or sliding, and where no boundaries are given (generation, padded batches), it is plain sdpa.
"""

import importlib.util
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.upstream.attention import takes_row_boundaries

VARLEN = "varlen_attn"
# Of the flash attention kernel behind torch's function.
LARGEST_HEAD = 256
# Settings of models whose attention is more than a causal softmax over a row or a window of it.
_UNLIKE_PLAIN_ATTENTION = {
    "attn_logit_softcapping": "the model caps attention scores",
    "attention_dropout": "the model drops attention weights out",
    "attention_chunk_size": "the model attends in chunks",
    "use_bidirectional_attention": "the model attends in both directions",
    "v_head_dim": "the model's values have a width of their own",
}
# What a model may pass to its attention that changes the scores: never to be left out in silence.
_NOT_KNOWN_TO_KERNELS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class RowBoundaries:
    """Where the rows of a flattened batch begin, and the end of the last: `[rows + 1]`; tokens of the longest."""

    starts: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class RowMask:
    """Stands in the place of a mask: causal within each row, for as many tokens back as `window` (None: all)."""

    boundaries: RowBoundaries
    window: int | None


# Of the forward pass that runs now: what makes masks is not told.
_boundaries: ContextVar[RowBoundaries | None] = ContextVar("boundaries", default=None)


def _kernel_options() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


# The arguments that this torch's kernel takes; none where there is no such kernel.
KERNEL_OPTIONS = _kernel_options()


def supports_varlen(model: Any, device: str | None = None) -> str:
    """Why this model cannot use it, in words; empty if it can. `device`: cpu or cuda, if the model is to move there."""
    config = model.config.get_text_config()
    device = device or model.device.type
    if device == "cuda" and not {"scale", "window_size"} <= KERNEL_OPTIONS:
        return "torch before 2.11 has no such kernel"
    if device not in ("cpu", "cuda"):
        return f"not made for {device}"
    if not takes_row_boundaries(model):
        return "the model does not take row boundaries"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "the model has attention sinks"
    for setting, reason in _UNLIKE_PLAIN_ATTENTION.items():
        if getattr(config, setting, None):
            return reason
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device == "cuda" and (head > LARGEST_HEAD or head % 8):
        return f"heads of {head} are not for the kernel (multiples of 8 up to {LARGEST_HEAD})"
    return ""


def use_varlen(model: Any) -> None:
    """Switch a loaded model to it. Before PEFT wraps the model, which calls the inner forward without its hooks."""
    model.set_attn_implementation(VARLEN)
    backbones = {id(module): module for module in (model.base_model, model.get_decoder())}
    for backbone in backbones.values():
        backbone.register_forward_pre_hook(_note_boundaries, with_kwargs=True)
        backbone.register_forward_hook(_forget_boundaries, always_call=True)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RowMask | torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in transformers' calling convention: `[1, heads, T, width]` in, `[1, T, heads, width]` out."""
    if not isinstance(attention_mask, RowMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    for name in _NOT_KNOWN_TO_KERNELS:
        if others.get(name) is not None:
            raise ValueError(f"{VARLEN} knows no {name}; use attn_implementation: sdpa or eager")
    query, key, value = _in_compute_dtype(query, key, value)
    if _runs_in_kernel(query):
        return _in_one_kernel(query, key, value, attention_mask, scaling), None
    rows = _row_by_row(query, key, value, attention_mask, scaling)
    return rows.transpose(1, 2).contiguous(), None


def _runs_in_kernel(query: torch.Tensor) -> bool:
    return query.device.type == "cuda"


def varlen_mask(**options: Any) -> RowMask | torch.Tensor | None:
    """The mask that sdpa takes, or rows and window in its place where that is all it would say."""
    boundaries = _boundaries.get()
    # transformers says by these two that a mask is of a model's own making, or sees in both directions.
    is_special = options.get("use_vmap") or "allow_is_bidirectional_skip" in options
    if boundaries is None or is_special:
        mask: torch.Tensor | None = sdpa_mask(**options)
        return mask
    return RowMask(boundaries, options.get("local_size"))


def _in_compute_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Under autocast rotary embeddings leave float32 behind, which the matrix products around them do not use."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    return list(tensors)


def _in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    scaling: float | None,
) -> torch.Tensor:
    """torch's kernel, which takes and gives `[T, heads, width]`; gives `[1, T, heads, width]`."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.11 and later

    grouped: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in KERNEL_OPTIONS:
        grouped = {"enable_gqa": True}
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    starts = mask.boundaries.starts
    longest = mask.boundaries.longest
    tokens_back = -1 if mask.window is None else mask.window - 1
    rows: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(tokens_back, 0),
        **grouped,
    )
    return rows[None]


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    scaling: float | None,
) -> torch.Tensor:
    """One sdpa call for each row: the work is the sum of the rows' squares, not the square of their sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = []
    for start, end in pairwise(mask.boundaries.starts.tolist()):
        band = _band(end - start, mask.window, query.device)
        row = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
        )
        rows.append(row)
    return torch.cat(rows, dim=2)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which positions each one sees in a sliding window; none is needed where the row fits into it."""
    if window is None or length <= window:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


def _note_boundaries(
    _: torch.nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    starts = options.get("cu_seq_lens_q")
    if starts is None:
        _boundaries.set(None)
    else:
        _boundaries.set(RowBoundaries(starts, options["max_length_q"]))


def _forget_boundaries(*_: Any) -> None:
    _boundaries.set(None)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
