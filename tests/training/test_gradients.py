"""Every tensor that is meant to be trained gets a gradient, and nothing else is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft_recipes.models import unfed_encoders
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import build_tokenizer
from tests.training.tiny import first_batch, logged, trainer_for, weights

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def trainable_and_reached(trainer: RecipeTrainer) -> tuple[set[str], set[str]]:
    """Names of trainable tensors, and of those that got a gradient that is not zero.

    LoRA starts with B = 0, which gives A no gradient in the first step: B is filled first.
    """
    model = trainer.model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.compute_loss(model, first_batch(trainer)).backward()
    trainable = {name for name, one in model.named_parameters() if one.requires_grad}
    reached = {
        name
        for name, one in model.named_parameters()
        if one.grad is not None and bool((one.grad != 0).any())
    }
    return trainable, reached


def test_full(write_recipe: Callable[..., Path]) -> None:
    """Full fine-tuning: all tensors are trainable and reached."""
    trainer = trainer_for(write_recipe())
    trainable, reached = trainable_and_reached(trainer)
    assert trainable == reached == {name for name, _ in trainer.model.named_parameters()}


def test_lora(write_recipe: Callable[..., Path]) -> None:
    """LoRA without stated targets: both matrices of all seven linear layers of both blocks, and nothing of the base."""
    trainable, reached = trainable_and_reached(trainer_for(write_recipe(**LORA)))
    assert trainable == reached
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)


def test_lora_targets_as_stated(write_recipe: Callable[..., Path]) -> None:
    """Stated targets are taken verbatim."""
    trainable, _ = trainable_and_reached(
        trainer_for(write_recipe(**LORA, lora_target_modules=["q_proj"]))
    )
    assert len(trainable) == 2 * 2 and all("q_proj" in name for name in trainable)


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    """A tiny conditional-generation Gemma 3: a text model with a vision tower and a projector."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = build_tokenizer(["<bos>", "<image>", "<boi>", "<eoi>"])
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "boi", "eoi")}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "query_pre_attn_scalar": 8,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=ids["image"],
        boi_token_index=ids["boi"],
        eoi_token_index=ids["eoi"],
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma3")
    tokenizer.save_pretrained(tmp_path / "gemma3")
    return tmp_path / "gemma3"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_unfed_encoders_stay_out(
    write_recipe: Callable[..., Path], gemma3: Path, lora: bool
) -> None:
    """A multimodal base trained on text: vision tower and projector are frozen and get no adapter; the rest is reached,
    and steps change what is trainable and nothing else."""
    path = write_recipe(model_name_or_path=str(gemma3), max_steps=2, **(LORA if lora else {}))
    trainer = trainer_for(path)
    encoders = unfed_encoders(trainer.model)
    assert len(encoders) == 2, encoders
    trainable, reached = trainable_and_reached(trainer)
    assert trainable == reached and trainable
    assert not any("vision" in name or "multi_modal_projector" in name for name in trainable)
    trainer.model.zero_grad()
    before = weights(trainer.model)
    trainer.train()
    changed = {
        name for name, one in weights(trainer.model).items() if not torch.equal(one, before[name])
    }
    assert changed == trainable


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_checkpointing_reaches_adapters(
    write_recipe: Callable[..., Path], checkpointing: bool
) -> None:
    """Recomputing activations leaves no adapter without a gradient."""
    trainable, reached = trainable_and_reached(
        trainer_for(write_recipe(**LORA, activation_checkpointing=checkpointing))
    )
    assert trainable == reached and trainable


def test_accumulation_equals_one_batch(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """1 row x 8 accumulation, 2 x 4 and 8 x 1 log the same losses and end with the same weights, though rows differ in
    length."""
    path = write_recipe(learning_rate=1e-3, max_grad_norm=1.0)
    runs = {}
    for batch in (8, 2, 1):
        folder = tmp_path / f"batch{batch}"
        trainer = trainer_for(
            path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            output_dir=str(folder),
        )
        trainer.train()
        runs[batch] = (logged(folder), weights(trainer.model))
    losses, final = runs[8]
    assert len(losses) == 5
    for batch in (2, 1):
        assert runs[batch][0] == pytest.approx(losses, rel=1e-5)
        # AdamW divides by the gradient's size, so rounding of near-zero gradients shows in single entries.
        assert all(torch.allclose(runs[batch][1][name], final[name], atol=2e-5) for name in final)
