"""Evaluate a model or run by itself: load, generate, score, compare with a base, write, print."""

import gc
import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.prepared import MANIFEST, load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import evaluator, format_overfitting, safety
from sft_recipes.evaluation.comparison import (
    System,
    compare_all,
    earlier,
    facts_of,
    task_table,
    training_curves,
)
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.format_overfitting import (
    TEMPLATE,
    Answers,
    Questions,
    Values,
    format_questions,
)
from sft_recipes.evaluation.gate import Bound, check_possible, judge, read_gate
from sft_recipes.evaluation.generation import check_prompts, default_batch_size
from sft_recipes.evaluation.training_rows import TrainingRows, memorised, read_training_rows
from sft_recipes.messages import Example
from sft_recipes.models import InferenceModel, check_vocabulary, load_for_inference
from sft_recipes.recipe import LabelSettings, Recipe, TemplateSettings
from sft_recipes.recipe_keys import load_recipe, make_data_recipe
from sft_recipes.report.page import macros


@dataclass(frozen=True)
class EvaluationRequest:
    """What the `evaluate` command was asked for; the names are its options. `data_options`: recipe keys for `data`."""

    model_or_run: str
    data: str | None = None
    split: str = "test"
    base: str | None = None
    chat_template: str | None = None
    max_rows: int | None = None
    max_new_tokens: int = 256
    batch_size: int | None = None
    output: Path | None = None
    gate: str | None = None
    format_overfitting: bool = False
    compare: Sequence[str] | None = None
    shots: int = 0
    safety: bool = False
    safety_data: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_is_model(self) -> bool:
        """Whether there is a base that can be asked, not only its answers of an earlier evaluation."""
        return self.base is not None and not (Path(self.base) / "samples.jsonl").is_file()


