"""An item in a process of its own, with a limit: one that hangs or breaks takes nothing with it.

No torch here.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import ItemReport, ItemResult, read_item
from benchmarks.gpu.shapes import Shape

STDOUT = 1
STDERR = 2
LAST_LINES = 6
# An item whose parent was killed ends by itself, this much later than its limit.
ALARM_LATER_S = 5


@dataclass(frozen=True, slots=True)
class Item:
    """What is run: `function` is `module:name`, called with a `Setting` and an `ItemReport`.

    `limit` in seconds.
    """

    name: str
    title: str
    function: str
    limit: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What an item is told: its sizes, a folder of its own, and whether the sizes are real."""

    shape: Shape
    folder: Path
    dry_run: bool


def process_context(forked: bool, preload: Sequence[str] = ()) -> BaseContext:
    """How children start. `forked`: from a server that has imported `preload` for all of them.

    Not with CUDA, which does not survive a fork once a library has touched it: there each child
    imports for itself.
    """
    if not forked:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def run_item(item: Item, setting: Setting, context: BaseContext, limit: float) -> ItemResult:
    """Run the item for at most `limit` seconds and say what became of it.

    Its group of processes ends with it.
    """
    setting.folder.mkdir(parents=True, exist_ok=True)
    left = setting.folder / "result.json"
    left.unlink(missing_ok=True)  # of a run that was killed
    started = time.monotonic()
    make_process: Any = context.Process  # type: ignore[attr-defined]
    process = make_process(target=work, args=(item.function, setting, limit))
    process.start()
    try:
        process.join(limit)
        timed_out = process.is_alive()
    finally:
        end_with_group(process)
    seconds = time.monotonic() - started
    error = ""
    if timed_out:
        error = f"ended after its limit of {limit:.0f} s"
    elif process.exitcode != 0:
        error = last_lines(setting.folder / "stderr.txt") or f"exit code {process.exitcode}"
    return read_item(item.name, left, error, timed_out, seconds)


def work(function: str, setting: Setting, limit: float) -> None:
    """The child: a group of its own, its output in files, then the item."""
    os.setsid()
    # A child takes over how it was started itself; loaders' workers are to start as in any run.
    multiprocessing.set_start_method(None, force=True)
    signal.alarm(math.ceil(limit) + ALARM_LATER_S)
    _redirect(STDOUT, setting.folder / "stdout.txt")
    _redirect(STDERR, setting.folder / "stderr.txt")
    module, _, name = function.partition(":")
    report = ItemReport(setting.folder / "result.json", judge=not setting.dry_run)
    getattr(importlib.import_module(module), name)(setting, report)


def _redirect(descriptor: int, path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


def end_with_group(process: Any) -> None:
    """Kill a child with all it started, and what it left behind if it has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has no group yet
    process.join()


def last_lines(path: Path) -> str:
    """The last lines of a file that are not empty."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])
