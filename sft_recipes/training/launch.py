"""`train --launch NAME`: start the same run under `accelerate launch`, pass signals on, return its true exit code."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import launch_config, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.checkpoints import check_same_run
from sft_recipes.training.record import lock_holder, require_unlocked


def launch_training(
    recipe: Path,
    name: str,
    num_processes: int | None,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    allow_changed: Sequence[str] = (),
) -> int:
    """Launch and wait. Launchers turn exit codes into 1, so the code comes from `run_state.json` where it says more.

    `overrides` are a recipe's keys, `flags` those of `sft_recipes.training.train`.
    """
    config = launch_config(name)
    loaded = load_recipe(recipe, parse_overrides(list(overrides)))
    check_same_run(loaded, allow_changed)
    require_unlocked(loaded.output_dir)
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    if num_processes is None and "num_processes" not in settings:
        num_processes = torch.cuda.device_count() or 1
    _check_possible(config, settings, num_processes or int(settings["num_processes"]))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(config)]
    if num_processes:
        command += ["--num_processes", str(num_processes)]
    command += ["-m", "sft_recipes.training.train", "--config", str(recipe), *overrides, *flags]
    if allow_changed:
        command += ["--allow_changed", ",".join(allow_changed)]
    code = _run(command, loaded.output_dir)
    return int(run_folder.read_state(loaded.output_dir).get("exit_code", code)) if code else 0


def _check_possible(config: Path, settings: Mapping[str, Any], processes: int) -> None:
    """Raise InputError for a launch that accelerate would turn into another one without a word."""
    kind = settings.get("distributed_type")
    alone = kind in ("NO", False, "MULTI_CPU")
    if processes > 1 and alone:
        what = f"accelerate starts one process for distributed_type {kind}, whatever is asked"
        fix = "use MULTI_GPU, on CPUs with use_cpu: true"
        raise InputError(Problem(str(config), "distributed_type", what, fix))
    if not alone and not settings.get("use_cpu") and not torch.cuda.is_available():
        what = f"{config.stem} launches on GPUs, and there is none here"
        fix = "use --launch ddp_cpu, or zero2_cpu or zero3_cpu"
        raise InputError(Problem(str(config), "distributed_type", what, fix))


def _run(command: Sequence[str], output_dir: Path) -> int:
    """Run the launcher to its end; signals are passed on. Returns its exit code."""
    # A group of its own, so that a signal reaches every rank and not the launcher alone, which would leave orphans.
    process = subprocess.Popen(command, start_new_session=True, stdout=sys.stdout)

    def pass_on(number: int, _: FrameType | None) -> None:
        # To rank 0, which tells the others: a launcher that gets the signal itself kills its ranks after 30 seconds,
        # whether they have saved or not.
        pid, host = lock_holder(output_dir) or (0, "")
        if host == socket.gethostname():
            os.kill(pid, number)
        else:
            os.killpg(process.pid, number)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, pass_on)
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
