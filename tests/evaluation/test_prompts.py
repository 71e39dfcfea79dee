"""Rows with an equal prompt are one observation, wherever a number is made of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.evaluation import review
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.comparison import task_table
from sft_recipes.evaluation.evaluator import (
    Evaluation,
    compare,
    evaluation_from_rows,
    write_evaluation,
)
from sft_recipes.evaluation.format_overfitting import TEMPLATE, VARIANTS, measure_formats
from sft_recipes.evaluation.gate import judge, parse_gate
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.prompts import count_prompts
from sft_recipes.evaluation.safety import SAFE, UNSAFE, measure_safety
from sft_recipes.report.evaluation_text import rows_text
from sft_recipes.statistics import by_group, paired_difference, proportion

COPIES = 50


def answered(
    right: Sequence[bool], copies: int = COPIES, prompt: str = "Prompt {}", **more: Any
) -> Evaluation:
    """Each prompt stands there `copies` times, and every row of it is answered right or wrong."""
    rows = []
    for number, is_right in enumerate(right):
        response = "one two three four five" if is_right else "six six six six seven"
        reference = "one two three four five"
        answer = Answer("Say it.", reference, response, "eos", None, (), (), 5, 5, 9)
        for copy in range(copies):
            row = {
                "row": len(rows),
                "source": "x",
                "task_type": "say",
                "messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant"}],
                # Case and white space make no other prompt.
                "prompt": prompt.format(number) + " " * copy,
                "n_tokens": 5,
            }
            rows.append(row | score_row(answer) | more)
    return evaluation_from_rows(rows)


def without_rows(evaluation: Evaluation) -> Any:
    return (evaluation.metrics, evaluation.flags, evaluation.task_types)


def test_a_hundred_rows_of_two_prompts_are_two() -> None:
    """No mistake in 100 rows of 2 prompts leaves what none in 2 leaves open, not [0, 0.037]."""
    evaluation = answered([False, False])
    exact = evaluation.metrics["exact_match"]
    assert (len(evaluation.rows), exact.n, exact.value) == (100, 2, 0.0)
    assert exact.ci_high == proportion(0, 2).ci_high
    assert exact.ci_high > 0.6
    content = evaluation.as_json()
    assert (content["n"], content["rows"]) == (2, 100)
    first = rows_text(evaluation.as_json(), evaluation.rows).splitlines()[0]
    assert first == "100 rows answered: 100 of x; 2 different prompts, each of which counts once"


def test_every_metric_flag_and_task_type_is_that_of_single_rows() -> None:
    """Fifty copies of each of six prompts make the very estimates that one of each makes."""
    right = [True, True, False, True, False, True]
    assert without_rows(answered(right)) == without_rows(answered(right, copies=1))


def test_a_prompt_counts_with_the_mean_of_its_rows() -> None:
    """A prompt right in 1 row of 4 beside one that is always right: 0.625, not the rows' 0.5."""
    rows = [*answered([True], copies=1).rows, *answered([False], copies=3).rows]
    rows += answered([True], copies=2, prompt="PROMPT  other {}").rows
    exact = evaluation_from_rows(rows).metrics["exact_match"]
    assert (exact.value, exact.n) == (0.625, 2)


def test_paired_differences_and_mcnemar_count_prompts() -> None:
    """Six prompts gained, each fifty times, have the p-value of six, alone and by task type."""
    base, tuned = answered([False] * 6), answered([True] * 6)
    single = compare(answered([False] * 6, copies=1), answered([True] * 6, copies=1))
    assert compare(base, tuned) == single
    assert single["exact_match"].p_value == 2 / 2**6
    row = task_table(tuned, base, None)["say"]
    assert (row["n"], row["gained"], row["p_value"]) == (6, 6, 2 / 2**6)


def test_a_group_that_moves_both_ways_has_not_moved() -> None:
    """Within a group gains and losses cancel; the test stays McNemar's on the groups that moved."""
    before, after = [0, 1, 0, 0, None], [1, 0, 1, 1, 1]
    difference = paired_difference(before, after, groups=["a", "a", "b", "b", "c"])
    assert (difference.value, difference.n, difference.n_excluded) == (0.5, 2, 1)
    assert (difference.gained, difference.lost, difference.p_value) == (1, 0, 1.0)


@pytest.mark.parametrize(
    "line",
    [
        {"metric": "exact_match", "at_least": 0.5, "n": 6},
        {"metric": "exact_match", "at_least": 0.5, "n": 6, "by": "task_type"},
        {"metric": "token_f1", "compared_with": "base", "at_least": 0.1, "n": 6},
        {"metric": "length_ratio", "at_most": 2, "n": 6},
        {"metric": "opener_entropy", "at_least": 0.1, "n": 6},
        {"flag": "loop", "at_most": 0.5, "n": 6},
        {"flag": "loop", "at_most": 0.5, "n": 9, "compared_with": "base"},
    ],
)
def test_every_line_of_a_gate_counts_prompts(line: dict[str, Any]) -> None:
    """The same verdict, value, bound and n as of one row a prompt; 300 rows are a smoke test."""
    right = [True] * 5 + [False]
    found = [
        judge(parse_gate([line], ""), answered(right, copies), answered([False] * 6, copies))
        for copies in (1, COPIES)
    ]
    assert found[0] == found[1]
    assert found[0]["lines"][0]["n"] == 6
    assert found[1]["smoke"]


def test_formats_count_prompts() -> None:
    """Every indicator of format overfitting and its n are those of one row a prompt."""
    found = []
    for copies in (1, COPIES):
        tuned = {TEMPLATE: answered([True] * 4, copies)}
        tuned |= {name: answered([True, False, True, True], copies) for name in VARIANTS}
        base = dict.fromkeys(tuned, answered([False] * 4, copies))
        found.append(measure_formats({"tuned": tuned, "base": base}))
    assert found[0] == found[1]
    assert found[0].content["n"] == 4


def test_safety_counts_prompts() -> None:
    """A safe and an unsafe prompt, fifty times each, are one of a kind: too few for anything."""
    found = []
    for copies in (1, COPIES):
        rows = [*answered([True], copies, task_type=SAFE).rows]
        rows += answered([True], copies, "Harm {}", task_type=UNSAFE).rows
        found.append(measure_safety({"tuned": {TEMPLATE: evaluation_from_rows(rows)}}))
    assert found[0].values == found[1].values
    assert found[0].content["indicators"] == found[1].content["indicators"]
    assert {share["n"] for share in found[1].content["refused"]} == {1}


def test_a_review_shows_a_prompt_once(tmp_path: Path) -> None:
    """Three prompts, fifty rows each, two of them answered alike: one item, two left out."""
    for name, right in (("a", [True, True, True]), ("b", [True, True, False])):
        write_evaluation(answered(right), tmp_path / name, info={})
    made = review.build(tmp_path / "a", tmp_path / "b", tmp_path / "page.html")
    assert (made["items"], made["answered_alike"]) == (1, 2)


def test_rows_without_a_prompt_stand_for_themselves() -> None:
    """Texts that are scored without a question are no copies of one another."""
    assert count_prompts([{}, {}, {"prompt": "A b"}, {"prompt": "a  B"}]) == 3


def test_groups_stand_in_the_order_of_their_first_row() -> None:
    """Means of the known values by hand; a group without any has none."""
    found = by_group([1, None, 0, True, None], ["b", "a", "b", "c", "a"])
    assert found == [0.5, None, 1.0]
