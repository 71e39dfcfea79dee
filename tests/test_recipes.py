"""Every shipped recipe is read and trained for two steps on a tiny model, found by rglob so that none is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe import Recipe
from sft_recipes.recipe_files import shipped_recipes
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe
from sft_recipes.training.train import train

RECIPES = Path(__file__).parent.parent / "recipes"
PATHS = sorted(RECIPES.rglob("*.yaml"))
NAMES = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in PATHS]

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


def own_base(recipe: Recipe) -> bool:
    """Whether the recipe brings its base model along; all others need a tiny stand-in of their architecture."""
    return Path(recipe.model_name).is_dir()


def test_recipes_are_found() -> None:
    """The list that `init` shows is the list that is tested, and it is not empty."""
    assert NAMES and [recipe.name for recipe in shipped_recipes()] == sorted(NAMES)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_recipe_says_what_it_is(path: Path) -> None:
    """It loads, begins with a comment that says what it is, writes below runs/, and pushes and reports nothing."""
    recipe = load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert str(recipe.training["output_dir"]).startswith("runs/")
    assert not recipe.training.get("push_to_hub") and recipe.training.get("report_to", "none") in ("none", [])


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_recipe_trains_two_steps(path: Path, tmp_path: Path) -> None:
    """Two steps leave a finished run folder with finite losses and the recipe's own kind of model file."""
    recipe = small(path, tmp_path / "run")
    if not own_base(recipe):
        pytest.fail(f"{recipe.model_name} needs a tiny stand-in of its architecture in this test")
    run = train(recipe)
    assert json.loads((run / "run_state.json").read_text())["state"] == "finished"
    losses = [json.loads(line).get("loss") for line in (run / "log.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if isinstance(loss, float)]) == 2
    model_file = "adapter_model.safetensors" if recipe.model.get("use_peft") else "model.safetensors"
    assert (run / model_file).is_file()


def test_check_plans_what_training_does(tmp_path: Path) -> None:
    """`check` on the quickstart counts the rows, tokens and steps that training then has."""
    recipe = small(RECIPES / "quickstart/full.yaml", tmp_path / "run")
    result = check_recipe(recipe, progress=False)
    run = train(recipe)
    counted = json.loads((run / "data.json").read_text())["train"]
    assert (result.plan["rows"], result.plan["tokens"]) == (counted["rows"], counted["tokens"])
    assert result.plan["trained tokens"] == counted["trained_tokens"]
    assert result.plan["steps"] == json.loads((run / "run_state.json").read_text())["step"] == 2
    assert all(check.outcome == "ok" for check in result.checks)
    assert "next: train" in "\n".join(result.lines())
    assert not [name for name in tmp_path.iterdir() if name.name != "run"]
