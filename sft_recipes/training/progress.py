"""What a person sees while a run trains: a live line on a terminal, else a line at each log step.

An evaluation is four figures in words and how they moved; everything else stands in `log.jsonl`.
"""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerState

# A loss counts as falling or rising where it differs by this share from the mean of those before.
TREND = 0.02
TREND_LOGS = 5
NOT_GENERATED = (
    "answers were not generated this time, to keep within evaluation.max_share of the run's time"
)


class TrainingProgress(TrainerCallback):
    """Shows a run's progress on the first process; a context, so that the terminal is left as it was.

    `generates`: whether evaluations are meant to generate answers, too. `may_be_live`: False for
    lines even on a terminal.
    """

    def __init__(self, generates: bool, may_be_live: bool = True) -> None:
        self._generates = generates
        self._is_live = may_be_live and sys.stdout.isatty()
        self._progress: Progress | None = None
        self._task: Any = None
        self._clock = _Clock()
        self._losses: list[float] = []
        self._evaluation: dict[str, float] = {}
        self._last: Mapping[str, float] = {}
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the live line."""
        self._clock = _Clock(state.global_step)
        if not (self._is_live and state.is_world_process_zero):
            return
        columns = (
            TextColumn("{task.fields[doing]}"),
            BarColumn(24),
            TextColumn("{task.fields[said]}"),
        )
        self._progress = Progress(*columns, console=Console(soft_wrap=True), transient=True)
        self._task = self._progress.add_task(
            "",
            total=state.max_steps,
            completed=state.global_step,
            doing="training",
            said="first step",
        )
        self._progress.start()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """An evaluation is over when the next step begins; the first one starts the clock."""
        self._clock.start()
        self._tell_evaluation(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._update(completed=state.global_step, said=self._said(state), doing="training")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Say that it is evaluated."""
        self._update(doing="evaluating")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Take in a loss or figures of an evaluation; not on a terminal, a loss is a line."""
        logs = logs or {}
        for key, value in logs.items():
            if key.startswith("eval_") and isinstance(value, float):
                self._evaluation[key.removeprefix("eval_")] = value
        if "loss" not in logs:
            return
        self._shown = self._figures(logs)
        self._losses.append(float(logs["loss"]))
        self._update(said=self._said(state))
        if self._progress is None and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}  {self._said(state)}", flush=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell the last evaluation, and take the line away."""
        self._tell_evaluation(state)
        if self._progress is not None:
            self._progress.stop()

    def _update(self, **fields: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, **fields)

    def _figures(self, logs: Mapping[str, Any]) -> str:
        """Loss with its trend, learning rate, and tokens a second since the log before."""
        figures = [f"loss {float(logs['loss']):.3f}{self._trend(float(logs['loss']))}"]
        if "learning_rate" in logs:
            learning_rate = float(logs["learning_rate"])
            figures.append(f"lr {learning_rate:.1e}" if learning_rate else "lr 0")
        rate = self._clock.tokens_a_second(float(logs.get("num_tokens", 0)))
        if rate:
            figures.append(f"{rate:,.0f} tokens/s")
        return "  ".join(figures)

    def _trend(self, loss: float) -> str:
        before = self._losses[-TREND_LOGS:]
        if not before:
            return ""
        mean = sum(before) / len(before)
        if abs(loss - mean) <= TREND * abs(mean):
            return " ="
        return " falling" if loss < mean else " rising"

    def _said(self, state: TrainerState) -> str:
        done = f"step {state.global_step}/{state.max_steps}  " if self._progress else ""
        times = self._clock.times(state.global_step, state.max_steps)
        epoch = f"epoch {state.epoch or 0:.2f}"
        return done + "  ".join(filter(None, (epoch, self._shown, times)))

    def _tell_evaluation(self, state: TrainerState) -> None:
        """The line of an evaluation that was logged since the last step."""
        figures = self._evaluation
        if "loss" not in figures or not state.is_world_process_zero:
            return
        lines = [f"evaluation at step {state.global_step}: {evaluation_words(figures, self._last)}"]
        if self._generates and "eos_rate" not in figures:
            lines.append(f"  {NOT_GENERATED}")
        for line in lines:
            if self._progress is None:
                print(line, flush=True)
            else:
                self._progress.console.print(line, markup=False, highlight=False)
        self._last = {**self._last, **figures}
        self._evaluation = {}


def evaluation_words(figures: Mapping[str, float], last: Mapping[str, float]) -> str:
    """`loss 0.412 (-0.100), exact match 0.31 (+0.12), ended by itself 0.98, well formed 0.95`.

    `last`: the figures of the evaluation before. Where no answer ever was exact, words shared with
    the reference are told instead.
    """
    names = {"loss": "loss", "exact_match": "exact match"}
    if not figures.get("exact_match") and not last.get("exact_match"):
        names = {"loss": "loss", "token_f1": "token F1"}
    names |= {"eos_rate": "ended by itself", "format_adherence": "well formed"}
    words = []
    for key, name in names.items():
        if key not in figures:
            continue
        digits = 3 if key == "loss" else 2
        text = f"{name} {figures[key]:.{digits}f}"
        if key in last:
            text += f" ({figures[key] - last[key]:+.{digits}f})"
        words.append(text)
    return ", ".join(words)


class _Clock:
    """Since when a run trains, and at which step and token it stood.

    What comes before the first step (a rehearsed evaluation, a checkpoint) would make the first steps look slow.
    """

    def __init__(self, step: int = 0) -> None:
        self._started: float | None = None
        self._first_step = step
        self._tokens = 0.0
        self._tokens_at = 0.0

    def start(self) -> None:
        """Start it, if it does not run."""
        if self._started is None:
            self._started = time.monotonic()
            self._tokens_at = self._started

    def tokens_a_second(self, tokens: float) -> float:
        """The rate since this was asked before; 0 where nothing is known."""
        now = time.monotonic()
        rate = 0.0
        # The first count of a resumed run holds all tokens of before.
        if self._tokens or not self._first_step:
            rate = max(tokens - self._tokens, 0.0) / max(now - self._tokens_at, 1e-9)
        self._tokens = tokens
        self._tokens_at = now
        return rate

    def times(self, step: int, steps: int) -> str:
        """How long it has been, and how long it will be at this pace."""
        elapsed = 0.0
        if self._started is not None:
            elapsed = time.monotonic() - self._started
        done = step - self._first_step
        text = f"{_duration(elapsed)} elapsed"
        if done > 0:
            text += f", {_duration(elapsed / done * (steps - step))} left"
        return text


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
