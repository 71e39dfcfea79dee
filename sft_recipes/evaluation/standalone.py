"""Evaluate a model or run by itself: load, generate, score, compare with a base, write, print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepare import EVALUATION_COLUMNS, load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.evaluator import (
    Evaluation,
    compare,
    evaluate,
    print_table,
    read_evaluation,
    write_evaluation,
)
from sft_recipes.messages import Example
from sft_recipes.models import load_for_inference
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, Recipe, TemplateSettings
from sft_recipes.recipe_keys import load_recipe


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


@dataclass(frozen=True)
class StandaloneResult:
    """An evaluation, the base's where one was asked for, and the folder both were written to."""

    evaluation: Evaluation
    base: Evaluation | None
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """Plain data for `evaluate --json`."""
        content = {"folder": str(self.folder), "n": len(self.evaluation.rows), **self.evaluation.as_json()}
        if self.base is not None:
            content["base"] = self.base.as_json()
            content["differences"] = {name: d.as_json() for name, d in compare(self.base, self.evaluation).items()}
        return content

    def print(self, examples: int) -> None:
        """The table, some answers, and where the rest is."""
        from rich.console import Console

        print_table(Console(), self.evaluation, self.base, examples=examples)
        print(f"\nreport: {self.folder / 'report.html'}\nanswers: {self.folder / 'samples.jsonl'}")


def evaluate_standalone(request: EvaluationRequest, progress: bool = True) -> StandaloneResult:
    """Evaluate and write `metrics.json`, `samples.jsonl`, `report.html`; the base is rendered with the same template.

    Raises InputError if there is nothing to answer or the base answered other rows.
    """
    loaded = load_for_inference(request.model_or_run)
    run = Path(request.model_or_run)
    recipe = load_recipe(run / run_folder.RECIPE) if run_folder.is_run_folder(run) else None
    template = recipe.template if recipe else TemplateSettings()
    # A finished run carries its template in its tokenizer; only the arguments it was rendered with are in the recipe.
    own = TemplateSettings(request.chat_template, template.chat_template_kwargs)
    renderer = attach_chat_template(loaded.tokenizer, own)
    examples = _examples(request, recipe, renderer)
    folder = request.output or _folder(request, run, recipe)

    def answer(model: Any) -> Evaluation:
        return evaluate(
            model,
            renderer,
            examples,
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            template_segments=renderer.template_segments,
            progress=progress,
        )

    evaluation = answer(loaded.model)
    info = _info(request, renderer, loaded.kind)
    base: Evaluation | None = None
    if request.base and (Path(request.base) / "samples.jsonl").is_file():
        base = read_evaluation(Path(request.base))
    elif request.base:
        base = answer(load_for_inference(request.base).model)
        write_evaluation(base, folder / "base", info={**info, "model": request.base})
    write_evaluation(evaluation, folder, info=info, base=base)
    return StandaloneResult(evaluation, base, folder)


def _examples(request: EvaluationRequest, recipe: Recipe | None, renderer: ChatRenderer) -> Sequence[Example]:
    """The conversations to answer: from `--data`, else the run's own eval rows."""
    labels = recipe.labels if recipe else LabelSettings()
    if request.data is not None:
        is_folder = Path(request.data).is_dir()
        source = DatasetSource(path=request.data, split=request.split if is_folder else "train", format=request.format)
        found = _read(source, DataSettings(datasets=(source,)))
    elif recipe is None:
        raise InputError(Problem("command line", "--data", "is needed to evaluate a model", "add --data FILE"))
    elif recipe.evaluation.data is not None:
        found = _read(recipe.evaluation.data, recipe.data)
    elif recipe.data.test_split:
        found = [
            example
            for source in recipe.data.datasets
            for example in _read(replace(source, split=recipe.data.test_split), recipe.data)
        ]
    else:
        found = list(load_prepared(recipe, recipe.output_dir / run_folder.PREPARED).eval_examples)
    labeller = Labeller(renderer, labels)
    chosen = [labeller.with_system_prompt(example) for example in islice(found, request.max_rows)]
    if not chosen:
        fix = "add --data FILE, or set eval_split in the recipe"
        raise InputError(Problem(request.model_or_run, "", "there are no eval rows", fix))
    return chosen


def _read(source: DatasetSource, settings: DataSettings) -> list[Example]:
    return list(iter_examples(source, settings, columns=EVALUATION_COLUMNS, rejects=RejectLog(settings)))


def _folder(request: EvaluationRequest, run: Path, recipe: Recipe | None) -> Path:
    name = Path(request.data).stem if request.data else "eval"
    if request.data and Path(request.data).is_dir():
        name = request.split
    return run / run_folder.EVALUATIONS / name if recipe else Path(run_folder.EVALUATIONS) / run.name / name


def _info(request: EvaluationRequest, renderer: ChatRenderer, kind: str) -> dict[str, Any]:
    import hashlib

    template = hashlib.sha256(renderer.template_text.encode()).hexdigest()
    return {
        "model": request.model_or_run,
        "kind": kind,
        "data": request.data or "the run's own eval rows",
        "base": request.base or "not compared",
        "template_sha256": template,
        "chat_template_kwargs": renderer.chat_template_kwargs,
        "decoding": "greedy",
        "max_new_tokens": request.max_new_tokens,
        "batch_size": request.batch_size,
        "stop_ids": list(renderer.stop_ids),
    }
