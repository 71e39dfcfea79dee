"""What a run writes about itself: the recipe as set, the environment, and where it stands."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig

import sft_recipes
from sft_recipes import crash, run_folder
from sft_recipes.errors import Preempted, SFTRecipesError
from sft_recipes.path_contents import read_contents, record_contents
from sft_recipes.recipe import Recipe
from sft_recipes.release.stages import stages_of
from sft_recipes.training.arguments import accumulation_steps, batch_per_device
from sft_recipes.training.processes import launched_processes, processes_a_batch

_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
)


def record_start(recipe: Recipe, allowed_changes: Mapping[str, Any]) -> None:
    """Write the recipe as set, what its paths hold and the environment into the run folder; mark the run as running.

    `allowed_changes` stay in the run's state to its end: key, value before, value from then on.
    """
    record_contents(recipe)
    text = yaml.safe_dump(recipe.saved_values(), sort_keys=False, allow_unicode=True)
    run_folder.write_text(recipe.output_dir / run_folder.RECIPE, text)
    run_folder.write_json(recipe.output_dir / run_folder.ENVIRONMENT, environment())
    record_state(recipe, "running", pid=os.getpid(), allowed_changes=dict(allowed_changes))


def record_failure(recipe: Recipe, run_pid: int, error: SFTRecipesError | None, text: str) -> None:
    """Mark the run as failed or preempted; any rank may.

    `run_pid` is the process of rank 0 that began it: a refused recipe leaves another run alone. `error` is None for a
    fault of the program. What a first rank said is not overwritten by ranks that end because of it.
    """
    before = run_folder.read_state(recipe.output_dir)
    if before.get("pid") != run_pid or before.get("state") not in ("running", "finished"):
        return
    state = "preempted" if isinstance(error, Preempted) else "failed"
    code = crash.EXIT_CODE if error is None else error.exit_code
    record_state(recipe, state, exit_code=code, error=text)


def record_state(recipe: Recipe, state: str, **details: Any) -> None:
    """Write `run_state.json`: running, finished, failed or preempted."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = run_folder.read_state(recipe.output_dir)
    content = {
        "state": state,
        "time": now,
        "allowed_changes": before.get("allowed_changes", {}),
        **details,
    }
    run_folder.write_json(recipe.output_dir / run_folder.RUN_STATE, content)


def environment() -> dict[str, Any]:
    """Versions, devices and processes; what is not installed is left out."""
    packages = importlib.metadata.distributions()
    installed = {package.name: package.version for package in packages}
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
    batches = processes // processes_a_batch()
    batch = batch_per_device(recipe) * accumulation_steps(recipe, batches)
    return {
        "data": data,
        "world_size": processes,
        "global_batch_size": batch * batches,
        "seed": int(recipe.training.get("seed", SFTConfig.seed)),
        "versions": environment()["versions"],
    }


def earlier_stages(recipe: Recipe) -> list[dict[str, Any]]:
    """The runs whose weights this one goes on from, the first one first: `stages_of` them, and a
    fingerprint of the weights that it starts with.
    """
    stages = stages_of(Path(recipe.model_name))
    key = "model_name_or_path"
    if recipe.adapter_name is not None:
        key = "adapter_name_or_path"
        # Of an adapter that no run here made there is only a name.
        others = [*stages, {"run": recipe.adapter_name}]
        stages = stages_of(Path(recipe.adapter_name)) or others
    if stages:
        stages[-1]["weights"] = read_contents(recipe.output_dir).get(key)
    return stages
