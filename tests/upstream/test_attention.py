"""What `upstream/attention.py` reads is still there and still means it."""

from __future__ import annotations

import torch
from transformers import MambaConfig, MambaForCausalLM

from sft_recipes.upstream.attention import attention_of, takes_row_boundaries
from tests.conftest import build_model


def test_the_name_follows_what_is_set() -> None:
    """The attention read is the one that was set, at loading or later."""
    model = build_model(64, attn_implementation="eager")
    assert attention_of(model) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_of(model) == "sdpa"


def test_boundaries_are_for_models_with_attention() -> None:
    """A Llama takes row boundaries, a Mamba, which has no attention, does not; neither does a module of anyone's."""
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    assert takes_row_boundaries(build_model(64))
    assert not takes_row_boundaries(mamba)
    assert not takes_row_boundaries(torch.nn.Linear(2, 2))
