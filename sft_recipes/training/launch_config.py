"""accelerate's launch configs as this project reads them: what they start, and how they shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.plain_values import quoted
from sft_recipes.recipe_checks import fits_type
from sft_recipes.training.memory import Strategy
from sft_recipes.yaml_reader import read_yaml_file

# More than any cluster has.
MOST_PROCESSES = 1_000_000


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """An accelerate config as it was read."""

    path: Path
    value: Any
    lines: Mapping[str, int]

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise self._error("", "an accelerate config is a mapping of keys to values")

    def _error(
        self, key: str, what: str, fix: str = "see accelerate_configs/ for ones that work"
    ) -> InputError:
        where = f"{self.path}:{self.lines.get(key, 1)}"
        return InputError(Problem(where, key, what, fix))

    def whole_number(self, key: str, default: int) -> int:
        """A count."""
        value = self.value.get(key) or default
        if not fits_type(value, int) or not 1 <= value <= MOST_PROCESSES:
            what = f"expected a whole number from 1 to {MOST_PROCESSES:,}, got {quoted(value)}"
            raise self._error(key, what)
        return int(value)

    def block(self, key: str) -> Mapping[str, Any]:
        """The keys under a key; none where it is not set."""
        value = self.value.get(key) or {}
        if not isinstance(value, dict):
            raise self._error(key, f"expected a mapping, got {quoted(value)}")
        return value

    def mesh_size(self, name: str) -> int:
        """A size of accelerate's device mesh; 1 where it is not set."""
        key = f"parallelism_config_{name}"
        value = self.block("parallelism_config").get(key) or 1
        if not fits_type(value, int) or not 1 <= value <= MOST_PROCESSES:
            what = f"{key}: expected a whole number, got {quoted(value)}"
            raise self._error("parallelism_config", what)
        return int(value)

    def shard_size(self, processes: int) -> int:
        """Over how many groups of processes that share a batch the weights are sharded.

        Raises InputError for a mesh that so many processes cannot make, or that is not supported.
        """
        key = "parallelism_config"
        for name in ("tp_size", "sp_size"):
            if self.mesh_size(name) > 1:
                raise self._error(key, f"{name} is not supported, cp_size is", f"remove {name}")
        together = self.mesh_size("cp_size") * self.mesh_size("dp_replicate_size")
        if processes % together:
            what = f"{processes} processes cannot be divided into groups of {together}"
            raise self._error(key, what, f"give --num_processes a multiple of {together}")
        return processes // together

    def stage(self, deepspeed: Mapping[str, Any]) -> int:
        """ZeRO's stage."""
        stage = deepspeed.get("zero_stage")
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            what = f"zero_stage: expected 0, 1, 2 or 3, got {quoted(stage)}"
            raise self._error("deepspeed_config", what)
        return int(stage)


def read_launch_config(path: Path) -> LaunchConfig:
    """Read a file. Raises InputError for one that is no such config."""
    document = read_yaml_file(path)
    return LaunchConfig(path, document.value, document.lines)


def needs_gpus(settings: Mapping[str, Any]) -> bool:
    """Whether an accelerate config starts processes on GPUs."""
    alone = settings.get("distributed_type") in ("NO", False, "MULTI_CPU")
    return not alone and not settings.get("use_cpu")


def read_strategy(config: Path, processes: int | None) -> Strategy:
    """The strategy of an accelerate config, read as `accelerate launch` reads it.

    Raises InputError for a file that is no such config.
    """
    content = read_launch_config(config)
    count = processes or content.whole_number("num_processes", 1)
    name = f"{config.stem} on {count} processes"
    kind = content.value.get("distributed_type")
    if kind == "FSDP":
        reshards = content.block("fsdp_config").get("fsdp_reshard_after_forward", True)
        content.shard_size(count)
        context = content.mesh_size("cp_size")
        return Strategy(name, count, stage=3 if reshards else 2, context=context)
    if kind != "DEEPSPEED":
        return Strategy(name, count)
    deepspeed = content.block("deepspeed_config")
    offloaded = []
    if deepspeed.get("offload_param_device", "none") != "none":
        offloaded.append("weights")
    if deepspeed.get("offload_optimizer_device", "none") != "none":
        offloaded.append("optimizer")
    return Strategy(
        name,
        count,
        stage=content.stage(deepspeed),
        master_weights=True,
        offloaded=tuple(offloaded),
    )
