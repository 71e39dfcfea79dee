"""What all prompts of a batch begin with goes through the model once.

A system prompt, or the training rows in front of each question, are the same ids in every prompt:
behind eight of them a question is a tenth of its prompt. The keys and values of the common
beginning are computed for one row and repeated for the others.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache

from sft_recipes.upstream.attention import attention_of

# A shorter beginning is not worth a pass of its own.
LEAST_SHARED = 32
_ATTENTION = ("full_attention", "sliding_attention")
_TAKES_PADDING = ("sdpa", "eager")


def shared_length(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """How many ids all of these prompts begin with, and each has others behind; 0 if few.

    0 also where a beginning cannot stand apart: in models that keep a state beside keys and values,
    under attention that does not take padding in the middle, and where a sliding window would count
    that padding.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ()
    if len(prompts) < 2 or getattr(model, "_is_stateful", False):
        return 0
    if attention_of(model) not in _TAKES_PADDING:
        return 0
    if any(kind not in _ATTENTION for kind in layer_types):
        return 0
    window = getattr(config, "sliding_window", None)
    longest = max(map(len, prompts)) + new_tokens
    if window is not None and longest > window:
        return 0
    shared = min(_common_length(prompts), min(map(len, prompts)) - 1)
    return shared if shared >= LEAST_SHARED else 0


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Where the first differs from the last in order, all others have differed, too."""
    length = 0
    in_order = sorted(map(list, prompts))
    for first, last in zip(in_order[0], in_order[-1], strict=False):
        if first != last:
            break
        length += 1
    return length


def cache_of(model: Any, ids: Sequence[int], rows: int) -> DynamicCache:
    """Keys and values of a beginning, for so many rows."""
    cache = DynamicCache(config=model.config.get_text_config())
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {}
    if "logits_to_keep" in signature(body.forward).parameters:
        options["logits_to_keep"] = 1
    row = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        model(input_ids=row, past_key_values=cache, use_cache=True, **options)
    cache.batch_repeat_interleave(rows)
    return cache
