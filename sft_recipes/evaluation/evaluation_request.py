"""What the `evaluate` command was asked for: options, the rows to answer, where to write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.mixture import data_set_names
from sft_recipes.data.prepared import load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.open_run import OpenedRun
from sft_recipes.evaluation.samples import SAMPLES
from sft_recipes.messages import Example
from sft_recipes.recipe import DataSettings, Recipe
from sft_recipes.recipe_keys import make_data_recipe


@dataclass(frozen=True)
class EvaluationRequest:
    """What the `evaluate` command was asked for; the names are its options.

    `data_options`: recipe keys that say how `data` is read.
    """

    model_or_run: str
    data: str | None = None
    split: str = "test"
    base: str | None = None
    chat_template: str | None = None
    max_rows: int | None = None
    max_new_tokens: int = 256
    batch_size: int | None = None
    dtype: str | None = None
    output: Path | None = None
    gate: str | None = None
    allow_trained_rows: bool = False
    format_overfitting: bool = False
    compare: Sequence[str] | None = None
    shots: str = "0"
    safety: bool = False
    safety_data: str | None = None
    retention: bool = False
    retention_data: str | None = None
    suspects: bool = False
    data_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_is_model(self) -> bool:
        """Whether there is a base that can be asked, not only its answers of before."""
        return self.base is not None and not (Path(self.base) / SAMPLES).is_file()

    @property
    def data_name(self) -> str:
        """What the evaluation is called after."""
        if not self.data:
            return "eval"
        return self.split if Path(self.data).is_dir() else Path(self.data).stem

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        if self.output is not None:
            return self.output
        return run_folder.evaluations_of(Path(self.model_or_run)) / self.data_name


def conversations_to_answer(request: EvaluationRequest, run: OpenedRun) -> list[Example]:
    """The conversations to answer, with the system prompt that they were trained with.

    They are those of `--data`, else the run's own eval rows. Raises InputError if there are none.
    """
    rows = _rows_of_data(request) if request.data else _rows_of_run(request, run.recipe)
    chosen = islice(rows, request.max_rows)
    examples = [run.labeller.for_template(example) for example in chosen]
    if not examples:
        fix = "add --data FILE, or set eval_split in the recipe"
        raise InputError(Problem(request.model_or_run, "", "there are no eval rows", fix))
    return examples


def _rows_of_data(request: EvaluationRequest) -> Sequence[Example]:
    data = str(request.data)
    split = request.split if Path(data).is_dir() else "train"
    options = {"dataset_train_split": split, **request.data_options}
    settings = make_data_recipe(data, options).data
    return read_held_out(settings.datasets, settings)


def _rows_of_run(request: EvaluationRequest, recipe: Recipe | None) -> Sequence[Example]:
    if request.data_options:
        key = next(iter(request.data_options))
        what = "says how --data is read"
        raise InputError(Problem("command line", f"--{key}", what, "add --data FILE"))
    if recipe is None:
        what = "is needed to evaluate a model"
        raise InputError(Problem("command line", "--data", what, "add --data FILE"))
    if recipe.evaluation.data is not None:
        return read_held_out([recipe.evaluation.data], recipe.data)
    if recipe.data.test_split:
        return _rows_of_test_split(recipe.data, recipe.data.test_split)
    return load_prepared(recipe, recipe.output_dir / run_folder.PREPARED).eval_examples


def _rows_of_test_split(data: DataSettings, split: str) -> list[Example]:
    """The rows of the test split, each with the name of its data set."""
    examples: list[Example] = []
    for source, name in zip(data.datasets, data_set_names(data.datasets), strict=True):
        if source.held_out:
            for example in read_held_out([replace(source, split=split)], data):
                examples.append(replace(example, data_set=name))
    return examples
