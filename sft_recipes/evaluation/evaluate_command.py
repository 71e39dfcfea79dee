"""The `evaluate` command: load, generate, score, compare with a base, write, print."""

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sft_recipes import models, run_folder
from sft_recipes.data.trained_rows import trained_rows
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import evaluator, retention
from sft_recipes.evaluation.cautions import cautions, of_template
from sft_recipes.evaluation.comparison import (
    System,
    compare_all,
    earlier,
    facts_of,
    task_table,
    training_curves,
)
from sft_recipes.evaluation.data_set_losses import losses_of_run
from sft_recipes.evaluation.evaluation_request import EvaluationRequest, conversations_to_answer
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.further_questions import (
    RETENTION,
    ask_model_before,
    measure_further,
    name_of_model_before,
    questions_of,
)
from sft_recipes.evaluation.gate import check_possible, judge, read_gate
from sft_recipes.evaluation.gate_bounds import Bound
from sft_recipes.evaluation.generation import default_batch_size
from sft_recipes.evaluation.open_run import OpenedRun, base_model, open_run
from sft_recipes.evaluation.prompted_base import (
    against_prompting,
    ask_prompted,
    plan_shots,
    shot_counts,
)
from sft_recipes.evaluation.questions import DATA, Answers, Asking
from sft_recipes.evaluation.suspects import Suspects, find_suspects
from sft_recipes.evaluation.training_rows import TrainingRows, read_training_rows
from sft_recipes.messages import Example
from sft_recipes.models import InferenceModel
from sft_recipes.report import evaluation_tables, evaluation_text
from sft_recipes.report.evaluation_verdict import Verdict, next_step, verdict_of
from sft_recipes.statistics import Estimate


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation, the base's where one was asked for, and the folder both were written to.

    `extra` holds what else is known, as plain data: `verdict`, `warnings`, `training_rows`,
    `data_set_losses`, `training`, `comparisons`, `task_differences`, `training_curves`, with a base `prompting`, and
    where asked for `suspects`, `format_overfitting`, `safety`, `retention`, `gate`.
    """

    request: EvaluationRequest
    evaluation: Evaluation
    base: Evaluation | None
    folder: Path
    extra: Mapping[str, Any]

    @property
    def is_main(self) -> bool:
        """Whether this process is the one to print, of several with the same result."""
        return bool(PartialState().is_main_process)

    @cached_property
    def base_content(self) -> dict[str, Any] | None:
        """What the base's `metrics.json` holds."""
        return None if self.base is None else self.base.as_json()

    @cached_property
    def _figures(self) -> dict[str, Any]:
        return {**self.evaluation.as_json(self.base), **self.extra}

    @cached_property
    def verdict(self) -> Verdict:
        """What all of it comes to, in one sentence."""
        return verdict_of(self._figures, self.base_content, self.evaluation.rows)

    @cached_property
    def content(self) -> dict[str, Any]:
        """What `metrics.json` holds, without where the numbers come from."""
        return {**self._figures, "verdict": self.verdict.sentence}

    def as_json(self) -> dict[str, Any]:
        """Plain data for `evaluate --json`."""
        content = {"folder": str(self.folder), **self.content}
        if self.base_content is not None:
            content["base"] = self.base_content
        return content

    def print(self, examples: int, everything: bool = False) -> None:
        """The verdict, five figures, some answers, and where the rest is; or every figure."""
        content = self.content
        rows = self.evaluation.rows
        print(evaluation_text.verdict_text(content))
        if everything:
            parts = list(evaluation_tables.PARTS)
            print(evaluation_tables.metrics_text(content, self.base_content, rows), end="")
        else:
            parts = self._parts_asked_for()
            print(evaluation_text.rows_text(content, rows), end="")
            print(evaluation_text.figures_text(content, self.base_content), end="")
            print(evaluation_text.task_types_text(content), end="")
            print(evaluation_text.data_sets_text(content), end="")
        print(evaluator.examples_text(self.evaluation, self.base, examples), end="")
        for part in parts:
            if part in content:
                print(evaluation_tables.PARTS[part](content), end="")
        print(evaluation_text.where_the_rest_is(self.folder, everything), end="")
        base = self.request.base if self.request.base_is_model else None
        print(f"next: {next_step(self.verdict, content, self.request.model_or_run, base)}")

    def _parts_asked_for(self) -> list[str]:
        """What is said without `--all`, too: whoever names an option wants its answer."""
        parts = list(evaluation_tables.ASKED_FOR)
        if self.request.compare:
            parts.insert(0, "comparisons")
        return parts


