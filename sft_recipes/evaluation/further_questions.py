"""What an evaluation asks beside its data, of which model, and what the answers say."""

from collections.abc import Sequence, Set
from typing import Any

from sft_recipes.evaluation import retention, safety
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.format_overfitting import (
    FORMAT_METRICS,
    format_questions,
    measure_formats,
)
from sft_recipes.evaluation.open_run import OpenedRun, base_model, model_before, native_template
from sft_recipes.evaluation.questions import (
    DATA,
    Answers,
    Asking,
    Measured,
    Question,
    Questions,
    answers_below,
)
from sft_recipes.messages import Example

FORMATS = "formats/"
SAFETY = "safety/"
RETENTION = "retention"


def questions_of(
    request: EvaluationRequest, run: OpenedRun, examples: Sequence[Example], judged: Set[str]
) -> Questions:
    """What every model is asked, by folder: the data, then what else was asked for.

    `judged`: metrics of the gate, some of which ask for more.
    """
    renderer = run.labeller.renderer
    native = None
    if request.base_is_model:
        native = native_template(str(request.base), renderer.tokenizer)
    questions = {DATA: Question(renderer, examples)}
    if request.format_overfitting or judged & FORMAT_METRICS.keys():
        for name, question in format_questions(renderer, examples, native).items():
            questions[f"{FORMATS}{name}"] = question
    if request.safety or request.safety_data or judged & safety.SAFETY_METRICS.keys():
        prompts = safety.read_prompts(request.safety_data or safety.PROMPTS)
        asked = [run.labeller.for_template(example) for example in prompts]
        for name, question in format_questions(renderer, asked, native).items():
            questions[f"{SAFETY}{name}"] = question
        if asked != prompts:
            questions[f"{SAFETY}no_system_prompt"] = Question(renderer, prompts)
    if request.retention or request.retention_data or judged & retention.RETENTION_METRICS.keys():
        prompts = retention.read_prompts(request.retention_data or retention.PROMPTS)
        asked = [run.labeller.for_template(example) for example in prompts]
        questions[RETENTION] = Question(renderer, asked, retention.NEW_TOKENS)
    return questions


def name_of_model_before(
    request: EvaluationRequest, run: OpenedRun, questions: Questions
) -> str | None:
    """The model before tuning, where retention is asked for: `--base`, else what the run names.

    Raises InputError where it cannot be asked.
    """
    if RETENTION not in questions:
        return None
    if request.base_is_model:
        return request.base
    before = model_before(request.model_or_run, run.recipe, "--retention")
    # Refuses another vocabulary before anything is answered.
    native_template(before, run.labeller.renderer.tokenizer)
    return before


def ask_model_before(
    request: EvaluationRequest,
    run: OpenedRun,
    asking: Asking,
    questions: Questions,
    before: str | None,
) -> dict[str, Evaluation]:
    """Its answers to the retention prompts; none where it is asked everything, as `--base`."""
    if before is None or request.base_is_model:
        return {}
    model = base_model(before, run.labeller.renderer.tokenizer, request.dtype)
    return asking.ask(model, {RETENTION: questions[RETENTION]})


def measure_further(
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
        measured = safety.measure_safety(answered)
        prompts = request.safety_data or "packaged"
        content["safety"] = {"prompts": prompts, **measured.content}
        values |= measured.values
    if before is not None:
        measured = retention.measure_retention(base[RETENTION], tuned[RETENTION])
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
