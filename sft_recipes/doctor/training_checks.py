"""What the log of a run says: whether it learned, and whether anybody looked."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from sft_recipes import run_folder
from sft_recipes.doctor.finding import Look, NotSeen, command
from sft_recipes.doctor.folder import Run
from sft_recipes.doctor.training_log import Point, TrainingLog, is_bad
from sft_recipes.model_folder import TRAINER_STATE, checkpoints, holds_model
from sft_recipes.report.number_texts import counted

# So few values say nothing of a trend.
_FEWEST = 8
# An evaluation loss that ends so far above its lowest value has turned. Judged: between evaluations
# of one model it moves by a percent or two.
_TURNED = 1.05
# A schedule that decays ends below a tenth; one that warmed up and stayed ends at 1.
_HIGH_END = 0.5
# Of the gradient norms; fp16 skips such steps while its loss scale settles.
_MANY_SKIPPED = 0.05


def _log_of(run: Run) -> TrainingLog:
    if run.log is None:
        raise NotSeen("no trainer_state.json, log.jsonl or all_results.json is here")
    return run.log


def _extent(values: Sequence[Point]) -> str:
    """Which of the logged values are meant."""
    steps = f"step {values[0].step}"
    if len(values) > 1:
        steps = f"{len(values)} values from step {values[0].step} to {values[-1].step}"
    return steps


def was_evaluated(run: Run, look: Look) -> None:
    """Somebody looked at rows that were not trained: losses of evaluations, or our own `evaluate`."""
    own: list[Path] = []
    for folder in dict.fromkeys((run.folder, run.model)):
        own += run_folder.evaluations_of(folder).glob("*/metrics.json")
    if own:
        look.seen = f"{own[0]} is there"
        return
    log = _log_of(run)
    if log.was_evaluated:
        number = sum(len(log.series(name)) for name in log.evaluations)
        look.seen = f"{number} losses of evaluations were logged"
        return
    why = "whether the run learned or only memorised its rows is not known"
    fix = command("evaluate", run.model, "--data") + " FILE"
    look.find("warning", log.path, "no evaluation ever ran", why, fix)


def loss_is_sound(run: Run, look: Look) -> None:
    """The training loss is a number other than 0, and fell: its last quarter of values lies below the
    first (judged from 8 values on).
    """
    log = _log_of(run)
    losses = log.series("loss")
    if not losses:
        raise NotSeen(f"{log.path} holds no loss")
    fix = "see how long the rows are and what of them is an answer: " + command(
        "inspect", "ROWS", "--tokenizer", run.model
    )
    bad = [point for point in losses if is_bad(point)]
    zeros = [point for point in losses if point.value == 0]
    if bad:
        what = f"the training loss is NaN or infinite ({_extent(bad)})"
        why = "from then on nothing was learned, and weights may be NaN"
        fix = "train again with bf16 in place of fp16, or at a lower learning rate with max_grad_norm 1.0"
        look.find("error", log.path, what, why, fix)
    elif zeros:
        what = f"the training loss is 0 ({_extent(zeros)})"
        why = (
            "Trainer logs 0 where no token of a batch had a label, and in place of a loss that was "
            "NaN from the first step (logging_nan_inf_filter)"
        )
        look.find("error", log.path, what, why, fix)
    else:
        _require_fall(log, losses, look, fix)
    look.seen = f"{len(losses)} values, from {losses[0].value:.4g} to {losses[-1].value:.4g}"


def _require_fall(log: TrainingLog, losses: Sequence[Point], look: Look, fix: str) -> None:
    if len(losses) < _FEWEST:
        return
    quarter = len(losses) // 4
    first = fmean(point.value for point in losses[:quarter])
    last = fmean(point.value for point in losses[-quarter:])
    if last >= first:
        what = f"the loss never fell: {first:.4g} in the first quarter, {last:.4g} in the last"
        why = "nothing was learned of the rows, or the learning rate was too high or too low"
        look.judge("warning", log.path, what, why, fix)


def evaluation_loss_is_sound(run: Run, look: Look) -> None:
    """The loss on rows that were not trained is a number, and did not turn: it ends at most 5 % above its
    lowest value (judged).
    """
    log = _log_of(run)
    if not log.evaluations:
        raise NotSeen(f"{log.path} holds no loss of an evaluation")
    seen: list[str] = []
    for name in log.evaluations:
        losses = log.series(name)
        bad = [point for point in losses if is_bad(point)]
        if bad:
            what = f"{name} is NaN or infinite ({_extent(bad)})"
            why = "the evaluation had no token with a label, or the model answers NaN"
            fix = command("evaluate", run.model, "--data") + " FILE"
            look.find("error", log.path, what, why, fix)
            continue
        _require_no_turn(run, log, name, look)
        seen.append(f"{name} from {losses[0].value:.4g} to {losses[-1].value:.4g}")
    look.seen = "; ".join(seen)


def _require_no_turn(run: Run, log: TrainingLog, name: str, look: Look) -> None:
    losses = log.series(name)
    lowest = min(losses, key=lambda point: point.value)
    last = losses[-1]
    if last.value <= lowest.value * _TURNED:
        return
    what = f"{name} was lowest at step {lowest.step} ({lowest.value:.4g}) and ended at {last.value:.4g}"
    why = "the last steps only memorised the rows, unless the best checkpoint was loaded at the end"
    checkpoint = run.folder / f"checkpoint-{lowest.step}"
    fix = "train again for fewer epochs, or with load_best_model_at_end"
    if checkpoint.is_dir():
        fix = command("evaluate", checkpoint, "--data") + " FILE"
    look.judge("warning", log.path, what, why, fix)


def gradients_are_sound(run: Run, look: Look) -> None:
    """Gradients were numbers other than 0. One step in twenty may be NaN or infinite, which fp16 skips;
    the last may not.
    """
    log = _log_of(run)
    norms = log.series("grad_norm")
    if not norms:
        raise NotSeen(f"{log.path} holds no grad_norm")
    bad = [point for point in norms if is_bad(point)]
    zeros = [point for point in norms if point.value == 0]
    ends_badly = bool(bad) and is_bad(norms[-1])
    if ends_badly or len(bad) > _MANY_SKIPPED * len(norms):
        what = f"the gradient norm is NaN or infinite ({_extent(bad)})"
        why = "such a step either spoils the weights or is skipped"
        fix = "train again with bf16 in place of fp16, or at a lower learning rate"
        look.find("error", log.path, what, why, fix)
    if zeros:
        what = f"the gradient norm is 0 ({_extent(zeros)})"
        why = "no weight moved in these steps: nothing was trainable, or no token had a label"
        fix = (
            "check which parameters are trainable (with LoRA and gradient checkpointing, "
            "model.enable_input_require_grads() must have been called) and that rows have labels"
        )
        look.find("error", log.path, what, why, fix)
    largest = max((point.value for point in norms if math.isfinite(point.value)), default=math.nan)
    look.seen = f"{len(norms)} norms, the largest {largest:.4g}"


def schedule_ended(run: Run, look: Look) -> None:
    """The learning rate was above 0, the run came to the end of its schedule, and that ended below half of
    the highest rate (judged).
    """
    log = _log_of(run)
    rates = log.series("learning_rate")
    if not rates:
        raise NotSeen(f"{log.path} holds no learning_rate")
    highest = max(point.value for point in rates)
    last = rates[-1]
    look.seen = f"at most {highest:.4g}, at the end {last.value:.4g}"
    if highest == 0:
        what = "the learning rate was 0 in every step"
        why = "no weight moved"
        fix = "set learning_rate, and fewer warmup steps than the run has"
        look.find("error", log.path, what, why, fix)
        return
    if 0 < log.step < log.planned and run.model != run.folder:
        what = f"the run stopped at step {log.step} of {log.planned}"
        why = "its last checkpoint is no finished model"
        fix = f"resume it in the tool that trained it, from {run.model}"
        look.find("warning", log.path, what, why, fix)
        return
    is_whole = log.step >= log.planned
    if is_whole and len(rates) >= _FEWEST and last.value > _HIGH_END * highest:
        what = f"the learning rate ended at {last.value / highest:.0%} of its highest value"
        why = "a last phase at low rates usually lowers the loss further"
        fix = "train with lr_scheduler_type: cosine, or linear"
        look.judge("note", log.path, what, why, fix)


def checkpoints_are_whole(run: Run, look: Look) -> None:
    """No save broke off: every `checkpoint-N` has a model and its `trainer_state.json`."""
    folders = checkpoints(run.folder) or [run.model]
    of_trainer = [path for path in folders if path.name.startswith("checkpoint-")]
    if not of_trainer:
        raise NotSeen("there is no checkpoint-N")
    for path in of_trainer:
        _require_whole(path, look, holds_model(path), (path / TRAINER_STATE).is_file())
    number = counted(len(of_trainer), "checkpoint")
    look.seen = f"{number} with a model and its {TRAINER_STATE}"


def _require_whole(path: Path, look: Look, has_model: bool, has_state: bool) -> None:
    missing = ""
    if not has_model:
        missing = "no model's config.json or adapter_config.json"
    elif not has_state:
        missing = "no trainer_state.json, which Trainer writes near the end of a save"
    if missing:
        what = f"the checkpoint holds {missing}"
        why = "its save broke off, and resuming from it fails"
        fix = f"move it out of the way: mv {path} {path.with_name('broken-' + path.name)}"
        look.find("warning", path, what, why, fix)
