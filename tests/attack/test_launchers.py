"""Launchers that are killed, and signals in a launch's first moments: no rank trains on unseen, nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sft_recipes import run_folder
from tests.training.killable import finish
from tests.training.tiny import logged

pytestmark = pytest.mark.slow
LONG = {"save_steps": 1000, "per_device_train_batch_size": 2, "num_train_epochs": 200}
LAUNCHED = ("--launch", "ddp_cpu", "--num_processes", "2")


def command_line(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """`sft-recipes train` in a process of its own, with all that it prints in `output.txt`."""
    command = [sys.executable, "-m", "sft_recipes", "train", str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with path.with_name("output.txt").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, text=True)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, by what the kernel says."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s+([0-9a-f]+)$", status, re.M)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def trained_steps(run: Path) -> int:
    """How many steps the log knows of."""
    return len(logged(run)) if (run / run_folder.LOG).is_file() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's end on Linux")
@pytest.mark.parametrize("number", range(3))
def test_kill_9_of_the_launcher(
    number: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """kill -9 of `sft-recipes train --launch`, or of the accelerate process: all processes end within a minute, with a
    sealed checkpoint of the last step, and the run goes on from it.
    """
    path = write_recipe(**LONG)
    run = tmp_path / "run"
    process = command_line(path, *LAUNCHED)
    wait_for(lambda: trained_steps(run) >= 3 + number, 120, "no step was trained")
    family = psutil.Process(process.pid).children(recursive=True)
    victim = process.pid if number else family[0].pid
    os.kill(victim, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=60)
    process.wait(60)
    assert not alive, [one.cmdline() for one in alive]
    state = json.loads((run / run_folder.RUN_STATE).read_text())
    assert state["state"] == "preempted", (tmp_path / "output.txt").read_text()[-3000:]
    last = logged(run, "step")[-1]
    assert (run / f"checkpoint-{last}/manifest.json").is_file()
    (tmp_path / "run/contents.json").unlink()
    text = finish(
        path, "--num_train_epochs", "1", "--allow_changed", "num_train_epochs,max_steps", ranks=2
    )
    assert "Traceback" not in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("arguments", [(), LAUNCHED], ids=["direct", "launched"])
def test_signals_in_the_first_seconds(
    arguments: tuple[str, ...], number: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A signal at once, two, four and eight seconds after the start ends with its code, and leaves no process."""
    path = write_recipe(**LONG)
    table = []
    for seconds in (0, 2, 4, 8):
        process = command_line(path, *arguments)
        wait_for(lambda process=process: listens(process.pid), 30, "it never listens")
        time.sleep(seconds)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        code = process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        table.append((seconds, code))
    print(number.name, *arguments, table)
    text = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in text, text[-3000:]
    assert {code for _, code in table} == {75 if number == signal.SIGTERM else 130}
