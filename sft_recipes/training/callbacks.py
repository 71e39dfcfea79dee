"""What a run writes while it trains: one line of JSON for everything the trainer logs."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState


class LogWriter(TrainerCallback):
    """Appends each log entry with its step and epoch to `log.jsonl` on rank 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line; a number that is not finite becomes its name, which JSON has no number for."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "epoch": state.epoch, **logs}
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in entry.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
