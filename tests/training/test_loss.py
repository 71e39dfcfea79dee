"""The loss over trained positions is TRL's loss, gradients included, and where it may not be, TRL's own is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import build_tokenizer
from tests.training.tiny import (
    first_batch,
    gradients,
    prepared,
    relative_difference,
    trainer_for,
    weights,
)

TOLERANCE = 1e-5


def stock_loss(
    trainer: RecipeTrainer, batch: dict[str, Any], count: torch.Tensor | None
) -> torch.Tensor:
    """What `SFTTrainer` itself computes for the batch on the same model."""
    return SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=count)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "flattened"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_loss_and_gradients_equal_trl(
    write_recipe: Callable[..., Path], padding_free: bool, train_on: str
) -> None:
    """For the same batch, loss and every gradient equal stock TRL's, with and without num_items_in_batch."""
    trainer = trainer_for(write_recipe(padding_free=padding_free, train_on=train_on))
    assert trainer.trained_positions_only
    batch = first_batch(trainer)
    assert trainer.padding_free == padding_free == ("attention_mask" not in batch)
    for count in (None, torch.tensor(977)):
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        ours.backward()
        our_gradients = gradients(trainer.model)
        stock = stock_loss(trainer, batch, count)
        stock.backward()
        assert ours.item() == pytest.approx(stock.item(), rel=TOLERANCE)
        assert relative_difference(our_gradients, gradients(trainer.model)) < TOLERANCE


def test_logged_numbers_equal_trl(write_recipe: Callable[..., Path]) -> None:
    """Token accuracy and tokens seen, which TRL logs beside the loss, are the same numbers."""
    trainer = trainer_for(write_recipe(padding_free=False))
    trainer.model.train()
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, dict(batch))
    stock_loss(trainer, batch, None)
    ours, stock = trainer._metrics["train"]["mean_token_accuracy"]
    assert ours == pytest.approx(stock)
    assert trainer._total_train_tokens == 2 * int(batch["attention_mask"].sum())


def test_batch_without_labels_gives_zero(write_recipe: Callable[..., Path]) -> None:
    """A batch without any label passes through the model with loss 0 and gradients 0, not NaN."""
    trainer = trainer_for(write_recipe())
    batch = first_batch(trainer)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert loss.item() == 0.0
    found = gradients(trainer.model)
    assert found and all(bool((one == 0).all()) for one in found.values())


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "flattened"])
def test_training_equals_stock_trl(write_recipe: Callable[..., Path], padding_free: bool) -> None:
    """Five optimizer steps on the same rows leave the weights that stock TRL leaves, with the same losses."""
    path = write_recipe(
        padding_free=padding_free,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=5,
    )
    recipe = load_recipe(path)
    ours = trainer_for(path)
    start = weights(ours.model)
    _, data = prepared(recipe)
    stock_model = AutoModelForCausalLM.from_pretrained(recipe.model_name)
    stock = SFTTrainer(
        model=stock_model,
        args=ours.args,
        train_dataset=data.train,
        processing_class=ours.processing_class,
    )
    assert type(stock) is SFTTrainer
    ours.train()
    stock.train()
    our_losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    stock_losses = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert our_losses == pytest.approx(stock_losses, rel=TOLERANCE) and len(our_losses) == 5
    assert relative_difference(weights(ours.model), start) > 1e-3, "the steps changed nothing"
    # AdamW divides by the gradient's size, so rounding of near-zero gradients shows: 1e-4, not 1e-5.
    assert relative_difference(weights(ours.model), weights(stock.model)) < 1e-4


def save_base(folder: Path, config: Any) -> Path:
    """A base folder with a random model of the given config and the tiny tokenizer."""
    tokenizer = build_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def _softcap() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8)


def _logit_scale() -> Any:
    from transformers import GraniteConfig

    return GraniteConfig(**SMALL, logits_scaling=7.0)


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )


FOREIGN: dict[str, tuple[Callable[[], Any] | None, dict[str, Any]]] = {
    "dft": (None, {"loss_type": "dft"}),
    "softcap": (_softcap, {}),
    "logit_scale": (_logit_scale, {}),
    "moe_with_aux_loss": (_mixtral, {"router_aux_loss_coef": 0.5}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_losses_fall_through_to_trl(
    write_recipe: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """Where the plain cross-entropy is not the model's loss, TRL computes it: same number, and not the plain one."""
    make_config, keys = FOREIGN[case]
    if make_config is not None:
        keys = {**keys, "model_name_or_path": str(save_base(tmp_path / case, make_config()))}
    trainer = trainer_for(write_recipe(**keys, padding_free=False))
    assert not trainer.trained_positions_only
    batch = first_batch(trainer)
    trainer.model.eval()  # dropout and router noise would make two passes differ
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(batch)).item()
        stock = stock_loss(trainer, batch, None).item()
        trainer.trained_positions_only = True
        plain = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert ours == pytest.approx(stock, rel=TOLERANCE)
    # Models that cap or scale do so inside their own forward, too; the others show what would have been trained.
    assert case in ("softcap", "logit_scale") or abs(plain - stock) > 1e-3


def test_evaluation_loss_equals_trl(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """eval_loss and the numbers logged beside it equal stock TRL's over the same held-out rows."""
    evaluation = {"during_training": False}
    path = write_recipe(
        eval_split=8, per_device_eval_batch_size=3, eval_strategy="epoch", evaluation=evaluation
    )
    trainer = trainer_for(path)
    ours = trainer.evaluate()
    monkeypatch.setattr(trainer, "trained_positions_only", False)
    stock = trainer.evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert ours[name] == pytest.approx(stock[name], rel=TOLERANCE)
