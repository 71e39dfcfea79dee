"""Correctness and speed on one GPU, in under seven minutes.

    python -m benchmarks.gpu --output DIR [--only NAME,NAME] [--dry-run]
    python -m benchmarks.gpu --list

DIR/gpu.json is rewritten and the whole table printed after every item, so that a kill loses
nothing; DIR/NAME holds what an item printed. Exit code: 0 all items passed (or lack something that
is not installed), 1 not all, 2 nothing could be run. `--dry-run` takes tiny shapes and runs on a
CPU, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from multiprocessing.context import BaseContext
from pathlib import Path

from benchmarks.gpu.children import Item, Setting, process_context, run_item
from benchmarks.gpu.items import BUDGET_S, ITEMS, LEAST_S, PRELOAD, chosen
from benchmarks.gpu.results import (
    FILE,
    NOT_RUN,
    Head,
    ItemResult,
    exit_code,
    table,
    write_results,
)
from benchmarks.gpu.shapes import DRY, REAL

# What is too small to share among threads; see scripts/quickstart/run.py for the rest.
DRY_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen items and return the exit code."""
    options = parse(arguments)
    if options.list:
        for item in ITEMS:
            print(f"{item.name:16} {item.limit:4.0f} s at most  {item.title}")
        return 0
    try:
        items = chosen(options.only)
    except ValueError as error:
        return refuse(str(error))
    if options.output is None:
        return refuse("--output DIR is missing")
    if (options.output / FILE).exists():
        return refuse(f"{options.output / FILE} exists; choose another --output")
    set_environment(options.dry_run)
    head = describe(options.dry_run)
    if head is None:
        return refuse("no CUDA device; --dry-run runs tiny shapes on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is ended, too
    on_cuda = head.versions["CUDA"] != "none"
    context = process_context(forked=not on_cuda, preload=PRELOAD)
    results = run_all(items, options.output.resolve(), head, context)
    return exit_code(results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="a folder for gpu.json and the items' output")
    parser.add_argument("--only", default="", help="names of items, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; runs on a CPU, too")
    parser.add_argument("--list", action="store_true", help="name the items")
    return parser.parse_args(arguments)


def refuse(why: str) -> int:
    """Say why nothing is run."""
    print(why, file=sys.stderr)
    return 2


def set_environment(dry_run: bool) -> None:
    """What all children inherit: one GPU, no network, and few threads for tiny shapes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    os.environ.update(OFFLINE)
    if dry_run:
        for name, value in DRY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def describe(dry_run: bool) -> Head | None:
    """The device and the versions, or None where a real run has no device."""
    import torch

    on_cuda = torch.cuda.is_available()
    if not on_cuda and not dry_run:
        return None
    versions = {
        "torch": str(torch.__version__),
        "CUDA": str(torch.version.cuda) if on_cuda else "none",
        "transformers": version("transformers"),
        "trl": version("trl"),
    }
    device = torch.cuda.get_device_name(0) if on_cuda else f"CPU, {os.cpu_count()} cores"
    return Head(device, versions, datetime.now().astimezone().isoformat("T", "minutes"), dry_run)


def run_all(
    items: Sequence[Item],
    folder: Path,
    head: Head,
    context: BaseContext,
    clock: Callable[[], float] = time.monotonic,
) -> list[ItemResult]:
    """Run item after item while the budget lasts; JSON and table after each."""
    shape = DRY if head.dry_run else REAL
    ends = clock() + BUDGET_S
    results: list[ItemResult] = []
    for item in items:
        left = ends - clock()
        if left < LEAST_S:
            why = f"the {BUDGET_S} s for all items are over; run it with --only {item.name}"
            result = ItemResult(item.name, NOT_RUN, error=why)
        else:
            setting = Setting(shape, folder / item.name, head.dry_run)
            result = run_item(item, setting, context, min(item.limit, left))
        results.append(result)
        write_results(folder, head, results)
        print(f"{table(head, results)}\n", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
