"""SIGTERM and Ctrl-C as a wish that is asked for between two steps of the work; nothing raises from a handler.

`listen` is called before torch is imported, which takes seconds. From then on `raise_if_asked` is called between
stages and batches, and the trainer asks before each step. A second signal, a while after the first, ends the process
at once, as if nobody had listened. Nothing but the standard library here.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from sft_recipes.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers and schedulers send the same signal several times over; only a later one is meant as a second.
SAME_SECONDS = 3.0
# The launcher's process id, for what it starts: a parent with another id means that it is gone.
PARENT = "SFT_RECIPES_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_FIRST = b"\nsignal: stopping as soon as nothing is lost by it; another in three seconds or more ends it at once\n"


class _Listener:
    """What was asked of this process."""

    def __init__(self) -> None:
        self.signal = 0
        self.since = 0.0
        self.process = (
            0  # a forked worker inherits the handler, and leaves the decision to its parent
        )

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Take note of a first signal; end the process at a second one."""
        if os.getpid() != self.process:
            return
        if not self.signal:
            self.signal = number
            self.since = time.monotonic()
            os.write(2, _FIRST)
        elif time.monotonic() - self.since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_listener = _Listener()


def listen() -> None:
    """Take signals of this process as requests from now on. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    _listener.signal = 0
    _listener.process = os.getpid()
    for number in _SIGNALS:
        signal.signal(number, _listener.on_signal)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listen for as long as this lasts, unless the process listens already, and then leave signals as they were."""
    if _listener.process == os.getpid():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    listen()
    try:
        yield
    finally:
        if _listener.process == os.getpid():
            _listener.process = 0
            for number, handler in previous.items():
                signal.signal(number, handler)


def asked() -> int:
    """The number of the signal that asked this process to stop, or 0."""
    return _listener.signal


def raise_if_asked(doing: str, kept: str = "there was nothing to save") -> None:
    """Raise Preempted if this process was asked to stop.

    `doing` says what is broken off, `kept` what of it is there: nothing is lost by it.
    """
    if _listener.signal:
        name = signal.Signals(_listener.signal).name
        raise Preempted(f"{name} {doing}; {kept}", _listener.signal)


def listen_for_parent(number: int, parent: int | None = None) -> None:
    """Let the kernel send this signal when the parent process ends, by whatever means. Linux only: elsewhere nothing.

    A parent that ended before this could be asked for is noticed, too: the signal is sent at once. `parent`: the id of
    the process that started this one; without it the one that a launcher names, which need not be the direct parent.
    """
    if sys.platform != "linux":
        return
    expected = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is None:
        is_gone = os.getppid() != expected and not _is_alive(expected)
    else:
        is_gone = os.getppid() != parent
    if is_gone:
        os.kill(os.getpid(), number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
