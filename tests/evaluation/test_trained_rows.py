"""Rows that the run was trained on: counted, said above everything, refused by a gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import cli
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.errors import InputError
from sft_recipes.evaluation import evaluator
from sft_recipes.evaluation.evaluate_command import run_evaluation
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import build_model, build_tokenizer

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LONG = "A merchant sends three carts of salt over the pass to the market behind the mountains. "


@pytest.fixture
def train(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., str]:
    """A run folder as training leaves it, of these instructions, without the training."""

    def make(instructions: list[str], **keys: Any) -> str:
        write_rows([{"instruction": text, "output": "yes"} for text in instructions])
        folder = tmp_path / "run"
        tokenizer = build_tokenizer()
        build_model(len(tokenizer)).save_pretrained(folder)
        values = {"model_name_or_path": "./", "dataset_name": "../train.jsonl", "output_dir": "./"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**values, **keys}))
        recipe = load_recipe(folder / "recipe.yaml")
        labeller = Labeller(attach_chat_template(tokenizer, recipe.template), recipe.labels)
        tokenizer.save_pretrained(folder)
        prepare(recipe, labeller, folder / "prepared", progress=False)
        return str(folder)

    return make


@pytest.fixture
def ask(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Any]:
    """Evaluate a run on these instructions."""

    def do(run: str, instructions: list[str] | None, **options: Any) -> Any:
        settings: dict[str, Any] = {"max_new_tokens": 2, "output": tmp_path / "out", **options}
        if instructions is not None:
            rows = [{"instruction": text, "output": "yes"} for text in instructions]
            settings["data"] = str(write_rows(rows, "asked.jsonl"))
        return run_evaluation(EvaluationRequest(run, **settings), progress=False)

    return do


def test_equal_and_nearly_equal_prompts_are_counted_with_their_places(train, ask) -> None:
    """An exact one (case aside), a short near one, a long one in another frame; a new one and one
    with another number are none. Output, metrics.json and report say so first."""
    trained = [
        "Say one and two.",
        "Please tell me the name of a colour that you like",
        LONG + "Why?",
    ]
    run = train([*trained, "Add 3 and 4."])
    asked = [
        "say ONE and two.",
        "Please, tell me the name of a colour that you like!",
        "Read this: " + LONG + "Explain how much he earns.",
        "What is a fox?",
        "Add 3 and 5.",
    ]
    result = ask(run, asked)
    found = result.extra["training_rows"]
    assert found["rows"] == 3
    assert sum(found["by_rule"].values()) == 3
    places = [(row["where"][-13:], row["trained"][-13:]) for row in found["shown"]]
    assert places == [(f"asked.jsonl:{n}", f"train.jsonl:{n}") for n in (1, 2, 3)]
    (warning,) = result.extra["warnings"]
    assert warning.startswith("3 of 5 rows were trained on, 1 of them nearly (prompts like ")
    content = json.loads((result.folder / "metrics.json").read_text(encoding="utf-8"))
    assert content["training_rows"] == found
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert page.index("3 of 5 rows were trained on") < page.index("<h2>Metrics</h2>")
    assert "asked.jsonl:3" in page


def test_the_output_begins_with_it(train, ask, capsys) -> None:
    """The verdict, which comes first, says that it is flattered; the warning stands before any figure."""
    ask(train(["Say one."]), ["Say one."]).print(examples=0)
    shown = capsys.readouterr().out
    verdict, warning, rest = shown.partition("WARNING: 1 of 1 rows were trained on")
    assert "1 of them trained on" in verdict
    assert warning and "Ended by itself" in rest


def test_a_gate_refuses_them_before_anything_is_generated(
    train, ask, tmp_path, monkeypatch
) -> None:
    """Each row is named with the training row and the option that lets it pass; with the option
    the verdict says how many there were; rows that are new pass by themselves."""
    run = train([f"Say {word}." for word in WORDS])
    gate = tmp_path / "gate.yaml"
    gate.write_text("gate: [{metric: exact_match, at_most: 0.9, n: 25}]")
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate", lambda *_, **__: pytest.fail("generated"))
        with pytest.raises(
            InputError,
            match=r"asked\.jsonl:2: --gate: trained on as .*train\.jsonl:1 \(exact prompt\).*"
            r"Fix: .*--allow_trained_rows\.",
        ):
            ask(run, ["What is a fox?", "Say one."], gate=str(gate))
    result = ask(run, ["What is a fox?", "Say one."], gate=str(gate), allow_trained_rows=True)
    assert result.extra["gate"]["trained_rows"] == 1
    assert "1 of the rows were trained on" in (result.folder / "report.html").read_text()
    assert ask(run, ["What is a fox?"], gate=str(gate)).extra["gate"]["trained_rows"] == 0


def test_the_option_is_one_of_the_command(train, write_rows, tmp_path, monkeypatch, capsys) -> None:
    """Exit code 2 without it, the gate's own with it, and the text beside the verdict."""
    run = train(["Say one."])
    data = write_rows([{"instruction": "Say one.", "output": "x"}], "asked.jsonl")
    gate = tmp_path / "gate.yaml"
    gate.write_text("gate: [{metric: exact_match, at_most: 0.9, n: 25}]")
    command = ["sft-recipes", "evaluate", run, "--data", str(data), "--gate", str(gate)]
    command += ["--max_new_tokens", "2", "--output", str(tmp_path / "out")]
    for more, code in (([], 2), (["--allow_trained_rows"], 4)):
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    assert "(with 1 rows that were trained on or nearly)" in capsys.readouterr().out


def test_only_rows_that_were_trained_count(train, ask) -> None:
    """Rows that the run held out, or left out by `max_rows`, were not trained on."""
    instructions = [f"Say {first} {second}" for first in WORDS for second in WORDS]
    run = train(instructions, eval_split=0.2, max_rows=30)
    result = ask(run, None)
    assert result.extra["training_rows"]["rows"] == 0
    everything = ask(run, instructions).extra["training_rows"]
    assert everything["by_rule"]["exact prompt"] == 30


def test_what_is_not_known_is_said(train, ask, tmp_path) -> None:
    """Without the prepared rows there is a warning; a model that is no run has no training rows."""
    run = train(["Say one."])
    (tmp_path / "run" / "prepared" / "manifest.json").unlink()
    (warning,) = ask(run, ["Say one."]).extra["warnings"]
    assert warning.startswith("whether these rows were trained on is not known: ")
    (tmp_path / "run" / "recipe.yaml").unlink()
    result = ask(run, ["Say one."])
    assert result.extra["warnings"] == []
    assert result.extra["training_rows"] == {"unknown": "this is no run folder"}


def test_references_beyond_the_budget_are_said_first(train, write_rows, tmp_path) -> None:
    """How many, and the budget that is enough: with that one nothing is said any more."""
    run = train(["Say one."])
    rows = [{"instruction": f"Say {word} again", "output": word * 3} for word in WORDS[:3]]
    data = str(write_rows(rows, "asked.jsonl"))
    request = EvaluationRequest(run, data=data, output=tmp_path / "out", max_new_tokens=2)
    (warning,) = run_evaluation(request, progress=False).extra["warnings"]
    assert warning.startswith("3 of 3 references do not fit into --max_new_tokens")
    needed = int(warning.rpartition(" ")[2])
    for tokens, said in ((needed, 0), (needed - 1, 1)):
        request = EvaluationRequest(run, data=data, output=tmp_path / "o", max_new_tokens=tokens)
        assert len(run_evaluation(request, progress=False).extra["warnings"]) == said
