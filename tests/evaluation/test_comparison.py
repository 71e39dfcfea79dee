"""One evaluation beside others: differences, what else differs, task types, Holm, and the curves of
training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import run_folder
from sft_recipes.errors import InputError
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.comparison import (
    System,
    compare_all,
    earlier,
    facts_of,
    holm,
    task_table,
    training_curves,
)
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows, write_evaluation
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.messages import Example
from sft_recipes.statistics import PairedDifference

QUESTION = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
]


def answered(right: str, tasks: Sequence[str | None] | None = None) -> Evaluation:
    """One scored row for each letter: `r` is right, `w` wrong."""
    rows = []
    for index, letter in enumerate(right):
        response = "Blue." if letter == "r" else "Red."
        scores = score_row(
            Answer(
                "Name a colour.", "Blue.", response, "eos", response_tokens=3, reference_tokens=2
            )
        )
        where = {"row": index, "source": "x", "messages": QUESTION, "n_tokens": 3}
        where |= {"prompt": f"Name a colour ({index})."}
        rows.append(where | {"task_type": tasks[index] if tasks else None} | scores)
    return evaluation_from_rows(rows)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with recipe, data.json and an evaluation `eval` of the given answers."""

    def make(name: str, rows: int, right: str, tokens: int = 64, **keys: Any) -> Path:
        run = tmp_path / name
        write_evaluation(
            answered(right), run / run_folder.EVALUATIONS / "eval", info={"max_new_tokens": tokens}
        )
        recipe = {"dataset_name": "../data", "learning_rate": 1e-3, "output_dir": "./"} | keys
        (run / run_folder.RECIPE).write_text(yaml.safe_dump(recipe), encoding="utf-8")
        content = {
            "fingerprint": "f",
            "train": {"rows": rows, "tokens": 10 * rows, "trained_tokens": rows},
        }
        run_folder.write_json(run / run_folder.DATA, content)
        return run

    return make


def ours(run: Path, right: str) -> System:
    info = json.loads((run / "evaluations/eval/metrics.json").read_text())["info"]
    return System("tuned", answered(right), facts_of(run, info))


EXAMPLES = [Example(QUESTION, "x", index) for index in range(4)]


def test_a_run_folder_stands_for_its_evaluation_of_the_same_name(make_run) -> None:
    """The run or the evaluation in it give the same answers and facts; other rows are refused
    before any are asked."""
    run = make_run("half", 50, "rrww")
    by_run, by_folder = (
        earlier(str(run), "eval", EXAMPLES),
        earlier(str(run / "evaluations/eval"), "other", EXAMPLES),
    )
    assert by_run.evaluation == by_folder.evaluation and by_run.facts == by_folder.facts
    assert (by_run.name, by_run.facts["data"]["rows"]) == (str(run), 50)
    with pytest.raises(
        InputError, match=r"its 4 rows are other conversations than the 3 .*Fix: evaluate both"
    ):
        earlier(str(run), "eval", EXAMPLES[:3])
    with pytest.raises(InputError, match=r"no samples.jsonl"):
        earlier(str(run), "unknown", EXAMPLES)


def test_differences_are_paired_and_what_else_differs_is_listed(make_run) -> None:
    """This - other by hand; of recipe, data and asking only what differs; unknown facts list
    nothing."""
    this = ours(make_run("this", 100, "rrrw"), "rrrw")
    other = earlier(
        str(make_run("other", 100, "rwww", tokens=32, learning_rate=2e-3)), "eval", EXAMPLES
    )
    found, unknown = compare_all(this, [other, System("base", answered("wwww"))])
    exact = found["differences"]["exact_match"]
    assert (exact["value"], exact["gained"], exact["lost"], exact["n"]) == (0.5, 2, 0, 4)
    assert found["changed"] == {
        "evaluation": {"max_new_tokens": [32, 64]},
        "recipe": {"learning_rate": [0.002, 0.001]},
        "data": {},
    }
    assert (found["rows_trained"], found["on_curve"]) == (100, False)
    assert (unknown["changed"], unknown["on_curve"]) == ({}, False)
    assert unknown["differences"]["exact_match"]["value"] == 0.75


