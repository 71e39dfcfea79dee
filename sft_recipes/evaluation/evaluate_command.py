"""The `evaluate` command: load, generate, score, compare with a base, write, print."""

import gc
import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sft_recipes import models, run_folder
from sft_recipes.data.trained_rows import trained_rows
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import evaluator, retention
from sft_recipes.evaluation.cautions import cautions
from sft_recipes.evaluation.comparison import (
    System,
    compare_all,
    earlier,
    facts_of,
    task_table,
    training_curves,
)
from sft_recipes.evaluation.evaluation_request import EvaluationRequest, conversations_to_answer
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.format_overfitting import (
    FORMAT_METRICS,
    format_questions,
    measure_formats,
)
from sft_recipes.evaluation.gate import check_possible, judge, read_gate
from sft_recipes.evaluation.gate_bounds import Bound
from sft_recipes.evaluation.generation import default_batch_size
from sft_recipes.evaluation.open_run import (
    OpenedRun,
    base_model,
    model_before,
    native_template,
    open_run,
)
from sft_recipes.evaluation.questions import (
    DATA,
    Answers,
    Asking,
    Measured,
    Question,
    Questions,
    answers_below,
)
from sft_recipes.evaluation.retention import RETENTION_METRICS, measure_retention
from sft_recipes.evaluation.safety import PROMPTS, SAFETY_METRICS, measure_safety, read_prompts
from sft_recipes.evaluation.suspects import Suspects, find_suspects
from sft_recipes.evaluation.training_rows import TrainingRows, read_training_rows
from sft_recipes.messages import Example
from sft_recipes.models import InferenceModel
from sft_recipes.report import evaluation_text

FORMATS = "formats/"
SAFETY = "safety/"
RETENTION = "retention"
SHOTS = "shots"


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation, the base's where one was asked for, and the folder both were written to.

    `extra` holds what else is known, as plain data: `warnings`, `training_rows`, `comparisons`,
    `task_differences`, `training_curves`, and where asked for `suspects`, `format_overfitting`,
    `safety`, `retention`, `gate`.
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

    def as_json(self) -> dict[str, Any]:
        """Plain data for `evaluate --json`."""
        content = {"folder": str(self.folder), **self.evaluation.as_json(self.base)}
        if self.base is not None:
            content["base"] = self.base.as_json()
        return {**content, **self.extra}

    def print(self, examples: int) -> None:
        """The table, some answers, and where the rest is."""
        print(evaluation_text.warnings_text(self.extra["warnings"]), end="")
        print(evaluator.as_text(self.evaluation, self.base, examples=examples))
        for part, as_text in evaluation_text.PARTS.items():
            if part in self.extra:
                print(as_text(self.extra[part]), end="")
        base = self.request.base if self.request.base_is_model else None
        print(evaluation_text.next_steps(self.request.model_or_run, base, self.folder))


