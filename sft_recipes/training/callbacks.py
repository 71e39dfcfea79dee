"""What stands beside the training loop: a log line for everything the trainer logs, and an ending by signal."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_recipes import run_folder
from sft_recipes.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers and schedulers send the same signal several times over; only a later one is meant as a second.
_SAME_SECONDS = 3.0


class LogWriter(TrainerCallback):
    """Appends each log entry with its step and epoch to `log.jsonl` on rank 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take back what was logged after the step at which the run goes on, or by another run."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_before(line, state.global_step)]
        run_folder.write_text(self._path, "".join(kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line; a number that is not finite becomes its name, which JSON has no number for."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "epoch": state.epoch, **logs}
        plain = {}
        for key, value in entry.items():
            plain[key] = value if isinstance(value, (int, float, str)) else str(value)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")


def _is_before(line: str, step: int) -> bool:
    """Whether a line of the log is whole and tells of a step before the one that comes next."""
    if not line.endswith("}\n") or '"train_runtime"' in line:
        return False
    return step > 0 and int(json.loads(line)["step"]) <= step


class Preemption(TrainerCallback):
    """SIGTERM and SIGINT end a run after its current step, with a checkpoint; a second one aborts it.

    `asked`: this process got the signal. `agreed`: the trainer asked all ranks, and one did. Before training there is
    nothing to save, so the signal raises Preempted at once. `lock` is touched at each step: the run is alive.
    """

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self.asked = self.agreed = self._training = False
        self._first = 0.0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader's worker: the process it works for decides
        if not self._training:
            raise Preempted(
                f"{signal.Signals(number).name} before the first step; there was nothing to save"
            )
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
            os.write(
                2,
                b"\nsignal: finishing this step and saving a checkpoint; a second signal aborts\n",
            )
        elif time.monotonic() - self._first > _SAME_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """From here on there is something to save."""
        self._training = True

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop here; save here, except after an epoch's last step: what is due then comes first."""
        if state.is_world_process_zero:
            self._lock.touch()
        if self.agreed:
            control.should_training_stop = True
            control.should_save = not float(state.epoch or 0).is_integer()

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that was broken off is not evaluated and saved as a whole one."""
        if self.agreed:
            control.should_save = float(state.epoch or 0).is_integer()
            control.should_evaluate &= control.should_save
            control.should_log &= control.should_save
