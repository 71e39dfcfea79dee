"""The processes of a run: how they were launched, how they join, and what one decides for all."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import SFTConfig

from sft_recipes.devices import computes_on_cpu
from sft_recipes.errors import InputError, Problem, SFTRecipesError, TrainingFault
from sft_recipes.recipe import Recipe


def launched_processes() -> int:
    """How many processes the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_a_batch() -> int:
    """How many of the launched processes share each batch: accelerate's `cp_size`, without it 1."""
    return _mesh_size("CP")


def _mesh_size(name: str) -> int:
    """A size of accelerate's device mesh, as the launcher says it."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))


def launched_batches() -> int:
    """How many batches the launched processes read at a time."""
    return launched_processes() // processes_a_batch()


def reads_for_its_group() -> bool:
    """Whether this is the first of the processes that share its batches, which have ranks in a row."""
    return int(os.environ.get("RANK", "0")) % processes_a_batch() == 0


def launched_with(strategy: str) -> bool:
    """Whether the launcher asked for FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{strategy}") == "true"


def is_first_process() -> bool:
    """Whether the launcher calls this one rank 0; known before processes have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def join_processes(recipe: Recipe) -> PartialState:
    """This process among those launched. Raises InputError if they do not know of one another, or work together in a
    way in which rows and tokens would be counted wrong.
    """
    for name in ("TP", "SP"):
        if _mesh_size(name) > 1:
            what = f"{name.lower()}_size {_mesh_size(name)} is not supported"
            raise InputError(Problem("launch", "parallelism_config", what, "use cp_size alone"))
    seconds = recipe.training.get("ddp_timeout", SFTConfig.ddp_timeout)
    process = PartialState(cpu=computes_on_cpu(recipe), timeout=timedelta(seconds=int(seconds)))
    launched = launched_processes()
    if process.num_processes != launched:
        what = f"{launched} processes were launched, {process.num_processes} work together"
        fix = "use a config from accelerate_configs/; on CPU one with distributed_type: MULTI_GPU and use_cpu: true"
        raise InputError(Problem("launch", "num_processes", what, fix))
    return process


def on_main(call: Callable[[], Any]) -> Any:
    """Call on rank 0 and give every rank the result; if it refuses, no rank goes on. Every rank must ask."""
    result = None
    refusal: SFTRecipesError | None = None
    if PartialState().is_main_process:
        try:
            result = call()
        except SFTRecipesError as error:
            refusal = error
    result, refused = broadcast_object_list([result, refusal is not None])
    if refused:
        raise refusal or TrainingFault("the first process ended the run; its message says why")
    return result


def check_active(recipe: Recipe, trainer: Any) -> None:
    """Raise InputError if a strategy that was asked for is not what the trainer is about to run."""
    for name in ("FSDP", "DEEPSPEED"):
        active = getattr(trainer, f"is_{name.lower()}_enabled")
        _require_same(recipe, name, launched_with(name), active)
    for bits in (4, 8):
        active = getattr(trainer.model, f"is_loaded_in_{bits}bit", False)
        asked = recipe.model.get(f"load_in_{bits}bit")
        _require_same(recipe, f"{bits}-bit weights", asked, active)


def _require_same(recipe: Recipe, name: str, asked: Any, active: Any) -> None:
    if bool(asked) != bool(active):
        what = f"{name}: asked for {bool(asked)}, active {bool(active)}"
        fix = "launch with another of accelerate_configs/"
        raise InputError(Problem(recipe.name, "launch", what, fix))
