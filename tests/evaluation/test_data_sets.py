"""A mixture is evaluated by data set: exact match and loss of each, with n and interval, wherever figures stand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sft_recipes import models
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import load_prepared
from sft_recipes.evaluation import data_set_losses
from sft_recipes.evaluation.evaluate_command import EvaluationResult, run_evaluation
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.evaluation.evaluator import evaluation_from_rows
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import build_model, build_tokenizer, instruction_rows
from tests.evaluation.test_suspects import loss_of


@pytest.fixture
def make_run(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    """A run folder of the data sets `words` (30 rows) and `long` (20), without the training."""

    def make(**keys: Any) -> Path:
        rows = instruction_rows(50)
        write_rows(rows[:30], "words.jsonl")
        write_rows([{**row, "output": f"{row['output']} more"} for row in rows[30:]], "long.jsonl")
        folder = tmp_path / "run"
        tokenizer = build_tokenizer()
        build_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sets = ["../words.jsonl", "../long.jsonl"]
        fixed = {"model_name_or_path": "./", "output_dir": "./", "datasets": sets, "eval_split": 20}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**fixed, **keys}))
        recipe = load_recipe(folder / "recipe.yaml")
        prepare(recipe, open_labeller(recipe, str(folder)), folder / "prepared", progress=False)
        return folder

    return make


def evaluated(folder: Path, **options: Any) -> EvaluationResult:
    request = EvaluationRequest(str(folder), max_new_tokens=2, **options)
    return run_evaluation(request, progress=False)


def test_loss_and_exact_match_of_each_set(make_run, capsys) -> None:
    """The loss is that of the set's held-out rows one by one, n counts its prompts; text, JSON and report have both."""
    folder = make_run()
    data = load_prepared(load_recipe(folder / "recipe.yaml"), folder / "prepared")
    model = models.load_for_inference(str(folder)).model
    result = evaluated(folder)
    content = json.loads((result.folder / "metrics.json").read_text())
    held_out = data.held_out
    assert held_out is not None and data.eval is not None
    for number, name in enumerate(("words", "long")):
        total, tokens = 0.0, 0
        places = np.flatnonzero(held_out.numbers == number)
        for row in data.eval.select(places):
            count = sum(label != -100 for label in row["labels"][1:])
            total += loss_of(model, list(row["input_ids"]), list(row["labels"])) * count
            tokens += count
        loss = content["data_set_losses"][name]
        assert loss["value"] == pytest.approx(total / tokens, rel=1e-5)
        assert loss["n"] == content["data_sets"][name]["n"] == len(places) > 2
        assert (
            loss["ci_low"] < loss["value"] < loss["ci_high"] and loss["higher_is_better"] is False
        )
    result.print(0)
    brief = capsys.readouterr().out
    result.print(0, everything=True)
    everything = capsys.readouterr().out
    assert "By data set: long " in brief and "; words " in brief
    assert "exact match by data set" in everything
    assert "loss of held-out rows by data set" in everything
    report = (result.folder / "report.html").read_text()
    assert "Data sets" in report and ">words</td>" in report


def test_other_rows_have_no_data_sets(make_run, tmp_path, capsys) -> None:
    """Rows of --data and of a recipe with one data set are of no mixture: nothing is said by data set."""
    folder = make_run()
    other = evaluated(folder, data=str(tmp_path / "words.jsonl"), max_rows=3)
    single = evaluated(make_run(datasets=["../words.jsonl"], eval_split=5))
    for result in (other, single):
        assert result.content["data_sets"] == result.content["data_set_losses"] == {}
        result.print(0, everything=True)
    assert "data set" not in capsys.readouterr().out


def test_a_test_split_has_its_data_sets(make_run, write_rows, tmp_path) -> None:
    """Rows of `dataset_test_split` are by data set, too."""
    for name in ("a", "b"):
        for split, first in (("train", 0), ("test", 40)):
            rows = instruction_rows(50)[first : first + 4]
            write_rows([{**row, "input": name} for row in rows], f"{name}/{split}.jsonl")
    sets = ["../a", "../b"]
    folder = make_run(datasets=sets, eval_split=None, dataset_test_split="test")
    content = evaluated(folder).content
    assert {name: one["n"] for name, one in content["data_sets"].items()} == {"a": 4, "b": 4}
    assert {name: one["n"] for name, one in content["data_set_losses"].items()} == {"a": 4, "b": 4}


def test_of_many_rows_the_first_are_taken(make_run, monkeypatch) -> None:
    """No more rows than that pass through the model, and n says so."""
    monkeypatch.setattr(data_set_losses, "KEPT_EVAL_EXAMPLES", 8)
    losses = evaluated(make_run()).content["data_set_losses"]
    assert sum(loss["n"] for loss in losses.values()) == 8


def test_prompts_count_once_in_each_set() -> None:
    """Exact match of a set is over its prompts: two answers to one prompt are one of n."""
    fixed = {"task_type": None, "stop_reason": "eos", "flags": []}

    def row(name: str | None, prompt: str, exact: bool) -> dict[str, Any]:
        return {**fixed, "data_set": name, "prompt": prompt, "exact_match": exact}

    rows = [row("a", "x", True), row("a", "x", False), row("a", "y", True), row("b", "z", False)]
    sets = evaluation_from_rows(rows).data_sets
    assert (sets["a"].value, sets["a"].n) == (0.75, 2)
    assert (sets["b"].value, sets["b"].n) == (0.0, 1)
    assert not evaluation_from_rows(rows[:3]).data_sets, "one set is no mixture"
    assert not evaluation_from_rows([row(None, "x", True)]).data_sets
