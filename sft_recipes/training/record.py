"""What a run writes about itself: the recipe as set, the environment, and where it stands."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import yaml

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.errors import Preempted, SFTRecipesError
from sft_recipes.recipe import Recipe
from sft_recipes.training.arguments import accumulation_steps, launched_processes

_LIBRARIES = (
    "torch transformers trl peft accelerate datasets tokenizers bitsandbytes deepspeed".split()
)


def record_start(recipe: Recipe, allowed_changes: Mapping[str, Any]) -> None:
    """Write the recipe as set and the environment into the run folder, and mark the run as running.

    `allowed_changes` stay in the run's state to its end: key, value before, value from then on.
    """
    text = yaml.safe_dump(recipe.saved_values(), sort_keys=False, allow_unicode=True)
    run_folder.write_text(recipe.output_dir / run_folder.RECIPE, text)
    run_folder.write_json(recipe.output_dir / run_folder.ENVIRONMENT, environment())
    record_state(recipe, "running", pid=os.getpid(), allowed_changes=dict(allowed_changes))


def record_failure(recipe: Recipe, error: SFTRecipesError) -> None:
    """Mark the run as failed or preempted, if this process started it: a refused recipe leaves another run alone."""
    if run_folder.read_state(recipe.output_dir).get("pid") == os.getpid():
        state = "preempted" if isinstance(error, Preempted) else "failed"
        record_state(recipe, state, exit_code=error.exit_code, error=str(error))


def record_state(recipe: Recipe, state: str, **details: Any) -> None:
    """Write `run_state.json`: running, finished, failed or preempted."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = run_folder.read_state(recipe.output_dir)
    kept = {"allowed_changes": before.get("allowed_changes", {})}
    run_folder.write_json(
        recipe.output_dir / run_folder.RUN_STATE, {"state": state, "time": now, **kept, **details}
    )


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


def run_facts(recipe: Recipe, processes: int, data: str) -> dict[str, Any]:
    """What a checkpoint's manifest says about its run; `data` is the fingerprint of the rows to train."""
    batch = int(recipe.training.get("per_device_train_batch_size", 8)) * accumulation_steps(
        recipe, processes
    )
    seed = int(recipe.training.get("seed", 42))
    rows = {"data": data, "world_size": processes, "global_batch_size": batch * processes}
    return {**rows, "seed": seed, "versions": environment()["versions"]}
