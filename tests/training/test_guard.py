"""A number that is not finite stops the run before the optimizer steps: exit code 3, nothing changed or saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.errors import TrainingFault
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import train as page
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import build_model, build_tokenizer
from tests.training.tiny import trainer_for, weights

Break = Callable[[pytest.MonkeyPatch], None]


def nan_loss(monkeypatch: pytest.MonkeyPatch, step: int = 2, value: float = float("nan")) -> None:
    """The loss of one step is multiplied by a number that is not finite."""
    real, calls = RecipeTrainer.compute_loss, []

    def broken(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = real(self, *args, **kwargs)
        return loss * value if len(calls) == step else loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", broken)


def inf_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite constant: the gradients stay finite, only the loss shows it."""
    real, calls = RecipeTrainer.compute_loss, []

    def broken(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = real(self, *args, **kwargs)
        return loss + float("inf") if len(calls) == 2 else loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", broken)


def nan_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient of one step is NaN although the loss is finite."""
    real, calls = RecipeTrainer.training_step, []

    def broken(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            next(one for one in self.model.parameters() if one.grad is not None).grad[0] = float(
                "nan"
            )
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", broken)


def keep_trainer(monkeypatch: pytest.MonkeyPatch) -> list[RecipeTrainer]:
    """The trainer that `train()` builds, for looking at its weights afterwards."""
    kept: list[RecipeTrainer] = []
    real = page.build_trainer

    def build(*args: Any) -> RecipeTrainer:
        kept.append(real(*args))
        return kept[-1]

    monkeypatch.setattr(page, "build_trainer", build)
    return kept


def second_batch(trainer: RecipeTrainer) -> set[int]:
    """The numbers in the instructions of the second batch's rows, which are their rows in the file."""
    torch.manual_seed(0)
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    texts = trainer.processing_class.batch_decode(next(batches)["input_ids"])
    return {int(number) for text in texts for number in re.findall(r"\((\d+)\)", text)}


@pytest.mark.parametrize("break_it", [nan_loss, inf_loss, nan_gradient])
def test_fault_stops_before_the_step(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    break_it: Break,
) -> None:
    """`main` returns 3 and names step 2; the weights are those of step 1; no model file; the state says failed."""
    path = write_recipe(max_steps=4, save_steps=4)
    one_step = trainer_for(
        path, max_steps=1, output_dir=str(tmp_path / "one"), lr_scheduler_type="constant"
    )
    one_step.train()
    break_it(monkeypatch)
    kept = keep_trainer(monkeypatch)
    assert page.main(["--config", str(path), "--lr_scheduler_type", "constant"]) == 3
    error = capsys.readouterr().err
    what = "gradient norm" if break_it is nan_gradient else "loss"
    assert f"step 2: the {what} is not finite" in error and "Fix:" in error
    named = {int(row) for row in re.findall(r"train.jsonl:row (\d+)", error)}
    assert len(named) == 8 and named == second_batch(one_step)
    after, expected = weights(kept[0].model), weights(one_step.model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    run = tmp_path / "run"
    assert not list(run.rglob("*.safetensors")) and not list(run.rglob("*.bin"))
    state = json.loads((run / "run_state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 3)


def test_nan_in_one_micro_step_of_accumulation_is_seen(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation, a loss that is not finite in an early micro-step still stops the step it belongs to."""
    path = write_recipe(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0
    )
    trainer = trainer_for(path)
    nan_loss(monkeypatch, step=5)
    with pytest.raises(TrainingFault, match="step 2: the loss is not finite"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_nan_weight_in_the_base(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base checkpoint with one NaN weight fails in step 1 instead of ending with a NaN model and exit code 0."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    path = write_recipe(model_name_or_path="./broken", max_steps=2)
    assert page.main(["--config", str(path)]) == 3
    assert "step 1" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_that_change_on_the_way_stop_the_run(
    padding_free: bool, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collator that masks EOS, the classic fault of PAD = EOS, ends the run before its first step, unsaved."""
    build, path = page.build_trainer, write_recipe(padding_free=padding_free)

    def build_masking(*args: Any) -> RecipeTrainer:
        trainer = build(*args)
        collate: Any = trainer.data_collator

        def masked(rows: Any) -> Any:
            batch = collate(rows)
            batch["labels"][batch["labels"] == trainer.processing_class.eos_token_id] = -100
            return batch

        trainer.data_collator = masked
        return trainer

    monkeypatch.setattr(page, "build_trainer", build_masking)
    with pytest.raises(
        TrainingFault, match=r"^step 1: 8 rows in it have other ids or labels than prepared"
    ):
        page.train(load_recipe(path))
    assert not list((path.parent / "run").glob("**/*.safetensors"))