def run_evaluation(request: EvaluationRequest, progress: bool = True) -> EvaluationResult:
    """Evaluate and write `metrics.json`, `samples.jsonl` and `report.html`, by the main process.

    The base is asked with the same template and tokenizer. Raises InputError if there is nothing to
    answer, or if the base or what is compared answered other rows or has another vocabulary.
    """
    # First of all: processes on CPU find each other only if told so, and each GPU has to be chosen
    # before models load.
    PartialState(cpu=not torch.cuda.is_available())
    bounds = _read_bounds(request)
    loaded = models.load_for_inference(request.model_or_run)
    run = open_run(request.model_or_run, loaded.tokenizer, request.chat_template)
    info = _provenance(request, run, loaded)

    # What is asked, and everything that can be refused before the first answer.
    examples = conversations_to_answer(request, run)
    questions = _questions(request, run, examples, {bound.metric for bound in bounds})
    before = _model_before(request, run, questions)
    systems = _earlier_systems(request, examples)
    training = _training_rows(request, run, examples, is_judged=bool(bounds))
    shots = _with_shots(request, run, examples, training)
    segments = run.labeller.renderer.template_segments
    asking = Asking(request.max_new_tokens, request.batch_size, segments, progress)
    asking.check_lengths(loaded.model, questions | shots)

    tuned = asking.ask(loaded.model, questions)
    suspects = _suspects(request, run, loaded.model, progress)
    # Two models may not fit into memory beside each other.
    del loaded
    gc.collect()
    base: dict[str, Evaluation] = {}
    if request.base_is_model:
        model = base_model(str(request.base), run.labeller.renderer.tokenizer)
        base = _ask_base(model, asking, questions | shots, tuned[DATA])
        systems = [*_base_systems(request, base), *systems]
    elif request.base is not None:
        base = {DATA: systems[0].evaluation}
    base |= _ask_before(request, run, asking, questions, before)

    # What is said of the answers.
    extra = _about_training(training, tuned[DATA], suspects)
    extra |= _compare(request, tuned[DATA], base.get(DATA), systems, training, info)
    measured = _measure_further(request, tuned, base, before)
    extra |= measured.content
    if bounds:
        extra["gate"] = judge(bounds, tuned[DATA], base.get(DATA), measured.values)
        extra["gate"]["trained_rows"] = len(training.seen)
    result = EvaluationResult(request, tuned[DATA], base.get(DATA), request.folder, extra)
    if result.is_main:
        _write(result, tuned, base, info, suspects, before)
    return result


def _suspects(
    request: EvaluationRequest, run: OpenedRun, model: Any, progress: bool
) -> Suspects | None:
    """The training rows with the highest loss, if they were asked for."""
    if not request.suspects or run.recipe is None:
        return None
    folder = Path(request.model_or_run) / run_folder.PREPARED
    return find_suspects(model, run, run.recipe, folder, progress)