def run_evaluation(request: EvaluationRequest, progress: bool = True) -> EvaluationResult:
    """Evaluate and write `metrics.json`, `samples.jsonl` and `report.html`, by the main process.

    The base is asked with the same template and tokenizer. Raises InputError if there is nothing to
    answer, or if the base or what is compared answered other rows or has another vocabulary.
    """
    # Before models load: processes find one another, and each GPU is chosen.
    PartialState(cpu=not torch.cuda.is_available())
    bounds = _read_bounds(request)
    loaded = models.load_for_inference(request.model_or_run, request.dtype)
    run = open_run(request.model_or_run, loaded.tokenizer, request.chat_template)
    info = _provenance(request, run, loaded)

    # What is asked, and everything that can be refused before the first answer.
    examples = conversations_to_answer(request, run)
    questions = questions_of(request, run, examples, {bound.metric for bound in bounds})
    before = name_of_model_before(request, run, questions)
    systems = _earlier_systems(request, examples)
    training = _training_rows(request, run, examples, is_judged=bool(bounds))
    asking = _asking(request, run, progress)
    asking.check_lengths(loaded.model, questions.values())
    shots = plan_shots(request.shots, questions[DATA], training, asking, loaded.model)

    tuned = asking.ask(loaded.model, questions)
    losses = losses_of_run(request, run, loaded.model, progress)
    suspects = _suspects(request, run, loaded.model, progress)
    # Two models may not fit into memory beside each other.
    del loaded
    gc.collect()
    extra = _about_training(request, run, training, tuned[DATA], suspects, losses)
    base: dict[str, Evaluation] = {}
    if request.base_is_model:
        model = base_model(str(request.base), run.labeller.renderer.tokenizer, request.dtype)
        prompted = ask_prompted(asking, model, questions[DATA], shots)
        base = asking.ask(model, questions, prompted.answers)
        systems = [*prompted.systems(), *systems]
        extra["prompting"] = against_prompting(tuned[DATA], prompted)
    elif request.base is not None:
        base = {DATA: systems[0].evaluation}
    base |= ask_model_before(request, run, asking, questions, before)

    # What is said of the answers.
    extra |= _compare(request, tuned[DATA], base.get(DATA), systems, training, info)
    measured = measure_further(request, tuned, base, before)
    extra |= measured.content
    if bounds:
        extra["gate"] = judge(bounds, tuned[DATA], base.get(DATA), measured.values, training.seen)
    result = EvaluationResult(request, tuned[DATA], base.get(DATA), request.folder, extra)
    _write(result, tuned, base, info, suspects, before)
    return result


def _asking(request: EvaluationRequest, run: OpenedRun, progress: bool) -> Asking:
    """How every model is asked."""
    segments = run.labeller.renderer.template_segments
    return Asking(request.max_new_tokens, request.batch_size, segments, progress)


def _suspects(
    request: EvaluationRequest, run: OpenedRun, model: Any, progress: bool
) -> Suspects | None:
    """The training rows with the highest loss, if they were asked for."""
    if not request.suspects or run.recipe is None:
        return None
    folder = Path(request.model_or_run) / run_folder.PREPARED
    return find_suspects(model, run, run.recipe, folder, progress)


def _about_training(
    request: EvaluationRequest,
    run: OpenedRun,
    training: TrainingRows,
    tuned: Evaluation,
    suspects: Suspects | None,
    losses: Mapping[str, Estimate],
) -> dict[str, Any]:
    """What is to be said first, and what is known of the rows that were trained and held out."""
    warnings = cautions(training, tuned.rows)
    renderer = run.labeller.renderer
    warnings += of_template(request.model_or_run, renderer, request.chat_template)
    content: dict[str, Any] = {
        "warnings": warnings,
        "training_rows": training.as_json(),
        "data_set_losses": evaluator.estimates_as_json(losses),
    }
    if suspects is not None:
        content["suspects"] = suspects.as_json()
    return content


def _read_bounds(request: EvaluationRequest) -> list[Bound]:
    """The gate's bounds. Raises InputError if there is no base that one of them needs."""
    if not request.gate:
        return []
    path = Path(request.gate)
    if request.gate == "recipe":
        # The bounds that stood in the recipe when the run was trained.
        path = Path(request.model_or_run) / run_folder.RECIPE
    bounds = read_gate(path)
    check_possible(bounds, model=request.base_is_model, answers=request.base is not None)
    return bounds