@dataclass(frozen=True)
class StandaloneResult:
    """An evaluation, the base's where one was asked for, and the folder both were written to.

    `extra` holds what else is known, as plain data: `comparisons`, `task_differences`, `training_curves`, and where
    asked for `format_overfitting`, `safety`, `gate`.
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
        base = {"base": self.base.as_json()} if self.base else {}
        return {
            "folder": str(self.folder),
            **self.evaluation.as_json(self.base),
            **base,
            **self.extra,
        }

    def print(self, examples: int) -> None:
        """The table, some answers, and where the rest is."""
        print(evaluator.as_text(self.evaluation, self.base, examples=examples))
        for part, content in self.extra.items():
            print(getattr(macros("verdicts.txt"), part)(content), end="")
        print(macros("verdicts.txt").next_steps(self.request, self.folder))


def evaluate_standalone(request: EvaluationRequest, progress: bool = True) -> StandaloneResult:
    """Evaluate and write `metrics.json`, `samples.jsonl` and `report.html`, from the main process only.

    The base is asked with the same template and tokenizer. Raises InputError if there is nothing to answer, or if the
    base or what is compared answered other rows or has another vocabulary.
    """
    # First of all: processes on CPU find each other only if told so, and each GPU has to be chosen before models load.
    PartialState(cpu=not torch.cuda.is_available())
    run, bounds = Path(request.model_or_run), _bounds(request)
    recipe, loaded, labeller = open_run(request.model_or_run, request.chat_template)
    renderer, examples = labeller.renderer, _examples(request, recipe, labeller)
    questions = _questions(request, labeller, examples, {bound.metric for bound in bounds})
    folder, info = request.output or _folder(request, run, recipe), _info(request, renderer, loaded)
    own_base = [] if request.base is None or request.base_is_model else [request.base]
    others = [
        earlier(path, folder.name, examples) for path in (*own_base, *(request.compare or ()))
    ]
    training = _training_rows(request, recipe, labeller, examples, info)
    shots: Questions = (
        {"shots": (renderer, [*map(training.shown_to, examples)])}
        if training and request.shots
        else {}
    )
    _check_lengths(loaded.model, questions | shots, request.max_new_tokens)

    settings: Any = {"max_new_tokens": request.max_new_tokens, "batch_size": request.batch_size}
    settings["template_segments"] = renderer.template_segments

    def ask(model: Any, questions: Questions) -> dict[str, Evaluation]:
        found: dict[str, Evaluation] = {}
        for name, question in questions.items():
            same = (found[other] for other in found if questions[other] == question)
            found[name] = next(same, None) or evaluator.evaluate(
                model, *question, progress=progress, **settings
            )
        return found

    tuned, base = ask(loaded.model, questions), dict[str, Evaluation]()
    del loaded  # two models may not fit into memory beside each other
    gc.collect()
    if request.base_is_model:
        base = ask(base_model(str(request.base), renderer.tokenizer), questions | shots)
        if shots:
            # Rows that were asked with more around them are answers to the same rows all the same.
            pairs = zip(base["shots"].rows, tuned[""].rows, strict=True)
            rows = [{**row, "messages": own["messages"]} for row, own in pairs]
            base["shots"] = evaluator.evaluation_from_rows(rows)
            others.insert(0, System(f"base, {request.shots} shots", base["shots"]))
        others.insert(0, System("base", base[""]))
    elif own_base:
        base = {"": others[0].evaluation}
    found, values = _findings(request, recipe, tuned, base, renderer.tokenizer)
    extra = {
        "comparisons": compare_all(System("tuned", tuned[""], facts_of(run, info)), others),
        "task_differences": task_table(
            tuned[""], base.get(""), training.task_types if training else None
        ),
        "training_curves": training_curves(run / run_folder.LOG),
        **found,
    }
    if bounds:
        extra["gate"] = judge(bounds, tuned[""], base.get(""), values)
    result = StandaloneResult(request, tuned[""], base.get(""), folder, extra)
    if result.is_main:
        _write(result, tuned, base, info)
    return result


def _check_lengths(model: Any, questions: Questions, max_new_tokens: int) -> None:
    """Raise InputError for prompts that are too long now, not when half of them are answered."""
    for renderer, asked in questions.values():
        chats = [example for example in asked if len(example.messages) > 1]
        prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in chats]
        check_prompts(model, prompts, max_new_tokens, [example.where for example in chats])


def _write(
    result: StandaloneResult, tuned: Answers, base: Answers, info: Mapping[str, Any]
) -> None:
    """The evaluation itself, and below it every other one that was made for it."""
    request, folder = result.request, result.folder
    evaluator.write_evaluation(
        result.evaluation, folder, info=info, base=result.base, extra=result.extra
    )
    made = {name: (request.model_or_run, one) for name, one in tuned.items() if name}
    made |= {
        f"base/{name}": (str(request.base), one)
        for name, one in base.items()
        if request.base_is_model
    }
    for name, (model, one) in made.items():
        evaluator.write_evaluation(
            one, folder / name, info={**info, "model": model, "asked_as": name}
        )


def open_run(
    name: str, chat_template: str | None
) -> tuple[Recipe | None, InferenceModel, Labeller]:
    """The recipe of a run folder, the model of that or of any other name, and how its conversations are rendered."""
    is_run = run_folder.is_run_folder(Path(name))
    recipe = load_recipe(Path(name) / run_folder.RECIPE) if is_run else None
    loaded = load_for_inference(name)
    # A finished run carries its template in its tokenizer; only the arguments it was rendered with are in the recipe.
    arguments = (recipe.template if recipe else TemplateSettings()).chat_template_kwargs
    renderer = attach_chat_template(loaded.tokenizer, TemplateSettings(chat_template, arguments))
    return recipe, loaded, Labeller(renderer, recipe.labels if recipe else LabelSettings())


def _bounds(request: EvaluationRequest) -> list[Bound]:
    # `--gate recipe` means the bounds that stood in the recipe when the run was trained.
    run = Path(request.model_or_run)
    gate = run / run_folder.RECIPE if request.gate == "recipe" else request.gate
    bounds, trained = (
        read_gate(Path(gate)) if gate else [],
        (run / run_folder.PREPARED / MANIFEST).is_file(),
    )
    check_possible(
        bounds, model=request.base_is_model, answers=request.base is not None, trained=trained
    )
    return bounds


def _questions(
    request: EvaluationRequest, labeller: Labeller, examples: Sequence[Example], judged: Set[str]
) -> Questions:
    """What every model is asked, by the folder that the answers go to: "" the data, then other formats and safety."""
    renderer = labeller.renderer
    native = (
        _native_template(str(request.base), renderer.tokenizer) if request.base_is_model else None
    )
    questions: Questions = {"": (renderer, examples)}
    if request.format_overfitting or judged & format_overfitting.FORMAT_METRICS.keys():
        formats = format_questions(renderer, examples, native)
        questions |= {f"formats/{name}": one for name, one in formats.items()}
    if request.safety or request.safety_data or judged & safety.SAFETY_METRICS.keys():
        prompts = safety.read_prompts(request.safety_data or safety.PROMPTS)
        asked = [labeller.for_template(example) for example in prompts]
        questions |= {
            f"safety/{name}": one for name, one in format_questions(renderer, asked, native).items()
        }
        if asked != prompts:
            questions["safety/no_system_prompt"] = (renderer, prompts)
    return questions


def _training_rows(
    request: EvaluationRequest,
    recipe: Recipe | None,
    labeller: Labeller,
    asked: Sequence[Example],
    info: dict[str, Any],
) -> TrainingRows | None:
    """The run's training rows if something asks for them; where they are gone, `info` says so."""
    if request.shots and (recipe is None or not request.base_is_model):
        what, fix = (
            "training rows are shown to a base: both are needed",
            "evaluate a run folder and add --base MODEL",
        )
        raise InputError(Problem("command line", "--shots", what, fix))
    if recipe is None or not (
        request.shots or any(example.columns.get("task_type") for example in asked)
    ):
        return None
    try:
        return read_training_rows(recipe, labeller, asked, request.shots)
    except InputError as error:
        if request.shots:
            raise
        info["training_rows"] = f"not known: {error}"
        return None


