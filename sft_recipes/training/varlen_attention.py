"""Attention for flattened batches: each row attends within its own boundaries, without a mask over the whole batch.

Packed and padding-free batches hold several rows in one sequence of T tokens. Under sdpa transformers keeps them apart
by a T x T mask, which is built, read and mostly wasted. TRL hands over where rows begin (`cu_seq_lens`), so here
attention runs row by row: on CUDA in torch's own kernel (`torch.nn.attention.varlen`, torch 2.11 and later), on a CPU
in one sdpa call a row. Calls without boundaries (generation, padded batches) are plain sdpa.
"""

import importlib.util
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
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

# Whether the forward pass that runs now was told where rows begin. Masks are made before attention is called, and are
# not told.
_boundaries_given: ContextVar[bool] = ContextVar("boundaries_given", default=False)


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
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in transformers' calling convention: `[1, heads, T, width]` in, `[1, T, heads, width]` out."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
    query, key, value = _in_compute_dtype(query, key, value)
    if _runs_in_kernel(query):
        rows = _in_one_kernel(
            query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window
        )
        return rows, None
    rows = _row_by_row(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return rows.transpose(1, 2).contiguous(), None


def _runs_in_kernel(query: torch.Tensor) -> bool:
    return query.device.type == "cuda"


def varlen_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """The mask that sdpa takes, or none where row boundaries take its place."""
    if _boundaries_given.get():
        return None
    mask: torch.Tensor | None = sdpa_mask(*arguments, **options)
    return mask


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
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """torch's kernel, which takes and gives `[T, heads, width]`; gives `[1, T, heads, width]`."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.11 and later

    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and "enable_gqa" in KERNEL_OPTIONS:
        grouped = {"enable_gqa": True}
    elif query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    left = -1 if window is None else window - 1
    rows: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **grouped,
    )
    return rows[None]


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One sdpa call for each row: the work is the sum of the rows' squares, not the square of their sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = []
    for start, end in pairwise(boundaries.tolist()):
        band = _band(end - start, window, query.device)
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
    _boundaries_given.set(options.get("cu_seq_lens_q") is not None)


def _forget_boundaries(*_: Any) -> None:
    _boundaries_given.set(False)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
