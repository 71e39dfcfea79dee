"""What transformers 5.23 knows of a model's attention and says only in private attributes."""

from typing import Any


def attention_of(model: Any) -> str:
    """The name of the attention that a loaded model runs. `set_attn_implementation` is public; reading it is not."""
    return str(model.config._attn_implementation)


def takes_row_boundaries(model: Any) -> bool:
    """Whether the model hands `cu_seq_lens` down to its attention, which is what supporting FlashAttention means."""
    return bool(getattr(model, "_supports_flash_attn", False))
