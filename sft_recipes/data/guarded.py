"""Work that runs a chat template, within limits of time and memory, in a process of its own.

A template is a program: it may loop without end or double a text until memory is gone, for every
conversation or for one row alone. Nothing inside this process can stop that, so such work is done in
another, which the system ends. Time is processor time, so that a busy machine is no slow template.
Memory is limited on Linux.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

# Windows has neither; there the wall clock alone ends what does not end.
if sys.platform != "win32":
    import resource

GIBIBYTE = 1024**3
# Of the wall clock, beyond which a process is ended that does not even use its processor time.
_WALL_FACTOR = 5
# Exit code of a process that SIGPROF ended, 27 on Linux and macOS.
_ENDED_BY_TIMER = -27
_STATM = Path("/proc/self/statm")
# How Python names the code of a template in tracebacks.
_TEMPLATE_FILES = ("<template>", "<unknown>")

Note = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of processor time, and bytes by which the process may grow."""

    seconds: float
    growth: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How guarded work ended, and the last thing that it noted.

    `error`: what it raised, in words, at `line` of the template where that is known; `is_syntax`:
    the template could not be compiled.
    """

    kind: Literal["done", "time", "memory", "error", "killed"]
    error: str = ""
    line: int | None = None
    is_syntax: bool = False
    noted: Any = None


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """The system ends this process if what is done here takes more processor time."""
    _set_timer(seconds)
    try:
        yield
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    if sys.platform != "win32":
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_growth(growth: int) -> None:
    """On Linux, let this process grow by so many bytes; beyond that Python raises MemoryError."""
    if sys.platform != "linux":
        return
    pages = int(_STATM.read_text(encoding="utf-8").split()[0])
    size = pages * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = size + growth
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def start_method() -> Literal["fork", "spawn"]:
    """How processes are started: where they can be forked they hold tokenizer and template already."""
    return "fork" if sys.platform == "linux" else "spawn"


def run_guarded(work: Callable[[Note], Any], limits: Limits) -> Outcome:
    """Do the work in a process of its own. `work` is given a function to note where it stands."""
    context: Any = multiprocessing.get_context(start_method())
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work_in_child, args=(writer, work, limits))
    process.start()
    writer.close()
    with reader:
        heard = _listen(reader, _WALL_FACTOR * limits.seconds)
    if not heard.is_whole:
        process.kill()
    process.join()
    if heard.outcome is not None:
        return dataclasses.replace(heard.outcome, noted=heard.noted)
    ran_out_of_time = not heard.is_whole or process.exitcode == _ENDED_BY_TIMER
    return Outcome("time" if ran_out_of_time else "killed", noted=heard.noted)


@dataclass
class _Heard:
    """What came from the other process. `is_whole`: it ended by itself, or the system ended it."""

    outcome: Outcome | None = None
    noted: Any = None
    is_whole: bool = False


def _listen(reader: Any, patience: float) -> _Heard:
    """Hear the other process out, unless it says nothing for `patience` seconds."""
    heard = _Heard()
    while reader.poll(patience):
        try:
            message = reader.recv()
        except EOFError:
            heard.is_whole = True
            break
        if isinstance(message, Outcome):
            heard.outcome = message
        else:
            heard.noted = message[0]
    return heard


def _work_in_child(writer: Any, work: Callable[[Note], Any], limits: Limits) -> None:
    """What the other process does."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limit_growth(limits.growth)

    def note(where: Any) -> None:
        # Each note begins a new piece of work with time of its own.
        _set_timer(limits.seconds)
        writer.send((where,))

    try:
        with limited_time(limits.seconds):
            work(note)
        outcome = Outcome("done")
    except MemoryError:
        outcome = Outcome("memory")
    except Exception as error:  # noqa: BLE001 - told to the parent, which decides
        outcome = _describe(error)
    writer.send(outcome)


def _describe(error: Exception) -> Outcome:
    """What a template raised, and at which of its lines."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return Outcome("error", text, error.lineno, is_syntax=True)
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in _TEMPLATE_FILES:
            line = frame.lineno
    return Outcome("error", f"{type(error).__name__}: {text}".removesuffix(": "), line)
