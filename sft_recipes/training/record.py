"""What a run writes about itself: its lock, the recipe as set, the environment, and where it stands."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from trl import SFTConfig

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.errors import InputError, Preempted, Problem, SFTRecipesError
from sft_recipes.recipe import Recipe
from sft_recipes.training.arguments import accumulation_steps, batch_per_device
from sft_recipes.training.processes import launched_processes

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
# The holder touches its lock at every step; on another host that is the only sign of life.
STALE_SECONDS = 3600


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's `run.lock`. Raises InputError if another process holds it, or if nothing can be written here.

    A lock is stale if its process has ended on this host, or was not touched for an hour on another.
    """
    path = folder / run_folder.LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_unlocked(folder)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    except OSError as error:  # also where another process took it a moment ago
        what = f"{path.name} cannot be written ({error.strerror})"
        fix = "choose a folder that can be, start one run"
        raise InputError(Problem(str(folder), "output_dir", what, fix)) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def lock_holder(folder: Path) -> tuple[int, str] | None:
    """Process id and host of the run that is training in the folder, or None. A stale lock is announced."""
    path = folder / run_folder.LOCK
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    content = json.loads(text or '{"pid": 0, "host": "a host it did not name"}')
    pid, host = content["pid"], content["host"]
    age = time.time() - path.stat().st_mtime
    if host == socket.gethostname():
        # A restarted container may give this process the number of the one that held the lock.
        alive = psutil.pid_exists(pid) and pid != os.getpid()
    else:
        alive = age < STALE_SECONDS
    if alive:
        return pid, host
    print(f"{path} of process {pid} on {host} is stale, last touched {age:.0f} s ago")
    return None


def require_unlocked(folder: Path) -> None:
    """Raise InputError if a run is training in the folder."""
    if holder := lock_holder(folder):
        what = f"process {holder[0]} on {holder[1]} is training here"
        fix = f"wait for it or use another output_dir; if it is gone, delete {folder / run_folder.LOCK}"
        raise InputError(Problem(str(folder), "output_dir", what, fix))


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
    batch = batch_per_device(recipe) * accumulation_steps(recipe, processes)
    return {
        "data": data,
        "world_size": processes,
        "global_batch_size": batch * processes,
        "seed": int(recipe.training.get("seed", SFTConfig.seed)),
        "versions": environment()["versions"],
    }
