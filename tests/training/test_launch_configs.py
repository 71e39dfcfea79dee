"""Every shipped accelerate config is one that accelerate understands and the plan can read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from sft_recipes.training.check import Strategy, read_strategy

CONFIGS = sorted((Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"))
# Into how many shares of 8 processes weights, gradients and optimizer states are split, and what is offloaded.
SHARES: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "single": (1, 1, 1, ()),
    "ddp": (1, 1, 1, ()),
    "ddp_cpu": (1, 1, 1, ()),
    "fsdp2": (8, 8, 8, ()),
    "fsdp2_qlora": (8, 8, 8, ()),
    "zero1": (1, 1, 8, ()),
    "zero2": (1, 8, 8, ()),
    "zero2_cpu": (1, 8, 8, ()),
    "zero3": (8, 8, 8, ()),
    "zero3_cpu": (8, 8, 8, ()),
    "zero3_offload": (8, 8, 8, ("weights", "optimizer")),
    "multi_node": (8, 8, 8, ()),
}
by_name = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


def content(path: Path) -> dict[str, Any]:
    """The parsed config."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_all_are_listed() -> None:
    """A config without a line above is not tested."""
    assert {path.stem for path in CONFIGS} == set(SHARES)


@by_name
def test_the_plan_reads_it(path: Path) -> None:
    """`check --launch NAME --num_processes 8` plans with the shares of the strategy that the file names."""
    weights, gradients, optimizer, offloaded = SHARES[path.stem]
    zero = content(path)["distributed_type"] == "DEEPSPEED"
    name = f"{path.stem} on 8 processes"
    assert read_strategy(path, 8) == Strategy(name, 8, weights, gradients, optimizer, zero, offloaded)


@by_name
def test_accelerate_knows_every_key(path: Path) -> None:
    """accelerate refuses unknown keys at the top only; below `fsdp_config` and `deepspeed_config` it ignores them."""
    options = {action.dest for action in launch_command_parser()._actions}
    config = content(path)
    for section in ("fsdp_config", "deepspeed_config"):
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
