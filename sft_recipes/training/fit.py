"""What to change in a run that this machine has no room or no time for, as settings that work."""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from trl import SFTConfig

from sft_recipes.recipe import Recipe, rebase_paths
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.training.rates import first_rates

# A run that takes longer is worth a short one first.
LONG_SECONDS = 3600
SHORT_SECONDS = 1200
# A run of fewer steps shows nothing.
_FEWEST_STEPS = 10


def free_bytes(config: SFTConfig) -> int | None:
    """Memory that a run could take on this machine now; None where that cannot be seen."""
    if config.use_cpu:
        return int(psutil.virtual_memory().available)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return None


@dataclass(frozen=True, slots=True)
class Smaller:
    """Settings that need less memory, and the bytes at the peak with them."""

    settings: Mapping[str, Any]
    peak: int


def smallest_change(
    recipe: Recipe, config: SFTConfig, parameters: int, free: int, peak_of: Callable[[Recipe], int]
) -> Smaller | None:
    """The first settings that fit into `free` bytes, else those that need least.

    None if nothing makes the run smaller.
    """
    smallest: Smaller | None = None
    for settings in _smaller_settings(recipe, config, parameters):
        changed = make_recipe({**recipe.values, **settings}, recipe.path, recipe.places)
        smallest = Smaller(settings, peak_of(changed))
        if smallest.peak <= free:
            break
    return smallest


def _smaller_settings(
    recipe: Recipe, config: SFTConfig, parameters: int
) -> Iterator[Mapping[str, Any]]:
    """Settings that need less and less memory, those that change least first."""
    settings: dict[str, Any] = {}
    size = config.per_device_train_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller:
            continue
        settings["per_device_train_batch_size"] = smaller
        # A step stays as large: accumulation is derived, or grows.
        if recipe.global_batch_size is None:
            accumulation = config.gradient_accumulation_steps * (size // smaller)
            settings["gradient_accumulation_steps"] = accumulation
        yield dict(settings)
    if not config.activation_checkpointing:
        settings["activation_checkpointing"] = True
        yield dict(settings)
    if not recipe.model.get("use_peft"):
        settings["use_peft"] = True
        settings["learning_rate"] = first_rates(parameters).lora
        yield dict(settings)


def memory_advice(recipe: Recipe, smaller: Smaller | None, free: int) -> str:
    """How to fit into `free` bytes, in a sentence or a command."""
    if smaller is None:
        return "no setting makes it smaller: take a smaller model, or a machine with more memory"
    command = train_command(recipe, None, smaller.settings)
    if smaller.peak <= free:
        return f"it fits with {smaller.peak / 1e9:.1f} GB: {command}"
    needed = f"it still takes {smaller.peak / 1e9:.1f} GB"
    return f"a smaller model, or more memory; {needed} with the smallest batch: {command}"


def time_advice(recipe: Recipe, steps: int, seconds_a_step: float) -> str | None:
    """What to do before a run that takes over an hour, None for a shorter one."""
    if steps * seconds_a_step <= LONG_SECONDS:
        return None
    fitting = round(SHORT_SECONDS / seconds_a_step)
    if fitting < _FEWEST_STEPS:
        return "too slow here for a try: a smaller model, shorter rows, or a machine with a GPU"
    folder = recipe.output_dir.with_name(f"{recipe.output_dir.name}-short")
    settings = {"max_steps": fitting, "output_dir": _from_here(folder)}
    return f"20 minutes show whether it learns: {train_command(recipe, None, settings)}"


def train_command(
    recipe: Recipe,
    launch: Path | str | None,
    settings: Mapping[str, Any] | None = None,
    processes: int | None = None,
) -> str:
    """The command that trains the recipe as it was given, changed by `settings`."""
    words = ["sft-recipes", "train", str(recipe.path or recipe.name)]
    if launch:
        words += ["--launch", str(launch)]
    if processes:
        words += ["--num_processes", str(processes)]
    given: dict[str, Any] = {}
    for key, place in recipe.places.items():
        if place == "command line":
            given[key] = recipe.values[key]
    base = recipe.path.parent if recipe.path else None
    for key, value in {**rebase_paths(given, base), **(settings or {})}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{key}", text]
    return shlex.join(words)


def _from_here(folder: Path) -> str:
    """A folder as one would write it: relative where it lies below the working directory."""
    relative = os.path.relpath(folder)
    if relative.startswith(".."):
        return str(folder)
    return f"./{relative}"
