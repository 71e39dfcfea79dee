"""`run.lock`: one run trains in a folder at a time, on one machine or on several that share a disk.

The kernel's lock (`flock`) on the file decides, and ends with the process that holds it, however that ends: there is
no moment between looking and taking. What stands in the file is for people, for a launcher that passes signals on,
and for other machines, where a shared disk may not carry the kernel's lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem

# The holder touches its lock at every step; on another host that is the only sign of life.
STALE_SECONDS = 3600
# A disk without `flock` says one of these.
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
# Clocks of one process's start differ by rounding.
_SAME_START_SECONDS = 1.0


class Holder(NamedTuple):
    """Who wrote a lock: process id, host, and when the process began (seconds since 1970; 0: not known)."""

    pid: int
    host: str
    started: float


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises InputError if another process holds it, or if nothing can be written here."""
    path = folder / run_folder.LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"{path.name} cannot be written ({reason})"
        fix = "choose a folder that can be"
        raise InputError(Problem(str(folder), "output_dir", what, fix)) from error
    try:
        yield
    finally:
        # While it is held: whoever opened it meanwhile finds that the name is gone, and makes a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path) -> int:
    """Take the lock and write who holds it; returns the open file, which is the lock."""
    if path.is_dir():
        raise _held(path, None)
    descriptor = _take_by_flock(path) if _has_flock(path.parent) else _take_by_creation(path)
    try:
        _announce_or_refuse(path)
        _write_holder(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _has_flock(folder: Path) -> bool:
    """Whether the disk of the folder keeps locks. Raises OSError where no file can be made."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise
    return True


def _take_by_flock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise _held(path, read_holder(path)) from error
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its holder ended and took the name away between the two calls


def _take_by_creation(path: Path) -> int:
    """Only who makes the file holds it; one that was left over is for a person to delete."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise _held(path, read_holder(path)) from error


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still is the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
    }
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    os.fsync(descriptor)


def _announce_or_refuse(path: Path) -> None:
    """With the lock taken: what it says is left over, or of a run that this disk's lock does not keep out."""
    if path.stat().st_size == 0:
        return
    running = lock_holder(path.parent)
    if running is not None:
        raise _held(path, running)
    holder = read_holder(path)
    named = "an unknown process"
    if holder is not None:
        named = f"process {holder.pid} on {holder.host}"
    age = time.time() - path.stat().st_mtime
    print(f"{path} of {named} is stale, last touched {age:.0f} s ago")


def _held(path: Path, holder: Holder | None) -> InputError:
    who = "a process that the lock does not name"
    if holder is not None:
        who = f"process {holder.pid} on {holder.host}"
    what = f"{who} is training here"
    fix = f"wait for it or use another output_dir; if it is gone, delete {path}"
    return InputError(Problem(str(path.parent), "output_dir", what, fix))


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock, or None where it says nothing that can be read."""
    try:
        content = json.loads(path.read_bytes())
        return Holder(int(content["pid"]), str(content["host"]), float(content.get("started", 0)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def lock_holder(folder: Path) -> Holder | None:
    """The run that is training in the folder, as far as its lock tells. It may end or begin at any moment."""
    path = folder / run_folder.LOCK
    holder = read_holder(path)
    if holder is None:
        return None
    if holder.host != socket.gethostname():
        age = time.time() - path.stat().st_mtime
        return holder if age < STALE_SECONDS else None
    try:
        started = psutil.Process(holder.pid).create_time()
    except (psutil.Error, ValueError, OverflowError):
        return None
    # Another process may have got the number since.
    is_same = not holder.started or abs(started - holder.started) < _SAME_START_SECONDS
    return holder if is_same and holder.pid != os.getpid() else None


def require_unlocked(folder: Path) -> None:
    """Raise InputError if a run is training in the folder."""
    holder = lock_holder(folder)
    if holder is not None:
        raise _held(folder / run_folder.LOCK, holder)
