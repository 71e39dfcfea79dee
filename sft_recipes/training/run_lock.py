"""One run at a time in a run folder."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem

# The holder touches its lock at every step; on another host that is the only sign of life.
STALE_SECONDS = 3600


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's `run.lock`. Raises InputError if another process holds it, or if nothing can be written here.

    A lock is stale if its process has ended on this host, or was not touched for an hour on another.
    """
    path = folder / run_folder.LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_unlocked(folder)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    except OSError as error:  # also where another process took it a moment ago
        what, fix = (
            f"{path.name} cannot be written ({error.strerror})",
            "choose a folder that can be, start one run",
        )
        raise InputError(Problem(str(folder), "output_dir", what, fix)) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def lock_holder(folder: Path) -> tuple[int, str] | None:
    """Process id and host of the run that is training in the folder, or None. A stale lock is announced."""
    path = folder / run_folder.LOCK
    if not path.is_file():
        return None
    content = json.loads(
        path.read_text(encoding="utf-8") or '{"pid": 0, "host": "a host it did not name"}'
    )
    here, age = content["host"] == socket.gethostname(), time.time() - path.stat().st_mtime
    # A restarted container may give this process the number of the one that held the lock.
    ended = not psutil.pid_exists(content["pid"]) or content["pid"] == os.getpid()
    if not ended if here else age < STALE_SECONDS:
        return content["pid"], content["host"]
    print(
        f"{path} of process {content['pid']} on {content['host']} is stale, last touched {age:.0f} s ago"
    )
    return None


def require_unlocked(folder: Path) -> None:
    """Raise InputError if a run is training in the folder."""
    if holder := lock_holder(folder):
        what = f"process {holder[0]} on {holder[1]} is training here"
        fix = f"wait for it or use another output_dir; if it is gone, delete {folder / run_folder.LOCK}"
        raise InputError(Problem(str(folder), "output_dir", what, fix))
