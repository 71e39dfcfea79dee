"""Batches of rows worked on in several processes, results in the order of the batches.

Workers are forked where the platform forks, so that they hold tokenizer and template already; each
encodes with one thread, for there is one of them a core. There a batch is never worked on in this
process: a template that does not end on some row would hang it, and a worker can be ended. Elsewhere
few rows are worked on here: starting others takes seconds.
"""

import gc
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from sft_recipes import stop_request
from sft_recipes.data.guarded import GIBIBYTE, limit_growth, limited_time, start_method
from sft_recipes.errors import SFTRecipesError, TrainingFault

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# Batches below which one process is as fast as two (measured on 2 cores; a batch has 500 rows).
FEW_BATCHES = 4
# More workers than this wait for the process that reads the rows.
MOST_WORKERS = 16
# Batches in work for each worker; more would only fill memory.
AHEAD = 2
# What a batch may take: 500 short rows take a tenth of a second of processor time, and a long row
# goes through at 2.5 MB a second (measured). Fifty times as slow is no slow machine.
BATCH_SECONDS = 20.0
BYTES_A_SECOND = 50_000
BATCH_GROWTH = 8 * GIBIBYTE

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
    """Applies `work` to batches in `processes` processes; as many as there are cores if None.

    `blame` looks for the row on which a batch did not end, and returns the error that names it.
    """

    def __init__(
        self,
        work: Callable[[Batch], Result],
        processes: int | None = None,
        blame: Callable[[Batch], SFTRecipesError | None] | None = None,
    ) -> None:
        self._work = work
        self._processes = worker_count(processes)
        self._blame = blame

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Result]]:
        """Each batch with its result, in order. What `work` raises is raised here.

        Raises what `blame` returns for a batch that took more time or memory than any should, and
        TrainingFault where a worker was killed for another reason.
        """
        remaining = iter(batches)
        first = list(islice(remaining, FEW_BATCHES))
        if not first:
            return
        processes = min(self._processes, len(first))
        if len(first) == FEW_BATCHES:
            processes = self._processes
        elif start_method() != "fork":
            for batch in first:
                yield batch, self._work(batch)
            return
        waiting: deque[tuple[Batch, Future[Result]]] = deque()
        with self._start(processes) as pool:
            try:
                for batch in chain(first, remaining):
                    waiting.append((batch, pool.submit(_run, pickle.dumps(batch))))
                    if len(waiting) > AHEAD * processes:
                        yield self._result(waiting)
                while waiting:
                    yield self._result(waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def _result(self, waiting: deque[tuple[Batch, Future[Result]]]) -> tuple[Batch, Result]:
        """The oldest batch with its result."""
        batch, future = waiting[0]
        try:
            result = future.result()
        except MemoryError as error:
            raise self._fault([batch]) from error
        except BrokenProcessPool as error:
            # All batches in work end with the first that is killed.
            raise self._fault([suspect for suspect, _ in waiting]) from error
        waiting.popleft()
        return batch, result

    def _fault(self, suspects: Iterable[Batch]) -> SFTRecipesError:
        """The row that is to blame, if one is found."""
        if self._blame is not None:
            for batch in suspects:
                culprit = self._blame(batch)
                if culprit is not None:
                    return culprit
        what = "a process that prepared rows was killed, perhaps for memory"
        return TrainingFault(f"{what}. Fix: free memory, or set dataset_num_proc: 1.")

    def _start(self, processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            processes,
            multiprocessing.get_context(start_method()),
            initializer=_begin,
            initargs=(self._work, os.getpid()),
        )


def _begin(work: Callable[[Any], Any], parent: int) -> None:
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
    # One whose parent is killed would wait for its next batch for ever.
    stop_request.listen_for_parent(signal.SIGKILL, parent)
    limit_growth(BATCH_GROWTH)


def _run(pickled: bytes) -> Any:
    if _work is None:
        raise RuntimeError("a worker that was not begun")
    batch = pickle.loads(pickled)
    with limited_time(BATCH_SECONDS + len(pickled) / BYTES_A_SECOND):
        return _work(batch)
