"""Packed, flattened and padded batches train the same thing; rows of one pack never see one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.batching import isolation_fault
from sft_recipes.training.settings_checks import check_settings
from tests.conftest import build_model, build_tokenizer
from tests.training.tiny import gradients, trainer_for


def loss_and_norm(trainer: Any) -> tuple[float, float, int]:
    """Summed loss over all rows, the gradient norm that goes with it, and the number of batches."""
    total, batches = 0.0, 0
    for batch in trainer.get_train_dataloader():
        inputs = trainer._prepare_inputs(batch)
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1))
        loss.backward()
        total, batches = total + loss.item(), batches + 1
    norm = torch.stack([one.norm() for one in gradients(trainer.model).values()]).norm()
    return total, float(norm), batches


@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_packed_equals_padded(write_recipe: Callable[..., Path], attention: str | None) -> None:
    """Over the same rows, packing (bfd) and flattening give the summed loss and gradient norm of padded rows."""
    path = write_recipe(attn_implementation=attention, per_device_train_batch_size=4)
    padded = loss_and_norm(trainer_for(path, padding_free=False))
    flattened = loss_and_norm(trainer_for(path, padding_free=True))
    packed = loss_and_norm(trainer_for(path, packing=True))
    assert packed[2] < padded[2], "nothing was packed"
    assert flattened[:2] == pytest.approx(padded[:2], rel=1e-5)
    assert packed[:2] == pytest.approx(padded[:2], rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_keeps_rows_apart(attention: str) -> None:
    """A tiny Llama isolates rows in a flattened batch, and probing leaves its training mode as it was."""
    model = build_model(64, attn_implementation=attention).train()
    assert not isolation_fault(model, torch.device("cpu"), 0)
    assert model.training


def _mamba(vocab_size: int = 64) -> Any:
    """Recurrent layers, which carry what they saw into the next row."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    return MambaForCausalLM(config)


class _BlindToPositions(torch.nn.Module):
    """A Llama that is never told where rows begin, as a model that ignores position ids would behave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model(64)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False)


class _NearSighted(_BlindToPositions):
    """A Llama that sees one token in a flattened batch: rows keep apart, and yet are not what they are alone."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **_: Any) -> Any:
        if position_ids is None:
            return self.inner(input_ids=input_ids, use_cache=False)
        tokens = self.inner(input_ids=input_ids.T, use_cache=False)
        tokens.logits = tokens.logits.transpose(0, 1)
        return tokens


class _Unable(_BlindToPositions):
    """A model that says itself that it cannot do it, as convolutions of hybrid models on a CPU do."""

    def forward(self, **_: Any) -> Any:
        raise ValueError("packed rows need\n a package")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (_mamba, "rows of one batch see one another"),
        (_BlindToPositions, "rows of one batch see one another"),
        (_NearSighted, "a row has other logits in a flattened batch than alone"),
        (_Unable, "packed rows need a package"),
    ],
)
@pytest.mark.parametrize("computes_in", [None, torch.bfloat16])
def test_leaks_are_found(
    make: Callable[[], Any], fault: str, computes_in: torch.dtype | None
) -> None:
    """Rows that see one another, rows that are not what they are alone and a model that refuses are told apart, also
    by the wider bounds of 16 bits, and the model is left in its training mode.
    """
    model = make()
    assert isolation_fault(model, torch.device("cpu"), 0, computes_in) == fault
    assert model.training


class _RoundedAlone(_BlindToPositions):
    """A Llama under autocast that takes another kernel for a row alone: logits are float32, errors of 16 bits."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **_: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=position_ids is None):
            outputs = self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        outputs.logits = outputs.logits.float()
        return outputs


def test_rounding_under_autocast_is_no_leak() -> None:
    """A model under autocast gives float32 logits with errors of 16 bits: judged as such, it may be packed."""
    model = _RoundedAlone()
    assert isolation_fault(model, torch.device("cpu"), 0)
    assert not isolation_fault(model, torch.device("cpu"), 0, torch.bfloat16)


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_packing_a_leaking_model_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    """A recipe that packs a model which leaks is refused before its first step, by the name of the key; unasked, the
    model's rows are padded.
    """
    tokenizer = build_tokenizer()
    model = _mamba(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mamba")
    path = write_recipe(model_name_or_path=str(tmp_path / "mamba"), **{key: True})
    refusal = f"{key}: not for MambaForCausalLM: rows of one batch see one another.*Fix: remove"
    with pytest.raises(InputError, match=refusal):
        trainer_for(path).train()
    assert not trainer_for(path, **{key: None}).padding_free


@pytest.mark.parametrize(
    ("keys", "flattened", "attention"),
    [
        ({}, True, "varlen_attn"),
        ({"padding_free": False}, False, "sdpa"),
        ({"per_device_train_batch_size": 1}, False, "sdpa"),
        ({"attn_implementation": "eager"}, False, "eager"),
        ({"attn_implementation": "varlen_attn"}, True, "varlen_attn"),
        ({"packing": True}, True, "varlen_attn"),
        ({"packing": True, "attn_implementation": "sdpa"}, True, "sdpa"),
    ],
)
def test_batches_on_a_cpu(
    write_recipe: Callable[..., Path], keys: dict[str, Any], flattened: bool, attention: str
) -> None:
    """On a CPU rows are flattened under attention by rows, unless the recipe says otherwise; stated attention stays."""
    trainer = trainer_for(write_recipe(**keys))
    assert trainer.padding_free == flattened
    assert trainer.model.config._attn_implementation == attention


def test_wrapped_packing_is_refused(write_recipe: Callable[..., Path]) -> None:
    """The `wrapped` strategy cuts answers and lets rows see one another: refused with the fix."""
    with pytest.raises(InputError, match=r"packing_strategy: .*'wrapped'.* Fix: use bfd"):
        trainer_for(write_recipe(packing=True, packing_strategy="wrapped"))


def test_packing_without_length_is_refused(write_recipe: Callable[..., Path]) -> None:
    """A pack needs a length."""
    path = write_recipe(packing=True)
    path.write_text(path.read_text().replace("max_length: 128", "max_length: null"))
    with pytest.raises(InputError, match="max_length: packing needs a length"):
        check_settings(load_recipe(path))
