"""What stands beside the training loop: a log line for everything the trainer logs, and an ending by signal."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_recipes import run_folder, stop_request


class LogWriter(TrainerCallback):
    """Appends each log entry with its step and epoch to `log.jsonl` on rank 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take back what was logged after the step at which the run goes on, or by another run."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        content = self._path.read_bytes().decode("utf-8", errors="replace")
        lines = content.split("\n")
        kept = [line for line in lines if _is_before(line, state.global_step)]
        run_folder.write_text(self._path, "".join(f"{line}\n" for line in kept))

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
    if step <= 0:
        return False
    try:
        entry = json.loads(line)
    except ValueError:  # cut off when the run was killed, or damaged since
        return False
    logged_at = entry.get("step") if isinstance(entry, dict) else None
    is_step = isinstance(logged_at, int) and logged_at <= step
    return is_step and "train_runtime" not in entry


class Preemption(TrainerCallback):
    """A signal ends a run after its current step, with a checkpoint.

    `agreed`: the trainer asked all ranks, and one of them had got a signal. `lock` is touched at each step: the run
    is alive.
    """

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self.agreed = False

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return bool(stop_request.asked())

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop here; save here, except after an epoch's last step: what is due then comes first."""
        if state.is_world_process_zero:
            with contextlib.suppress(FileNotFoundError):  # the folder was moved while it trains
                os.utime(self._lock)
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
