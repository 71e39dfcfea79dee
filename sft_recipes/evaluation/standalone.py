"""Evaluate a model or run by itself: load, generate, score, compare with a base, write, print."""

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.prepare import load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import evaluator
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.format_overfitting import FORMAT_METRICS, Answers, FormatOverfitting, ask_formats
from sft_recipes.evaluation.gate import check_base, judge, read_gate
from sft_recipes.messages import Example
from sft_recipes.models import check_vocabulary, load_for_inference, load_tokenizer
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, Recipe, TemplateSettings
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.report.page import macros


@dataclass(frozen=True)
class EvaluationRequest:
    """What the `evaluate` command was asked for; the names are its options."""

    model_or_run: str
    data: str | None = None
    split: str = "test"
    format: str | None = None
    base: str | None = None
    chat_template: str | None = None
    max_rows: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 32
    output: Path | None = None
    gate: str | None = None
    format_overfitting: bool = False


@dataclass(frozen=True)
class StandaloneResult:
    """An evaluation, the base's where one was asked for, and the folder both were written to.

    `extra` holds what else was asked for, as plain data: `gate`, `format_overfitting`.
    """

    evaluation: Evaluation
    base: Evaluation | None
    folder: Path
    extra: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `evaluate --json`."""
        base = {"base": self.base.as_json()} if self.base else {}
        return {"folder": str(self.folder), **self.evaluation.as_json(self.base), **base, **self.extra}

    def print(self, examples: int) -> None:
        """The table, some answers, and where the rest is."""
        print(evaluator.as_text(self.evaluation, self.base, examples=examples))
        for part, content in self.extra.items():
            print(getattr(macros("verdicts.txt"), part)(content))
        print(f"\nreport: {self.folder / 'report.html'}\nanswers: {self.folder / 'samples.jsonl'}")


def evaluate_standalone(request: EvaluationRequest, progress: bool = True) -> StandaloneResult:
    """Evaluate and write `metrics.json`, `samples.jsonl` and `report.html`, from the main process only.

    The base is asked with the same template and tokenizer. Raises InputError if there is nothing to answer, or if the
    base answered other rows or has another vocabulary.
    """
    run = Path(request.model_or_run)
    recipe = load_recipe(run / run_folder.RECIPE) if run_folder.is_run_folder(run) else None
    ask_base = request.base is not None and not (Path(request.base) / "samples.jsonl").is_file()
    # `--gate recipe` means the bounds that stood in the recipe when the run was trained.
    gate = run / run_folder.RECIPE if request.gate == "recipe" else request.gate
    bounds = read_gate(Path(gate)) if gate else []
    check_base(bounds, model=ask_base, answers=request.base is not None)
    by_format = request.format_overfitting or any(bound.metric in FORMAT_METRICS for bound in bounds)
    loaded = load_for_inference(request.model_or_run)
    # A finished run carries its template in its tokenizer; only the arguments it was rendered with are in the recipe.
    arguments = (recipe.template if recipe else TemplateSettings()).chat_template_kwargs
    renderer = attach_chat_template(loaded.tokenizer, TemplateSettings(request.chat_template, arguments))
    native = _native_template(request.base, renderer.tokenizer) if request.base and ask_base else None
    examples = _examples(request, recipe, renderer)
    answer = partial(
        evaluator.evaluate,
        renderer=renderer,
        examples=examples,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        template_segments=renderer.template_segments,
        progress=progress,
    )

    def ask(model: Any) -> tuple[Evaluation, Answers]:
        asked = answer(model)
        others = ask_formats(partial(answer, model), asked, renderer, examples, native) if by_format else {}
        return asked, others

    folder, info = request.output or _folder(request, run, recipe), _info(request, renderer, loaded.kind)
    base: Evaluation | None = None
    base_formats: Answers = {}
    evaluation, formats = ask(loaded.model)
    del loaded  # two models may not fit into memory beside each other
    gc.collect()
    if request.base and ask_base:
        base, base_formats = ask(_base_model(request.base, renderer.tokenizer))
    elif request.base:
        base = evaluator.read_evaluation(Path(request.base))
    overfitting = FormatOverfitting(formats, base_formats or None) if by_format else None
    extra = {"format_overfitting": overfitting.as_json()} if overfitting else {}
    if bounds:
        extra["gate"] = judge(bounds, evaluation, base, overfitting.values() if overfitting else {})
    if PartialState().is_main_process:
        evaluator.write_evaluation(evaluation, folder, info=info, base=base, extra=extra)
        others = {f"formats/{name}": one for name, one in formats.items()}
        others |= {f"base/formats/{name}": one for name, one in base_formats.items()}
        others |= {"base": base} if base and ask_base else {}
        for name, one in others.items():
            model = request.base if name.startswith("base") else request.model_or_run
            evaluator.write_evaluation(one, folder / name, info={**info, "model": model, "asked_as": name})
    return StandaloneResult(evaluation, base, folder, extra)


def _native_template(base: str, tokenizer: Any) -> str | None:
    """The base's own chat template. The base is asked with the tuned model's ids: they have to mean the same to it."""
    own = load_tokenizer(base)
    different = {*tokenizer.get_vocab().items()} ^ {*own.get_vocab().items()}
    if different:
        what = f"its tokenizer has another vocabulary than the tuned model's ({len(different)} entries differ)"
        fix = "evaluate it by itself on the same data, then give that evaluation's folder as --base"
        raise InputError(Problem(base, "--base", what, fix))
    return own.chat_template if isinstance(own.chat_template, str) else None


def _base_model(base: str, tokenizer: Any) -> Any:
    model = load_for_inference(base).model
    check_vocabulary(model, tokenizer, base, "--base")
    return model


def _examples(request: EvaluationRequest, recipe: Recipe | None, renderer: ChatRenderer) -> Sequence[Example]:
    """The conversations to answer: from `--data`, else the run's own eval rows."""
    found: Sequence[Example]
    if request.data is not None:
        split = request.split if Path(request.data).is_dir() else "train"
        source = DatasetSource(path=request.data, split=split, format=request.format)
        found = read_held_out([source], DataSettings(datasets=(source,)))
    elif recipe is None:
        raise InputError(Problem("command line", "--data", "is needed to evaluate a model", "add --data FILE"))
    elif recipe.evaluation.data is not None:
        found = read_held_out([recipe.evaluation.data], recipe.data)
    elif recipe.data.test_split:
        found = read_held_out(
            [replace(source, split=recipe.data.test_split) for source in recipe.data.datasets], recipe.data
        )
    else:
        found = load_prepared(recipe, recipe.output_dir / run_folder.PREPARED).eval_examples
    labeller = Labeller(renderer, recipe.labels if recipe else LabelSettings())
    chosen = [labeller.for_template(example) for example in islice(found, request.max_rows)]
    if not chosen:
        fix = "add --data FILE, or set eval_split in the recipe"
        raise InputError(Problem(request.model_or_run, "", "there are no eval rows", fix))
    return chosen


def _folder(request: EvaluationRequest, run: Path, recipe: Recipe | None) -> Path:
    name = "eval"
    if request.data:
        name = request.split if Path(request.data).is_dir() else Path(request.data).stem
    return run / run_folder.EVALUATIONS / name if recipe else Path(run_folder.EVALUATIONS) / run.name / name


def _info(request: EvaluationRequest, renderer: ChatRenderer, kind: str) -> dict[str, Any]:
    return {
        "model": request.model_or_run,
        "kind": kind,
        "data": request.data or "the run's own eval rows",
        "base": request.base or "not compared",
        "template_sha256": hashlib.sha256(renderer.template_text.encode()).hexdigest(),
        "chat_template_kwargs": renderer.chat_template_kwargs,
        "decoding": "greedy",
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size,
        "stop_ids": list(renderer.stop_ids),
    }
