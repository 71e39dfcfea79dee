"""What a run writes about itself: the recipe as set, the environment, and where it stands."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch
import yaml

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.errors import SFTRecipesError
from sft_recipes.recipe import Recipe
from sft_recipes.training.arguments import launched_processes

_LIBRARIES = "torch transformers trl peft accelerate datasets tokenizers bitsandbytes deepspeed".split()


def record_start(recipe: Recipe) -> None:
    """Create the run folder with the recipe as set and the environment, and mark the run as running."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.saved_values(), sort_keys=False, allow_unicode=True)
    (recipe.output_dir / run_folder.RECIPE).write_text(text, encoding="utf-8")
    run_folder.write_json(recipe.output_dir / run_folder.ENVIRONMENT, environment())
    record_state(recipe, "running", pid=os.getpid())


def record_failure(recipe: Recipe, error: SFTRecipesError) -> None:
    """Mark the run as failed, if this process started it: a refused recipe leaves the folder of another run alone."""
    if run_folder.read_state(recipe.output_dir).get("pid") == os.getpid():
        record_state(recipe, "failed", exit_code=error.exit_code, error=str(error))


def record_state(recipe: Recipe, state: str, **details: Any) -> None:
    """Write `run_state.json`: running, finished, failed or preempted."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run_folder.write_json(recipe.output_dir / run_folder.RUN_STATE, {"state": state, "time": now, **details})


def environment() -> dict[str, Any]:
    """Versions, devices and processes; what is not installed is left out."""
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "sft_recipes": sft_recipes.__version__,
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in _LIBRARIES if name in installed},
        "device": device,
        "processes": launched_processes(),
        "threads": torch.get_num_threads(),
    }