def _findings(
    request: EvaluationRequest, recipe: Recipe | None, tuned: Answers, base: Answers, tokenizer: Any
) -> tuple[dict[str, Any], Values]:
    """Format overfitting and safety, as far as asked for, and their values per prompt for the gate."""
    extra, values = dict[str, Any](), Values()

    def part(start: str) -> dict[str, Answers]:
        found = dict[str, Answers]()
        for model, answers in (("tuned", tuned), ("base", base)):
            if own := {
                name.removeprefix(start): one
                for name, one in answers.items()
                if name.startswith(start)
            }:
                found[model] = own
        return found

    if formats := part("formats/"):
        copied = Values()
        if recipe and (recipe.output_dir / run_folder.PREPARED / MANIFEST).is_file():
            texts = [row["response"] for row in formats["tuned"][TEMPLATE].rows]
            copied = memorised(
                recipe, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            )
        extra["format_overfitting"], values = format_overfitting.measure_formats(formats, copied)
    if answered := part("safety/"):
        content, of_safety = safety.measure_safety(answered)
        extra["safety"] = {"prompts": request.safety_data or "packaged", **content}
        values |= of_safety
    return extra, values


def _native_template(base: str, tokenizer: Any) -> str | None:
    """The base's own chat template. The base is asked with the tuned model's ids: they have to mean the same to it."""
    own = load_tokenizer(base)
    different = {*tokenizer.get_vocab().items()} ^ {*own.get_vocab().items()}
    if different:
        what = f"its tokenizer has another vocabulary than the tuned model's ({len(different)} entries differ)"
        fix = "evaluate it by itself on the same data, then give that evaluation's folder as --base"
        raise InputError(Problem(base, "--base", what, fix))
    return own.chat_template if isinstance(own.chat_template, str) else None


def base_model(base: str, tokenizer: Any) -> Any:
    """A base to be asked in the ids of `tokenizer`. Raises InputError if it has no embedding for some of them."""
    model = load_for_inference(base).model
    check_vocabulary(model, tokenizer, base, "--base")
    return model


def _examples(
    request: EvaluationRequest, recipe: Recipe | None, labeller: Labeller
) -> Sequence[Example]:
    """The conversations to answer: from `--data`, else the run's own eval rows."""
    found: Sequence[Example]
    if request.data is None and request.data_options:
        key = next(iter(request.data_options))
        raise InputError(
            Problem("command line", f"--{key}", "says how --data is read", "add --data FILE")
        )
    if request.data is not None:
        split = request.split if Path(request.data).is_dir() else "train"
        settings = make_data_recipe(
            request.data, {"dataset_train_split": split, **request.data_options}
        ).data
        found = read_held_out(settings.datasets, settings)
    elif recipe is None:
        raise InputError(
            Problem("command line", "--data", "is needed to evaluate a model", "add --data FILE")
        )
    elif recipe.evaluation.data is not None:
        found = read_held_out([recipe.evaluation.data], recipe.data)
    elif recipe.data.test_split:
        found = read_held_out(
            [replace(source, split=recipe.data.test_split) for source in recipe.data.datasets],
            recipe.data,
        )
    else:
        found = load_prepared(recipe, recipe.output_dir / run_folder.PREPARED).eval_examples
    chosen = [labeller.for_template(example) for example in islice(found, request.max_rows)]
    if not chosen:
        fix = "add --data FILE, or set eval_split in the recipe"
        raise InputError(Problem(request.model_or_run, "", "there are no eval rows", fix))
    return chosen


def _folder(request: EvaluationRequest, run: Path, recipe: Recipe | None) -> Path:
    name = "eval"
    if request.data:
        name = request.split if Path(request.data).is_dir() else Path(request.data).stem
    return (
        run / run_folder.EVALUATIONS / name
        if recipe
        else Path(run_folder.EVALUATIONS) / run.name / name
    )


def _info(
    request: EvaluationRequest, renderer: ChatRenderer, loaded: InferenceModel
) -> dict[str, Any]:
    return {
        "model": request.model_or_run,
        "kind": loaded.kind,
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.model.device),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "data": request.data or "the run's own eval rows",
        "base": request.base or "not compared",
        "template_sha256": hashlib.sha256(renderer.template_text.encode()).hexdigest(),
        "chat_template_kwargs": renderer.chat_template_kwargs,
        "decoding": "greedy",
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size or default_batch_size(),
        "stop_ids": list(renderer.stop_ids),
    }
