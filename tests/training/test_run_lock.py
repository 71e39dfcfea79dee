"""One process at a time holds a run folder: however many start at the same moment, whatever an earlier one left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import pytest

from sft_recipes.errors import InputError
from sft_recipes.training import run_lock as module
from sft_recipes.training.run_lock import lock_holder, require_unlocked, run_lock

# What an earlier run or another program may have left at the name of the lock.
LEFT_OVER = {
    "nothing": None,
    "an ended process": b'{"pid": 4194305, "host": "%s"}',
    "an empty file": b"",
    "half a file": b'{"pid": 12',
    "no JSON": b"\xff\x00 held",
    "a list": b"[1, 2]",
    "other types": b'{"pid": [], "host": {}}',
    "a number beyond all": b'{"pid": 99999999999999999999, "host": "%s"}',
    "deep nesting": b"[" * 5000,
}
FORKED = multiprocessing.get_context("fork")


def leave(folder: Path, content: bytes | None) -> None:
    """Write what was left over, with this host's name where it wants one."""
    if content is not None:
        host = module.socket.gethostname().encode()
        (folder / "run.lock").write_bytes(content.replace(b"%s", host))


def compete(folder: Path, start: Barrier, holders: Any, refused: Any, done: Any) -> None:
    """Try to take the lock at the same moment as others, and hold it until all have tried."""
    start.wait()
    try:
        with run_lock(folder):
            with holders.get_lock():
                holders.value += 1
            done.wait(30)
    except InputError:
        with refused.get_lock():
            refused.value += 1
    os._exit(0)


@pytest.mark.parametrize("left", ["nothing", "an ended process"])
@pytest.mark.parametrize("processes", [2, 8])
def test_one_holder(processes: int, left: str, tmp_path: Path) -> None:
    """Of processes that start at one moment exactly one holds the lock and the others are refused, 20 times over."""
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        leave(folder, LEFT_OVER[left])
        start, done = FORKED.Barrier(processes), FORKED.Event()
        holders, refused = FORKED.Value("i", 0), FORKED.Value("i", 0)
        arguments = (folder, start, holders, refused, done)
        workers = [FORKED.Process(target=compete, args=arguments) for _ in range(processes)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 30
        while holders.value + refused.value < processes and time.monotonic() < deadline:
            time.sleep(0.005)
        done.set()
        for worker in workers:
            worker.join()
        assert (holders.value, refused.value) == (1, processes - 1)


@pytest.mark.parametrize("left", LEFT_OVER)
def test_whatever_is_left_is_taken_over(left: str, tmp_path: Path) -> None:
    """A lock that nobody holds is taken, whatever stands in it, and is gone afterwards."""
    leave(tmp_path, LEFT_OVER[left])
    require_unlocked(tmp_path)
    with run_lock(tmp_path):
        assert module.read_holder(tmp_path / "run.lock") is not None
    assert not (tmp_path / "run.lock").exists()


def hold(folder: Path, held: Any) -> None:
    """Hold the lock until this process is killed."""
    with run_lock(folder):
        held.set()
        time.sleep(60)


def test_held_until_the_process_ends(tmp_path: Path) -> None:
    """The lock of a process that lives is refused with its number, whatever somebody writes into the file; after
    kill -9 it is free.
    """
    held = FORKED.Event()
    holder = FORKED.Process(target=hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(30)
    assert lock_holder(tmp_path).pid == holder.pid
    for content in (None, b"", b"scribbled over"):
        leave(tmp_path, content)
        with pytest.raises(InputError, match=r"is training here.*use another output_dir"):
            run_lock(tmp_path).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert lock_holder(tmp_path) is None
    with run_lock(tmp_path):
        pass


def test_a_number_that_another_process_got(tmp_path: Path) -> None:
    """A process that began at another time than the holder is not the holder."""
    parent = psutil.Process(os.getppid())
    text = '{"pid": %d, "host": "%s", "started": %f}'
    host = module.socket.gethostname()
    for difference, is_holder in ((0, True), (-100, False)):
        started = parent.create_time() + difference
        (tmp_path / "run.lock").write_text(text % (parent.pid, host, started))
        assert bool(lock_holder(tmp_path)) == is_holder


def test_a_disk_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There only who makes the file holds it; a second one is refused, and so is one that was left over."""

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with run_lock(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} .*delete"):
        run_lock(tmp_path).__enter__()
    assert not (tmp_path / "run.lock").exists()
    leave(tmp_path, LEFT_OVER["half a file"])
    with pytest.raises(InputError, match="does not name"):
        run_lock(tmp_path).__enter__()


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    """A folder called run.lock is refused and not removed."""
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(InputError, match=r"delete .*run\.lock"):
        run_lock(tmp_path).__enter__()
    assert (tmp_path / "run.lock").is_dir()
