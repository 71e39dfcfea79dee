"""Recipes that bring their own base are trained for two steps as they are; test_shipped_recipes.py has the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe import GATE, Recipe, shipped_recipes
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe, check_text
from sft_recipes.training.train import train

RECIPES = Path(__file__).parent.parent / "recipes"
# A base that travels with its recipe stands in the recipe's own folder.
FILES = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.name != GATE]
OWN_BASE = [path for path in FILES if (path.parent / "base" / "config.json").is_file()]
NAMES = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in OWN_BASE]

# Enough rows for two small steps and one small evaluation.
SMALL: dict[str, Any] = {
    "max_steps": 2,
    "max_rows": 8,
    "per_device_train_batch_size": 2,
    "global_batch_size": None,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "load_best_model_at_end": None,
    "eval_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


def small(path: Path, run: Path) -> Recipe:
    """The recipe cut down to two steps into another run folder."""
    return load_recipe(path, {**SMALL, "output_dir": str(run)})


def test_recipes_are_found() -> None:
    """There is a recipe that needs no network, and `init` lists every one."""
    assert NAMES and set(NAMES) <= {recipe.name for recipe in shipped_recipes()}


@pytest.mark.parametrize("path", OWN_BASE, ids=NAMES)
def test_recipe_trains_two_steps(path: Path, tmp_path: Path) -> None:
    """Two steps leave a finished run folder with finite losses and the recipe's own kind of model file."""
    recipe = small(path, tmp_path / "run")
    run = train(recipe)
    assert json.loads((run / "run_state.json").read_text())["state"] == "finished"
    losses = [json.loads(line).get("loss") for line in (run / "log.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if isinstance(loss, float)]) == 2
    model_file = (
        "adapter_model.safetensors" if recipe.model.get("use_peft") else "model.safetensors"
    )
    assert (run / model_file).is_file()


def test_check_plans_what_training_does(tmp_path: Path) -> None:
    """`check` on the quickstart counts the rows, tokens and steps that training then has."""
    recipe = small(RECIPES / "quickstart/full.yaml", tmp_path / "run")
    result = check_recipe(recipe, progress=False)
    run = train(recipe)
    counted = json.loads((run / "data.json").read_text())["train"]
    plan = result["plan"]
    assert (plan["rows"], plan["tokens"]) == (counted["rows"], counted["tokens"])
    assert plan["trained tokens"] == counted["trained_tokens"]
    assert plan["steps"] == json.loads((run / "run_state.json").read_text())["step"] == 2
    assert all(check["outcome"] in ("ok", "not looked at") for check in result["checks"])
    assert "next: sft-recipes train" in check_text(result)
    assert not [name for name in tmp_path.iterdir() if name.name != "run"]
