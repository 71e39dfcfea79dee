"""What trackers get beyond the trainer's own numbers: a few answers beside what was expected.

Trackers are TRL's and transformers' own. None is on unless `report_to` names one, and trackio keeps
what it gets on this machine: its ways of sending it elsewhere are switched off or refused.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from sft_recipes.errors import Problem
from sft_recipes.recipe import Recipe
from sft_recipes.release.markdown import inline

SHOWN_ANSWERS = 8
_TITLE = "sample answers"
_COLUMNS = ("prompt", "expected", "answer")
# Each makes trackio send what it gets, whatever the recipe says.
_TRACKIO_SENDERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")


class SampleAnswer(NamedTuple):
    """An answer beside its prompt and what was expected: a row of the table, in its order."""

    prompt: str
    expected: str
    answer: str


class SampleAnswers(TrainerCallback):
    """Gives the trackers that a recipe names the first answers of each evaluation that generated.

    `take_rows` returns the scored rows of an evaluation once, and nothing until the next one.
    """

    def __init__(self, trainer: Any, take_rows: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._trainer = trainer
        self._take_rows = take_rows

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Send a table behind the metrics of the same answers."""
        answers = []
        for row in self._take_rows()[:SHOWN_ANSWERS]:
            # The last turn of a sample's conversation is the answer that was expected.
            asked = row["messages"][-2]["content"] if len(row["messages"]) > 1 else row["prompt"]
            answers.append(SampleAnswer(asked, row["reference"] or "", row["response"]))
        if not (answers and state.is_world_process_zero):
            return
        for tracker in args.report_to:
            if tracker in _SENDERS:
                _SENDERS[tracker](self._trainer, answers, state.global_step)


def sending_problems(recipe: Recipe, trackers: Sequence[str]) -> Iterator[Problem]:
    """What in the environment would send a run's log away though the recipe cannot ask for it."""
    for name in _TRACKIO_SENDERS:
        if "trackio" in trackers and os.environ.get(name):
            what = f"{name} in the environment makes trackio send this run's log elsewhere"
            yield Problem(recipe.place("report_to"), "report_to", what, f"unset {name}")


def _to_trackio(trainer: Any, answers: Sequence[SampleAnswer], step: int) -> None:
    import trackio

    table = trackio.Table(columns=list(_COLUMNS), data=list(map(list, answers)))
    trackio.log({_TITLE: table, "train/global_step": step})


def _to_wandb(trainer: Any, answers: Sequence[SampleAnswer], step: int) -> None:
    import wandb

    table = wandb.Table(columns=list(_COLUMNS), data=list(map(list, answers)))
    wandb.log({_TITLE: table, "train/global_step": step})


def _to_tensorboard(trainer: Any, answers: Sequence[SampleAnswer], step: int) -> None:
    # TensorBoard reads texts as Markdown, so they enter it as those of a model card do.
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|"]
    for answer in answers:
        lines.append(f"| {' | '.join(map(inline, answer))} |")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(_TITLE, "\n".join(lines), step)


_SENDERS: Mapping[str, Callable[[Any, Sequence[SampleAnswer], int], None]] = {
    "trackio": _to_trackio,
    "wandb": _to_wandb,
    "tensorboard": _to_tensorboard,
}
