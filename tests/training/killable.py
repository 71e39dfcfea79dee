"""Runs of a recipe in processes of their own, which are killed, stopped or starved at a named point.

Processes are forked from a server that has imported everything, so that each costs a second and not eight.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from transformers import TrainerState

from sft_recipes.training import checkpoints, trainer
from sft_recipes.training import train as page
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.trainer import RecipeTrainer

# A copy of its own, in which a fault strikes checkpoints and nothing else that removes a folder.
CHECKPOINTS_SHUTIL = SimpleNamespace(**vars(shutil))
checkpoints.shutil = CHECKPOINTS_SHUTIL

POINTS: Mapping[str, tuple[Any, str]] = {
    "prepare": (page, "write_prepared"),
    "build": (page, "build_trainer"),
    "forward": (RecipeTrainer, "compute_loss"),
    "evaluate": (RecipeTrainer, "evaluate"),
    "begin_save": (trainer, "begin_save"),
    "save_model": (RecipeTrainer, "save_model"),
    "save_optimizer": (RecipeTrainer, "_save_optimizer_and_scheduler"),
    "save_rng": (RecipeTrainer, "_save_rng_state"),
    "save_state": (TrainerState, "save_to_json"),
    "save_counts": (Consumption, "save"),
    "seal": (trainer, "seal"),
    "rotate": (trainer, "rotate"),
    "remove": (CHECKPOINTS_SHUTIL, "rmtree"),
    "save": (page, "save"),
}


@dataclass(frozen=True)
class Fault:
    """At the `nth` call of a point, `before` it or after, on one rank (None: on each), something happens.

    A positive `signal` is sent to the process itself; `file_bytes` is how long a file may be from then on;
    `free_bytes` what the disk says it has left. With `children`, its data loader's workers get the signal, too.
    """

    point: str
    nth: int = 1
    before: bool = False
    signal: int = 0
    file_bytes: int = 0
    free_bytes: int | None = None
    rank: int | None = None
    children: bool = False

    def strike(self) -> None:
        """What happens."""
        if self.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, resource.RLIM_INFINITY))
        if self.free_bytes is not None:
            free = self.free_bytes
            usage = shutil.disk_usage("/")
            CHECKPOINTS_SHUTIL.disk_usage = lambda _: usage._replace(free=free)
        for child in psutil.Process().children() if self.children else ():
            child.send_signal(self.signal)
        if self.signal:
            os.kill(os.getpid(), self.signal)

    def install(self) -> None:
        """Watch the point."""
        owner, name = POINTS[self.point]
        real, calls = getattr(owner, name), []

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.nth and self.before:
                self.strike()
            result = real(*args, **kwargs)
            if len(calls) == self.nth and not self.before:
                self.strike()
            return result

        setattr(owner, name, watched)


def work(
    arguments: Sequence[str], environment: Mapping[str, str], faults: Sequence[Fault], output: Path
) -> None:
    """The process: `train` with its arguments, everything it prints going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    for fault in faults:
        if fault.rank in (None, int(environment.get("RANK", "0"))):
            fault.install()
    code = page.main(list(arguments))
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Run:
    """One process for each rank."""

    processes: list[Any]
    output: Path

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes, by rank; a run that hangs is killed and fails the test."""
        for process in self.processes:
            process.join(seconds)
        hanging = [process.pid for process in self.processes if process.is_alive()]
        for pid in hanging:
            os.kill(pid, signal.SIGKILL)
        assert not hanging, f"hangs:\n{self.text()[-3000:]}"
        return [process.exitcode for process in self.processes]

    def send(self, number: int, rank: int = 0) -> None:
        """A signal to one rank, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def text(self) -> str:
        """What was printed so far, by all ranks and runs with the same output."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def start(path: Path, *arguments: str, faults: Sequence[Fault] = (), ranks: int = 1) -> Run:
    """Start a run of a recipe file; `--key value` arguments override."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
    output = path.with_name("output.txt")
    given = ["--config", str(path), *arguments]
    processes = [
        context.Process(target=work, args=(given, one, faults, output)) for one in environments
    ]
    for process in processes:
        process.start()
    return Run(processes, output)


def finish(path: Path, *arguments: str, ranks: int = 1, faults: Sequence[Fault] = ()) -> str:
    """Run to the end, which must be a good one; returns what was printed by it."""
    before = len(Run([], path.with_name("output.txt")).text())
    run = start(path, *arguments, ranks=ranks, faults=faults)
    codes = run.wait()
    assert codes == [0] * ranks, f"{codes}:\n{run.text()[before:][-3000:]}"
    return run.text()[before:]


def until(condition: Callable[[], bool], run: Run, seconds: float = 60) -> None:
    """Wait for something a run does."""
    for _ in range(int(seconds * 50)):
        if condition():
            return
        run.processes[0].join(0.02)
    raise AssertionError(f"did not happen:\n{run.text()[-3000:]}")
