"""`train --launch NAME`: start the same run under `accelerate launch`, pass signals on, return its true exit code."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sft_recipes import stop_request
from sft_recipes.errors import InputError, Preempted, Problem, TrainingFault
from sft_recipes.recipe import launch_config, launch_names, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.checkpoints import check_same_run
from sft_recipes.training.launch_config import needs_gpus, read_launch_config
from sft_recipes.training.run_lock import lock_holder, require_unlocked

# The folder in which ranks leave their exit codes.
EXIT_CODES = "SFT_RECIPES_EXIT_CODES"
_STOPPED = (75, 130)


def launch_training(
    recipe: Path,
    name: str,
    num_processes: int | None,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    allow_changed: Sequence[str] = (),
) -> int:
    """Launch and wait. Launchers turn exit codes into 1, so each rank leaves its own in a file.

    `overrides` are a recipe's keys, `flags` those of `sft_recipes.training.train`.
    """
    config = launch_config(name)
    loaded = load_recipe(recipe, parse_overrides(list(overrides)))
    check_same_run(loaded, allow_changed)
    require_unlocked(loaded.output_dir)
    settings = read_launch_config(config)
    if num_processes is None and "num_processes" not in settings.value:
        num_processes = torch.cuda.device_count() or 1
    processes = num_processes or settings.whole_number("num_processes", 1)
    _check_possible(config, settings.value, processes)
    command = [sys.executable, "-m", "sft_recipes.training.launcher", "launch"]
    command += ["--config_file", str(config)]
    if num_processes:
        command += ["--num_processes", str(num_processes)]
    if settings.block("parallelism_config"):
        shards = settings.shard_size(processes)
        command += ["--parallelism_config_dp_shard_size", str(shards)]
    command += ["-m", "sft_recipes.training.train", "--config", str(recipe), *overrides, *flags]
    if allow_changed:
        command += ["--allow_changed", ",".join(allow_changed)]
    ending = _run(command, loaded.output_dir)
    if ending.code and not ending.codes:
        print(f"a process of the run ended without a word ({name})", file=sys.stderr)
    return ending.code


def _check_possible(config: Path, settings: Mapping[str, Any], processes: int) -> None:
    """Raise InputError for a launch that accelerate would turn into another one without a word."""
    kind = settings.get("distributed_type")
    alone = kind in ("NO", False, "MULTI_CPU")
    if processes > 1 and alone:
        what = f"accelerate starts one process for distributed_type {kind}, whatever is asked"
        fix = "use MULTI_GPU, on CPUs with use_cpu: true"
        raise InputError(Problem(str(config), "distributed_type", what, fix))
    if needs_gpus(settings) and not torch.cuda.is_available():
        what = f"{config.stem} launches on GPUs, and there is none here"
        same_on_cpus = f"{config.stem}_cpu"
        if same_on_cpus not in launch_names():
            same_on_cpus = "ddp_cpu"
        fix = f"add --launch {same_on_cpus} instead"
        raise InputError(Problem(str(config), "distributed_type", what, fix))


@dataclass(frozen=True)
class _Ending:
    """How a launch ended: the launcher's own exit code, those that ranks left, and the signals passed on to them."""

    launcher_code: int
    codes: Mapping[int, int]
    signals: Sequence[int]

    @property
    def code(self) -> int:
        """What the run came to. A launcher says 1 for all that goes wrong, and that means a failed check here."""
        if not self.launcher_code:
            return 0
        # Rank 0 refuses for all; another rank that failed made the launcher stop rank 0.
        failures = [code for code in self.codes.values() if code not in _STOPPED]
        stopped = [code for code in self.codes.values() if code in _STOPPED]
        if failures or stopped:
            return (failures or stopped)[0]
        if self.signals:
            return Preempted("", self.signals[0]).exit_code
        return TrainingFault.exit_code


def _run(command: Sequence[str], output_dir: Path) -> _Ending:
    """Run the launcher to its end; signals are passed on."""
    stop_request.raise_if_asked("before anything was launched")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            stop_request.PARENT: str(os.getpid()),
            EXIT_CODES: folder,
        }
        # A group of its own, so that a signal reaches every rank and not the launcher alone, which would leave orphans.
        process = subprocess.Popen(
            command, start_new_session=True, stdout=sys.stdout, env=environment
        )
        signals: list[int] = []

        def pass_on(number: int, _: FrameType | None = None) -> None:
            # To rank 0, which tells the others: a launcher that gets the signal itself kills its ranks after 30
            # seconds, whether they have saved or not.
            signals.append(number)
            holder = lock_holder(output_dir)
            if holder is not None and holder.host == socket.gethostname():
                os.kill(holder.pid, number)
            else:
                os.killpg(process.pid, number)

        with _signals_to(pass_on):
            code = process.wait()
        return _Ending(code, _codes_left(Path(folder)), signals)


@contextlib.contextmanager
def _signals_to(pass_on: Callable[..., None]) -> Iterator[None]:
    """Let signals go to `pass_on`, also one that came just before."""
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, pass_on)
    try:
        if stop_request.asked():
            pass_on(stop_request.asked())
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_code(code: int) -> int:
    """Write this rank's exit code where the launcher that started it looks; returns it."""
    folder = os.environ.get(EXIT_CODES)
    if folder and code:
        rank = os.environ.get("RANK", "0")
        with contextlib.suppress(
            OSError
        ):  # the launcher is gone, or the disk full: the code itself still counts
            (Path(folder) / rank).write_text(str(code), encoding="utf-8")
    return code


def _codes_left(folder: Path) -> dict[int, int]:
    """The exit codes that ranks left, by rank."""
    codes = {}
    for path in folder.iterdir():
        codes[int(path.name)] = int(path.read_text(encoding="utf-8"))
    return dict(sorted(codes.items()))