def test_runs_that_differ_in_rows_only_are_one_learning_curve(make_run, tmp_path) -> None:
    """`max_rows` alone makes a point of the curve, in the report with this run's own; a changed
    rate does not."""
    this = make_run("this", 100, "rrrr")
    systems = [
        earlier(str(make_run("quarter", 25, "rwww", max_rows=25)), "eval", EXAMPLES),
        earlier(str(make_run("half", 50, "rrww", max_rows=50)), "eval", EXAMPLES),
        earlier(
            str(make_run("rate", 50, "rrww", max_rows=50, learning_rate=1.0)), "eval", EXAMPLES
        ),
    ]
    found = compare_all(ours(this, "rrrr"), systems)
    assert [(one["rows_trained"], one["on_curve"]) for one in found] == [
        (25, True),
        (50, True),
        (50, False),
    ]
    again = compare_all(ours(this, "rrrr"), [earlier(str(this), "eval", EXAMPLES)])
    assert not again[0]["on_curve"]
    write_evaluation(answered("rrrr"), tmp_path / "report", info={}, extra={"comparisons": found})
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Learning curve" in page and "recipe: max_rows" in page
    write_evaluation(answered("rrrr"), tmp_path / "alone", info={}, extra={"comparisons": again})
    assert "Learning curve" not in (tmp_path / "alone" / "report.html").read_text(encoding="utf-8")


def test_task_types_are_compared_in_pairs_and_marked_where_training_had_none() -> None:
    """Type a gains 6 of 6, b loses 1 and gains 1, c is only asked of one model; p and Holm by
    hand."""
    tasks = ["a"] * 6 + ["b"] * 2 + [None]
    base, tuned = answered("wwwwww" + "rw" + "r", tasks), answered("rrrrrr" + "wr" + "w", tasks)
    table = task_table(tuned, base, {"a": 9})
    assert list(table) == ["a", "b"]
    a, b = table["a"], table["b"]
    assert (a["value"], a["n"], a["gained"], a["lost"], a["training_rows"]) == (1.0, 6, 6, 0, 9)
    assert (b["value"], b["n"], b["gained"], b["lost"], b["training_rows"]) == (0.0, 2, 1, 1, 0)
    assert (a["p_value"], b["p_value"]) == (2 / 2**6, 1.0)
    assert (a["p_holm"], b["p_holm"]) == (4 / 2**6, 1.0)
    assert task_table(tuned, None, None) == {
        "a": {"training_rows": None},
        "b": {"training_rows": None},
    }
    assert task_table(answered(""), answered(""), {}) == {}


def test_holm() -> None:
    """By hand 5 x .005, 4 x .01, 3 x .03, then never below, 1 x .9; at most 1; what has no p-value
    stays out."""
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "none": None, "high": 0.9}
    found = holm({name: PairedDifference(0.0, 1, p_value=p) for name, p in values.items()})
    assert found == pytest.approx({"d": 0.025, "a": 0.04, "c": 0.09, "b": 0.09, "high": 0.9})
    assert holm(
        {"one": PairedDifference(0.0, 1, p_value=0.7), "two": PairedDifference(0.0, 1, p_value=0.8)}
    ) == {
        "one": 1.0,
        "two": 1.0,
    }
    assert holm({}) == {}


def test_training_curves(tmp_path: Path) -> None:
    """Loss and evaluated numbers by step; of a step logged twice the later; no text, and at most
    500 points of each."""
    log = tmp_path / "log.jsonl"
    entries: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 1201)
    ]
    entries += [
        {"step": 2, "eval_loss": 0.5},
        {"step": 1, "eval_loss": 0.9},
        {"step": 2, "eval_loss": 0.4},
    ]
    entries += [{"step": 3, "eval_loss": "nan"}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    curves = training_curves(log)
    assert curves["eval_loss"] == [[1, 0.9], [2, 0.4]]
    assert set(curves) == {"loss", "eval_loss"}
    assert 400 <= len(curves["loss"]) <= 500 and curves["loss"][:2] == [[1, 1.0], [4, 0.25]]
    assert training_curves(tmp_path / "none.jsonl") == {}
