"""What the training tests share: a recipe taken as far as its trainer, weights as numbers, and log lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import build_trainer
from sft_recipes.training.trainer import RecipeTrainer


def prepared(recipe: Recipe) -> tuple[Labeller, PreparedData]:
    """The recipe's labeller and its prepared data, as `train()` makes them."""
    labeller = open_labeller(recipe)
    return labeller, prepare(recipe, labeller, recipe.output_dir / "prepared", progress=False)


def trainer_for(path: Path, **overrides: Any) -> RecipeTrainer:
    """The trainer that `train()` would build for a recipe file."""
    recipe = load_recipe(path, overrides)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    labeller, data = prepared(recipe)
    return build_trainer(recipe, labeller, data)


def first_batch(trainer: RecipeTrainer) -> dict[str, Any]:
    """The first training batch as the model gets it."""
    batch: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all gradients; the model's are cleared."""
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    model.zero_grad()
    return found


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest norm of a tensor's difference relative to the tensor's norm."""
    assert left.keys() == right.keys() and left
    return max(
        float(
            (left[name].double() - right[name].double()).norm()
            / right[name].double().norm().clamp(min=1e-12)
        )
        for name in left
    )


def logged(run: Path, key: str = "loss") -> list[float]:
    """One number per logged step of a run folder."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
