"""Every shipped accelerate config is one that accelerate understands and the plan can read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from sft_recipes.training.launch_config import read_strategy
from sft_recipes.training.memory import Strategy

CONFIGS = sorted((Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"))
# The stage of ZeRO that splits as much as the config's strategy, and what is offloaded.
STAGES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (0, ()),
    "ddp": (0, ()),
    "ddp_cpu": (0, ()),
    "fsdp2": (3, ()),
    "fsdp2_cp": (3, ()),
    "fsdp2_qlora": (3, ()),
    "zero1": (1, ()),
    "zero2": (2, ()),
    "zero2_cpu": (2, ()),
    "zero3": (3, ()),
    "zero3_cpu": (3, ()),
    "zero3_offload": (3, ("weights", "optimizer")),
    "multi_node": (3, ()),
}
# How many processes share a batch.
CONTEXT = {"fsdp2_cp": 2}
by_name = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


def content(path: Path) -> dict[str, Any]:
    """The parsed config."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_all_are_listed() -> None:
    """A config without a line above is not tested."""
    assert {path.stem for path in CONFIGS} == set(STAGES)


@by_name
def test_the_plan_reads_it(path: Path) -> None:
    """`check --launch NAME --num_processes 8` plans with the stage of the strategy that the file names."""
    stage, offloaded = STAGES[path.stem]
    zero = content(path)["distributed_type"] == "DEEPSPEED"
    name = f"{path.stem} on 8 processes"
    context = CONTEXT.get(path.stem, 1)
    assert read_strategy(path, 8) == Strategy(name, 8, stage, zero, offloaded, context)


@by_name
def test_accelerate_knows_every_key(path: Path) -> None:
    """accelerate refuses unknown keys at the top only; below `fsdp_config` and `deepspeed_config` it ignores them."""
    options = {action.dest for action in launch_command_parser()._actions}
    config = content(path)
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        assert set(config.get(section, {})) <= options
    assert set(config) <= {field.name for field in dataclasses.fields(ClusterConfig)}
    ClusterConfig.from_yaml_file(str(path))


@by_name
def test_nothing_is_baked_in_that_the_recipe_or_the_machine_decides(path: Path) -> None:
    """The first line says what the file is for; processes come from the command line, precision, accumulation and
    clipping from the recipe; stage 3 and FSDP save weights that load anywhere.
    """
    config = content(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert ("num_processes" in config) == (path.stem == "single")
    assert config["mixed_precision"] == "no"
    if zero := config.get("deepspeed_config"):
        assert (zero["gradient_accumulation_steps"], zero["gradient_clipping"]) == ("auto", "auto")
        assert zero.get("zero3_save_16bit_model") == (True if zero["zero_stage"] == 3 else None)
    if fsdp := config.get("fsdp_config"):
        assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
    assert bool(config.get("use_cpu")) == path.stem.endswith("_cpu")
