"""Evaluate a model or run by itself: load, generate, score, compare with a base, write, print."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepare import EVALUATION_COLUMNS, load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import evaluator
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.messages import Example
from sft_recipes.models import load_for_inference, load_tokenizer
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
            content["differences"] = {
                name: d.as_json() for name, d in evaluator.compare(self.base, self.evaluation).items()
            }
        return content

    def print(self, examples: int) -> None:
        """The table, some answers, and where the rest is."""
        # A log or a pipe has no width of its own; the table needs more than the usual 80 columns.
        console = Console() if sys.stdout.isatty() else Console(width=110)
        evaluator.print_table(console, self.evaluation, self.base, examples=examples)
        print(f"\nreport: {self.folder / 'report.html'}\nanswers: {self.folder / 'samples.jsonl'}")


def evaluate_standalone(request: EvaluationRequest, progress: bool = True) -> StandaloneResult:
    """Evaluate and write `metrics.json`, `samples.jsonl` and `report.html`, from the main process only.

    The base is asked with the same template and tokenizer. Raises InputError if there is nothing to answer, or if the
    base answered other rows or has another vocabulary.
    """
    run = Path(request.model_or_run)
    recipe = load_recipe(run / run_folder.RECIPE) if run_folder.is_run_folder(run) else None
    loaded = load_for_inference(request.model_or_run)
    # A finished run carries its template in its tokenizer; only the arguments it was rendered with are in the recipe.
    arguments = (recipe.template if recipe else TemplateSettings()).chat_template_kwargs
    renderer = attach_chat_template(loaded.tokenizer, TemplateSettings(request.chat_template, arguments))
    ask_base = request.base is not None and not (Path(request.base) / "samples.jsonl").is_file()
    if request.base and ask_base:
        _check_same_vocabulary(request.base, renderer.tokenizer)
    answer = partial(
        evaluator.evaluate,
        renderer=renderer,
        examples=_examples(request, recipe, renderer),
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        template_segments=renderer.template_segments,
        progress=progress,
    )
    folder, info = request.output or _folder(request, run, recipe), _info(request, renderer, loaded.kind)
    evaluation, base = answer(loaded.model), None
    del loaded  # two models may not fit into memory beside each other
    gc.collect()
    if request.base and ask_base:
        base = answer(_base_model(request.base, renderer.tokenizer))
    elif request.base:
        base = evaluator.read_evaluation(Path(request.base))
    if PartialState().is_main_process:
        if base and ask_base:
            evaluator.write_evaluation(base, folder / "base", info={**info, "model": request.base})
        evaluator.write_evaluation(evaluation, folder, info=info, base=base)
    return StandaloneResult(evaluation, base, folder)


def _check_same_vocabulary(base: str, tokenizer: Any) -> None:
    """The base is asked with the tuned model's ids: they have to mean the same to it."""
    different = {*tokenizer.get_vocab().items()} ^ {*load_tokenizer(base).get_vocab().items()}
    if different:
        what = f"its tokenizer has another vocabulary than the tuned model's ({len(different)} entries differ)"
        fix = "evaluate it by itself on the same data, then give that evaluation's folder as --base"
        raise InputError(Problem(base, "--base", what, fix))


def _base_model(base: str, tokenizer: Any) -> Any:
    model: Any = load_for_inference(base).model
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        what = f"its embedding has {rows} rows, the tuned model's tokenizer {len(tokenizer)} ids"
        raise InputError(Problem(base, "--base", what, "name the model that was tuned"))
    return model


def _examples(request: EvaluationRequest, recipe: Recipe | None, renderer: ChatRenderer) -> Sequence[Example]:
    """The conversations to answer: from `--data`, else the run's own eval rows."""
    labels = recipe.labels if recipe else LabelSettings()
    if request.data is not None:
        split = request.split if Path(request.data).is_dir() else "train"
        source = DatasetSource(path=request.data, split=split, format=request.format)
        found = _read([source], DataSettings(datasets=(source,)))
    elif recipe is None:
        raise InputError(Problem("command line", "--data", "is needed to evaluate a model", "add --data FILE"))
    elif recipe.evaluation.data is not None:
        found = _read([recipe.evaluation.data], recipe.data)
    elif recipe.data.test_split:
        found = _read([replace(source, split=recipe.data.test_split) for source in recipe.data.datasets], recipe.data)
    else:
        found = load_prepared(recipe, recipe.output_dir / run_folder.PREPARED).eval_examples
    labeller = Labeller(renderer, labels)
    chosen = [labeller.for_template(example) for example in islice(found, request.max_rows)]
    if not chosen:
        fix = "add --data FILE, or set eval_split in the recipe"
        raise InputError(Problem(request.model_or_run, "", "there are no eval rows", fix))
    return chosen


def _read(sources: Sequence[DatasetSource], settings: DataSettings) -> Sequence[Example]:
    log = partial(RejectLog, settings)
    return [row for one in sources for row in iter_examples(one, settings, columns=EVALUATION_COLUMNS, rejects=log())]


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
