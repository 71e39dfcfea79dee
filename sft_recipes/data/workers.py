"""Batches of rows worked on in several processes, results in the order of the batches.

Few rows are worked on in this process: starting others costs more than it saves. Workers are forked
where the platform forks, so that they hold tokenizer and template already; each encodes with one
thread, for there is one of them a core.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, Generic, Literal, TypeVar

from sft_recipes.errors import TrainingFault

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# Batches below which one process is as fast as two (measured on 2 cores; a batch has 500 rows).
FEW_BATCHES = 4
# More workers than this wait for the process that reads the rows.
MOST_WORKERS = 16
# Batches in work for each worker; more would only fill memory.
AHEAD = 2

_work: Callable[[Any], Any] | None = None


def worker_count(asked: int | None) -> int:
    """Processes to work in: as asked, else one for each core that this process may use."""
    if asked is not None:
        return asked
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_WORKERS)


class Workers(Generic[Batch, Result]):
    """Applies `work` to batches in `processes` processes; as many as there are cores if None."""

    def __init__(self, work: Callable[[Batch], Result], processes: int | None = None) -> None:
        self._work = work
        self._processes = worker_count(processes)

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Result]]:
        """Each batch with its result, in order. What `work` raises is raised here.

        Raises TrainingFault where a worker was killed.
        """
        remaining = iter(batches)
        first = list(islice(remaining, FEW_BATCHES))
        if self._processes == 1 or len(first) < FEW_BATCHES:
            for batch in chain(first, remaining):
                yield batch, self._work(batch)
            return
        pool = self._start()
        waiting: deque[tuple[Batch, Future[Result]]] = deque()
        try:
            for batch in chain(first, remaining):
                waiting.append((batch, pool.submit(_run, batch)))
                if len(waiting) > AHEAD * self._processes:
                    done, result = waiting.popleft()
                    yield done, result.result()
            for done, result in waiting:
                yield done, result.result()
        except BrokenProcessPool as error:
            what = "a process that prepared rows was killed, perhaps for memory"
            raise TrainingFault(f"{what}. Fix: free memory, or set dataset_num_proc: 1.") from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        method: Literal["fork", "spawn"] = "spawn"
        if sys.platform == "linux":
            method = "fork"
        return ProcessPoolExecutor(
            self._processes,
            multiprocessing.get_context(method),
            initializer=_begin,
            initargs=(self._work,),
        )


def _begin(work: Callable[[Any], Any]) -> None:
    """What a worker does first."""
    global _work
    _work = work
    # What the parent loaded is no garbage: collections that looked at it would take 7 % of the time
    # (measured).
    gc.freeze()
    # Read by the tokenizer at every call. Its threads do not survive a fork, and one process a core
    # is enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the parent ends the others. Its own handlers are
    # not for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(batch: Any) -> Any:
    if _work is None:
        raise RuntimeError("a worker that was not begun")
    return _work(batch)