def _earlier_systems(request: EvaluationRequest, examples: Sequence[Example]) -> list[System]:
    """The evaluations of before that are compared; a base that is one of them stands first."""
    folders = list(request.compare or ())
    if request.base is not None and not request.base_is_model:
        folders.insert(0, request.base)
    return [earlier(folder, request.folder.name, examples) for folder in folders]


def _training_rows(
    request: EvaluationRequest, run: OpenedRun, examples: Sequence[Example], is_judged: bool
) -> TrainingRows:
    """What is known of the run's training rows; a gate refuses examples that are among them."""
    if request.suspects and run.recipe is None:
        what = "the training rows of this model are not known"
        raise InputError(Problem("command line", "--suspects", what, "evaluate a run folder"))
    most_shots = max(shot_counts(request.shots), default=0)
    if most_shots and (run.recipe is None or not request.base_is_model):
        what = "training rows are shown to a base: both are needed"
        fix = "evaluate a run folder and add --base MODEL"
        raise InputError(Problem("command line", "--shots", what, fix))
    if run.recipe is None:
        return TrainingRows(None)
    try:
        trained = trained_rows(run.recipe, Path(request.model_or_run) / run_folder.PREPARED)
        training = read_training_rows(run.recipe, run.labeller, trained, examples, most_shots)
    except InputError as error:
        if most_shots:
            raise
        return TrainingRows(None, unknown=str(error))
    if is_judged and not request.allow_trained_rows:
        training.refuse_seen("--gate")
    return training


def _compare(
    request: EvaluationRequest,
    tuned: Evaluation,
    base: Evaluation | None,
    systems: Sequence[System],
    training: TrainingRows,
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """The evaluation beside others, by task type, and over the steps of training."""
    run = Path(request.model_or_run)
    this = System("tuned", tuned, facts_of(run, info))
    content: dict[str, Any] = {}
    if "recipe" in this.facts:
        content["training"] = {
            "rows": this.facts["data"]["rows"],
            "model": this.facts["recipe"]["model_name_or_path"],
        }
    return {
        **content,
        "comparisons": compare_all(this, systems),
        "task_differences": task_table(tuned, base, training.task_types),
        "training_curves": training_curves(run / run_folder.LOG),
    }


def _write(
    result: EvaluationResult,
    tuned: Answers,
    base: Answers,
    info: Mapping[str, Any],
    suspects: Suspects | None,
    before: str | None,
) -> None:
    """The evaluation itself, and below it every other one; the main process writes."""
    if not result.is_main:
        return
    request = result.request
    extra = {**result.extra, "verdict": result.verdict.sentence}
    evaluator.write_evaluation(
        result.evaluation, result.folder, info=info, base=result.base, extra=extra
    )
    if suspects is not None:
        suspects.write(result.folder)
    for name, evaluation in tuned.items():
        if name != DATA:
            own = _info_of(info, request.model_or_run, name)
            evaluator.write_evaluation(evaluation, result.folder / name, info=own)
    for name, evaluation in base.items():
        if name == DATA and not request.base_is_model:
            continue  # it has a folder of its own
        own = _info_of(info, before or request.base, f"base/{name}")
        evaluator.write_evaluation(evaluation, result.folder / f"base/{name}", info=own)


def _info_of(info: Mapping[str, Any], model: str | None, place: str) -> dict[str, Any]:
    """Where the numbers of an evaluation below the first one come from."""
    own = {**info, "model": model, "asked_as": place}
    if place.endswith(RETENTION):
        own["max_new_tokens"] = retention.NEW_TOKENS
    return own


def _provenance(
    request: EvaluationRequest, run: OpenedRun, loaded: InferenceModel
) -> dict[str, Any]:
    """Where the numbers come from."""
    renderer = run.labeller.renderer
    return {
        "model": request.model_or_run,
        "kind": loaded.kind,
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.model.device),
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
        "data": request.data or "the run's own eval rows",
        "base": request.base or "not compared",
        "template_sha256": hashlib.sha256(renderer.template_text.encode()).hexdigest(),
        "chat_template_kwargs": renderer.chat_template_kwargs,
        "decoding": "greedy",
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size or default_batch_size(),
        "stop_ids": list(renderer.stop_ids),
    }
