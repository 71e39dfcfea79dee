"""What was logged while a run was trained: `trainer_state.json`, or the summaries beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import run_folder
from sft_recipes.model_folder import TRAINER_STATE, checkpoints
from sft_recipes.text_files import RESTORE, interpreting, read_json, read_json_lines

# What `Trainer.save_metrics` writes at the end, LLaMA-Factory's runs among them.
_SUMMARIES = ("all_results.json", "train_results.json", "eval_results.json")


class Point(NamedTuple):
    """A logged value."""

    step: int
    value: float


@dataclass(frozen=True)
class TrainingLog:
    """What was logged, in order. `planned`: the steps that were asked for, 0 where that is not known."""

    path: Path
    entries: Sequence[Mapping[str, Any]]
    step: int = 0
    planned: int = 0
    best_checkpoint: str | None = None

    def series(self, key: str) -> list[Point]:
        """All values that were logged under a name."""
        points: list[Point] = []
        for entry in self.entries:
            value = entry.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                step = entry.get("step", 0)
                points.append(Point(int(step), float(value)))
        return points

    @property
    def evaluations(self) -> list[str]:
        """The names under which losses of evaluations were logged."""
        names: dict[str, None] = {}
        for entry in self.entries:
            for name in entry:
                if name.startswith("eval_") and name.endswith("loss"):
                    names[name] = None
        return list(names)

    @property
    def was_evaluated(self) -> bool:
        """Whether anything of an evaluation was logged."""
        names = chain.from_iterable(self.entries)
        return any(name.startswith("eval_") for name in names)


def read_training_log(folder: Path, model: Path) -> TrainingLog | None:
    """The longest log of a run: of its folder, its model's or its newest checkpoint.

    Raises InputError for a damaged one.
    """
    folders = [folder, model, *reversed(checkpoints(folder))]
    logs: list[TrainingLog] = []
    for place in dict.fromkeys(folders):
        path = place / TRAINER_STATE
        if path.is_file():
            logs.append(_read_state(path))
            break
    own = folder / run_folder.LOG
    if own.is_file():
        entries = [line.content for line in read_json_lines(own, RESTORE)]
        logs.append(TrainingLog(own, entries))
    if not logs:
        return _read_summaries(folder)
    return max(logs, key=lambda log: len(log.entries))


def _read_state(path: Path) -> TrainingLog:
    content = read_json(path, RESTORE)
    with interpreting(path, RESTORE):
        entries = [dict(entry) for entry in content["log_history"]]
        return TrainingLog(
            path=path,
            entries=entries,
            step=int(content.get("global_step") or 0),
            planned=int(content.get("max_steps") or 0),
            best_checkpoint=content.get("best_model_checkpoint"),
        )


def _read_summaries(folder: Path) -> TrainingLog | None:
    """The last figures, where the log itself is not there; a training loss is that of the whole run."""
    entry: dict[str, Any] = {}
    path = None
    for name in _SUMMARIES:
        if (folder / name).is_file():
            path = path or folder / name
            entry |= read_json(folder / name, RESTORE)
    if path is None:
        return None
    if "train_loss" in entry:
        entry.setdefault("loss", entry["train_loss"])
    return TrainingLog(path, [entry])


def is_bad(point: Point) -> bool:
    """Whether a value is NaN or infinite."""
    return not math.isfinite(point.value)