def _about_training(
    training: TrainingRows, tuned: Evaluation, suspects: Suspects | None
) -> dict[str, Any]:
    """What is to be said first, and what is known of the rows that were trained."""
    content: dict[str, Any] = {
        "warnings": cautions(training, tuned.rows),
        "training_rows": training.as_json(),
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


def _questions(
    request: EvaluationRequest, run: OpenedRun, examples: Sequence[Example], judged: Set[str]
) -> Questions:
    """What every model is asked, by folder: the data, then other formats and safety prompts."""
    renderer = run.labeller.renderer
    native = None
    if request.base_is_model:
        native = native_template(str(request.base), renderer.tokenizer)
    questions = {DATA: Question(renderer, examples)}
    if request.format_overfitting or judged & FORMAT_METRICS.keys():
        for name, question in format_questions(renderer, examples, native).items():
            questions[f"{FORMATS}{name}"] = question
    if request.safety or request.safety_data or judged & SAFETY_METRICS.keys():
        prompts = read_prompts(request.safety_data or PROMPTS)
        asked = [run.labeller.for_template(example) for example in prompts]
        for name, question in format_questions(renderer, asked, native).items():
            questions[f"{SAFETY}{name}"] = question
        if asked != prompts:
            questions[f"{SAFETY}no_system_prompt"] = Question(renderer, prompts)
    if request.retention or request.retention_data or judged & RETENTION_METRICS.keys():
        prompts = retention.read_prompts(request.retention_data or retention.PROMPTS)
        asked = [run.labeller.for_template(example) for example in prompts]
        questions[RETENTION] = Question(renderer, asked, retention.NEW_TOKENS)
    return questions


def _model_before(request: EvaluationRequest, run: OpenedRun, questions: Questions) -> str | None:
    """The model before tuning, where retention is asked for: `--base`, else what the run names."""
    if RETENTION not in questions:
        return None
    if request.base_is_model:
        return request.base
    before = model_before(request.model_or_run, run.recipe)
    # Refuses another vocabulary before anything is answered.
    native_template(before, run.labeller.renderer.tokenizer)
    return before


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
    if request.shots and (run.recipe is None or not request.base_is_model):
        what = "training rows are shown to a base: both are needed"
        fix = "evaluate a run folder and add --base MODEL"
        raise InputError(Problem("command line", "--shots", what, fix))
    if run.recipe is None:
        return TrainingRows(None)
    try:
        trained = trained_rows(run.recipe, Path(request.model_or_run) / run_folder.PREPARED)
        training = read_training_rows(run.recipe, run.labeller, trained, examples, request.shots)
    except InputError as error:
        if request.shots:
            raise
        return TrainingRows(None, unknown=str(error))
    if is_judged and not request.allow_trained_rows:
        training.refuse_seen("--gate")
    return training


def _with_shots(
    request: EvaluationRequest, run: OpenedRun, examples: Sequence[Example], training: TrainingRows
) -> Questions:
    """What only the base is asked: the data behind some training rows, if that was asked for."""
    if not request.shots:
        return {}
    shown = [training.shown_to(example) for example in examples]
    return {SHOTS: Question(run.labeller.renderer, shown)}


def _ask_base(
    model: Any, asking: Asking, questions: Questions, tuned: Evaluation
) -> dict[str, Evaluation]:
    """The base's answers; those with shots are answers to the rows that they stood before."""
    answers = asking.ask(model, questions)
    if SHOTS in answers:
        rows = []
        for row, own in zip(answers[SHOTS].rows, tuned.rows, strict=True):
            rows.append({**row, "messages": own["messages"]})
        answers[SHOTS] = evaluator.evaluation_from_rows(rows)
    return answers


def _ask_before(
    request: EvaluationRequest,
    run: OpenedRun,
    asking: Asking,
    questions: Questions,
    before: str | None,
) -> dict[str, Evaluation]:
    """Answers of the model before tuning to the retention prompts, unless it is asked as `--base`."""
    if before is None or request.base_is_model:
        return {}
    model = base_model(before, run.labeller.renderer.tokenizer)
    return asking.ask(model, {RETENTION: questions[RETENTION]})


def _base_systems(request: EvaluationRequest, base: Answers) -> list[System]:
    """The base, and the base with shots, as systems that answered the data."""
    systems = [System("base", base[DATA])]
    if SHOTS in base:
        systems.append(System(f"base, {request.shots} shots", base[SHOTS]))
    return systems


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
    return {
        "comparisons": compare_all(this, systems),
        "task_differences": task_table(tuned, base, training.task_types),
        "training_curves": training_curves(run / run_folder.LOG),
    }


def _measure_further(
    request: EvaluationRequest, tuned: Answers, base: Answers, before: str | None
) -> Measured:
    """Format overfitting, safety and retention where asked for, and their values for the gate."""
    content: dict[str, Any] = {}
    values: dict[str, list[float]] = {}
    formats = _by_model(tuned, base, FORMATS)
    if formats:
        measured = measure_formats(formats)
        content["format_overfitting"] = measured.content
        values |= measured.values
    answered = _by_model(tuned, base, SAFETY)
    if answered:
        measured = measure_safety(answered)
        prompts = request.safety_data or "packaged"
        content["safety"] = {"prompts": prompts, **measured.content}
        values |= measured.values
    if before is not None:
        measured = measure_retention(base[RETENTION], tuned[RETENTION])
        prompts = request.retention_data or "packaged"
        content["retention"] = {"prompts": prompts, "before": before, **measured.content}
        values |= measured.values
    return Measured(content, values)


def _by_model(tuned: Answers, base: Answers, folder: str) -> dict[str, Answers]:
    """The answers below a folder by model, without models that have none."""
    by_model: dict[str, Answers] = {}
    for model, answers in (("tuned", tuned), ("base", base)):
        below = answers_below(answers, folder)
        if below:
            by_model[model] = below
    return by_model


def _write(
    result: EvaluationResult,
    tuned: Answers,
    base: Answers,
    info: Mapping[str, Any],
    suspects: Suspects | None,
    before: str | None,
) -> None:
    """The evaluation itself, and below it every other one that was made for it."""
    request = result.request
    evaluator.write_evaluation(
        result.evaluation, result.folder, info=info, base=result.base, extra=result.extra
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
