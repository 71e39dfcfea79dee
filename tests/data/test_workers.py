"""Work spread over processes gives what one process gives, and its failures are the parent's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sft_recipes.data import workers
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError, Problem, TrainingFault
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import instruction_rows
from tests.training.tiny import file_hashes


def double(number: int) -> tuple[int, int]:
    """The process that worked, and the double of a number."""
    return os.getpid(), 2 * number


def refuse(number: int) -> int:
    """Refuses one batch by name."""
    if number == 7:
        raise InputError([Problem("rows.jsonl:7", "output", "empty", "write it")] * 2, total=9)
    return number


def die(number: int) -> int:
    """What a machine without memory does to a process."""
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_order_from_as_many_processes(processes: int) -> None:
    """Every batch comes back with its own result, in order, from no more processes than asked."""
    results = list(Workers(double, processes).map(range(60)))
    assert [(batch, result[1]) for batch, result in results] == [
        (number, 2 * number) for number in range(60)
    ]
    used = {result[0] for _, result in results}
    assert os.getpid() not in used and len(used) <= processes


def test_no_batch_is_worked_on_in_this_process() -> None:
    """Not even a few: a template that does not end on some row would hang it."""
    results = list(Workers(double, 2).map(range(workers.FEW_BATCHES - 1)))
    assert os.getpid() not in {result[0] for _, result in results}
    assert not list(Workers(double, 2).map([]))


def test_few_batches_stay_here_where_processes_cannot_be_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Starting others takes seconds there."""
    monkeypatch.setattr(workers, "start_method", lambda: "spawn")
    results = list(Workers(double, 2).map(range(workers.FEW_BATCHES - 1)))
    assert {result[0] for _, result in results} == {os.getpid()}


def endless(number: int) -> int:
    """Does not end on one batch."""
    while number == 7:
        pass
    return number


def hungry(number: int) -> int:
    """Takes memory without end on one batch."""
    text = "x"
    while number == 7:
        text += text
    return number


@pytest.mark.parametrize(("work", "processes"), [(endless, 1), (endless, 2), (hungry, 2)])
def test_a_batch_that_does_not_end_is_blamed(
    work: Callable[[int], int], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that takes time or memory without end is ended, and the error is the one that names
    its row.
    """
    monkeypatch.setattr(workers, "BATCH_SECONDS", 0.5)
    monkeypatch.setattr(workers, "BATCH_GROWTH", 2**28)
    asked: list[int] = []

    def blame(batch: int) -> InputError | None:
        asked.append(batch)
        return InputError(Problem("rows:7", "", "endless", "")) if batch == 7 else None

    with pytest.raises(InputError, match="rows:7: endless"):
        list(Workers(work, processes, blame).map(range(60)))
    assert asked[-1] == 7


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refusal_is_the_same_from_a_worker(processes: int) -> None:
    """An error raised in a worker arrives whole: type, problems and total."""
    with pytest.raises(InputError) as raised:
        list(Workers(refuse, processes).map(range(60)))
    assert raised.value.total == 9 and len(raised.value.problems) == 2
    assert "rows.jsonl:7: output: empty. Fix: write it." in str(raised.value)


def test_a_killed_worker_is_a_fault_with_a_way_out() -> None:
    """A worker that the machine kills ends the work with a message, and nothing hangs."""
    with pytest.raises(TrainingFault, match="dataset_num_proc: 1"):
        list(Workers(die, 2).map(range(60)))


def test_prepared_files_do_not_depend_on_the_number_of_workers(
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every file of the prepared folder is the same, byte for byte, from one, two and three processes."""
    monkeypatch.setattr("sft_recipes.data.prepared_batch.BATCH_ROWS", 3)
    rows: list[dict[str, Any]] = instruction_rows(60)
    rows[7]["output"] = "one two three " * 200
    rows[9]["output"] = "\n\nA list."
    rows[11]["instruction"] = "Say <|im_end|>."
    rows.append({"instruction": 7, "output": "x"})
    write_rows(rows)
    path = write_recipe(
        eval_split=0.2, on_bad_rows="skip", max_rejected=0.5, max_lost=0.9, max_length=96
    )
    folders: list[dict[str, str]] = []
    for processes in (1, 2, 3):
        recipe = load_recipe(path, {"dataset_num_proc": processes})
        folder = path.parent / f"prepared{processes}"
        write_prepared(recipe, open_labeller(recipe), folder, progress=False)
        folders.append(file_hashes(folder))
    assert len(folders[0]) >= 7
    assert folders[0] == folders[1] == folders[2]


# Two workers; `late`: the second begins two seconds after it was started.
WORKING = """
import itertools, os, sys, time
from sft_recipes.data import workers

begin = workers._begin

def begin_late(*arguments):
    try:
        os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        time.sleep(2 * (sys.argv[2] == "late"))
    begin(*arguments)

def work(batch):
    return batch

workers._begin = begin_late
for batch, _ in workers.Workers(work, 2).map(itertools.count()):
    if batch == 10:
        print("works", flush=True)
        time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells workers")
@pytest.mark.parametrize("begin", ["at once", "late"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, begin: str) -> None:
    """`kill -9` of the process that reads rows alone: no worker waits for a batch for ever, not even one that has
    not begun when it happens."""
    command = [sys.executable, "-c", WORKING, str(tmp_path / "first"), begin]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"works\n"
        started = psutil.Process(parent.pid).children()
        assert len(started) == 2
        parent.kill()
    gone, alive = psutil.wait_procs(started, timeout=60)
    for worker in alive:
        worker.kill()
    assert len(gone) == 2 and not alive
