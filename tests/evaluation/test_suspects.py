"""Training rows by loss: known losses, the right places, every row once, wrong answers first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sft_recipes import models
from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import load_prepared
from sft_recipes.errors import InputError
from sft_recipes.evaluation import row_losses, suspects
from sft_recipes.evaluation.evaluate_command import run_evaluation
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.evaluation.open_run import open_run
from sft_recipes.evaluation.suspects import Suspects, find_suspects
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import build_model, build_tokenizer, instruction_rows


@pytest.fixture
def make_run(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    """A run folder as training leaves it, of 40 rows, without the training."""

    def make(**keys: Any) -> Path:
        folder = tmp_path / "run"
        tokenizer = build_tokenizer()
        build_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if "datasets" not in keys:
            write_rows(instruction_rows(40))
            keys["dataset_name"] = "../train.jsonl"
        values = {"model_name_or_path": "./", "output_dir": "./", **keys}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        recipe = load_recipe(folder / "recipe.yaml")
        prepare(recipe, open_labeller(recipe, str(folder)), folder / "prepared", progress=False)
        return folder

    return make


def found(folder: Path) -> Suspects:
    loaded = models.load_for_inference(str(folder))
    run = open_run(str(folder), loaded.tokenizer, None)
    assert run.recipe is not None
    return find_suspects(loaded.model, run, run.recipe, folder / "prepared", progress=False)


def loss_of(model: Any, ids: list[int], labels: list[int]) -> float:
    """The mean loss a trained token of one row, by the library's own shift."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return float(output.loss)


def test_losses_are_those_of_single_rows(make_run, monkeypatch) -> None:
    """Whatever batches rows share, each has the loss that it has alone; all are ranked."""
    monkeypatch.setattr(suspects, "LEAST", 1000)
    folder = make_run()
    recipe: Recipe = load_recipe(folder / "recipe.yaml")
    rows = load_prepared(recipe, folder / "prepared").train
    model = models.load_for_inference(str(folder)).model
    expected = {}
    for number, row in enumerate(rows):
        place = f"train.jsonl:{number + 1}"
        expected[place] = loss_of(model, list(row["input_ids"]), list(row["labels"]))
    for tokens in (1, 200, 4096):
        monkeypatch.setattr(row_losses, "TOKENS_A_BATCH", tokens)
        ranked = found(folder)
        losses = {Path(row.where).name: row.loss for row in ranked.listed}
        assert losses == pytest.approx(expected, abs=1e-4)
        assert [row.loss for row in ranked.listed] == sorted(losses.values(), reverse=True)
    assert ranked.median == pytest.approx(sorted(expected.values())[19], abs=0.02)


def test_a_row_shows_what_was_trained(make_run) -> None:
    """Prompt and answer are the row's own text; tokens are those with a label."""
    folder = make_run()
    written = instruction_rows(40)
    recipe = load_recipe(folder / "recipe.yaml")
    prepared = load_prepared(recipe, folder / "prepared").train
    for row in found(folder).listed:
        index = int(row.where.rpartition(":")[2]) - 1
        assert written[index]["instruction"] in row.prompt
        assert row.answer == written[index]["output"] + "<|endoftext|>"
        labels = prepared[index]["labels"]
        assert row.trained_tokens == len(labels) - list(labels).count(IGNORE_INDEX)


def test_only_trained_rows_are_listed(make_run, monkeypatch) -> None:
    """Rows that were held out or left out by `max_rows` were not trained."""
    monkeypatch.setattr(suspects, "LEAST", 1000)
    folder = make_run(eval_split=0.25, max_rows=20)
    assert found(folder).rows == len(found(folder).listed) == 20


def test_rows_of_several_files_are_told_apart(make_run, write_rows, monkeypatch) -> None:
    """Each file counts its rows from 0; the labels say which of them is meant."""
    monkeypatch.setattr(suspects, "LEAST", 1000)
    rows = instruction_rows(12)
    write_rows(rows[:6], "data/train-0.jsonl")
    write_rows(rows[6:], "data/train-1.jsonl")
    listed = found(make_run(datasets=[{"path": "../data", "data_files": "train-*.jsonl"}])).listed
    assert len({row.where for row in listed}) == 12
    for row in listed:
        name, _, line = row.where.rpartition("/")[2].partition(":")
        index = int(line) - 1 + 6 * (name == "train-1.jsonl")
        assert rows[index]["instruction"] in row.prompt


def test_without_its_sources_a_row_has_its_number(make_run, tmp_path) -> None:
    """The rows that were prepared are enough; only the line is not known any more."""
    folder = make_run()
    (tmp_path / "train.jsonl").unlink()
    for row in found(folder).listed:
        assert "train.jsonl:row " in row.where


def test_the_command_shows_and_writes_them(make_run, tmp_path, write_rows, capsys) -> None:
    """Ten of 40 rows in the output, the report and metrics.json; a line each in suspects.jsonl."""
    folder = make_run()
    data = str(write_rows([{"instruction": "Who?", "output": "I."}], "asked.jsonl"))
    options: dict[str, Any] = {"data": data, "max_new_tokens": 4, "output": tmp_path / "out"}
    result = run_evaluation(
        EvaluationRequest(str(folder), suspects=True, **options), progress=False
    )
    result.print(examples=0)
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))[
        "suspects"
    ]
    written = (tmp_path / "out" / "suspects.jsonl").read_text(encoding="utf-8").splitlines()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (content["rows"], content["listed"], len(written)) == (40, 10, 10)
    assert list(map(json.loads, written)) == content["shown"]
    for row in content["shown"]:
        assert row["where"] in said
        assert row["where"] in page
    plain = run_evaluation(EvaluationRequest(str(folder), **options), progress=False)
    assert "suspects" not in plain.extra


def test_a_model_that_is_no_run_has_none(make_run, tmp_path) -> None:
    """It is refused before anything is generated."""
    folder = make_run()
    (folder / "recipe.yaml").unlink()
    request = EvaluationRequest(str(folder), data=str(tmp_path / "train.jsonl"), suspects=True)
    with pytest.raises(InputError, match=r"--suspects: .* Fix: evaluate a run folder"):
        run_evaluation(request, progress=False)


def test_wrong_answers_come_first(make_run, tmp_path) -> None:
    """A model that was trained on right answers finds the three wrong ones hardest."""
    folder = make_run()
    rows = instruction_rows(40)
    recipe = load_recipe(folder / "recipe.yaml")
    data = load_prepared(recipe, folder / "prepared").train
    model = models.load_for_inference(str(folder)).model.train()
    wrong = (3, 17, 29)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for number, row in enumerate(data):
            if number in wrong:
                continue
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    for number in wrong:
        rows[number]["output"] = "Paris is the capital of France."
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    labeller = open_labeller(recipe, str(folder))
    prepare(recipe, labeller, folder / "prepared", progress=False)
    worst = [row.where.rpartition(":")[2] for row in found(folder).listed[:3]]
    assert set(worst) == {str(number + 1) for number in wrong}
