"""What did tuning cost? The model before it and the tuned one answer the same general prompts.

`retention_prompts.jsonl` was written for this project: short prompts of several kinds, none of them
a task of a shipped recipe, each with an `expected_format` that says by rule whether an answer will
do. Narrow tuning can lose such abilities while the metrics of its own task rise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.constraints import check_expected_format
from sft_recipes.evaluation.evaluator import Evaluation, check_same_rows, rows_by_task_type
from sft_recipes.evaluation.prompt_file import read_prompt_file
from sft_recipes.evaluation.prompts import Row, prompts_of, values_of_prompts
from sft_recipes.evaluation.questions import Indicator, Measured, estimate_indicators
from sft_recipes.messages import Example
from sft_recipes.statistics import mean_of_differences, paired_difference, proportion_of

PROMPTS = str(Path(__file__).with_name("retention_prompts.jsonl"))
# Every prompt asks for something short; a fixed budget makes evaluations comparable.
NEW_TOKENS = 64
# An answer with one of these does not do what it was asked.
FAILING = frozenset({"empty", "loop", "prompt_echo", "constraint_fail"})

# Of a model that lost nothing about this share of the answers changes all the same, as many for the
# better as for the worse: assumed for the number of prompts that a bound needs.
_CHANGING = 0.2
# Standard deviations from 0 of a one-sided bound at 95 % (1.645), and of a model that lost nothing
# passing it 4 times in 5 (0.842).
_REACH = 1.645 + 0.842

RETENTION_METRICS: Mapping[str, Indicator] = {
    "retention_loss": Indicator(
        "Retention prompts passed before tuning less those passed after, as a share.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
}


def least_prompts(limit: float) -> int:
    """From how many prompts on a loss of at most `limit` can be told from none; 0 for no loss."""
    if limit <= 0:
        return 0
    return math.ceil(_CHANGING * (_REACH / limit) ** 2)


def read_prompts(path: str = PROMPTS) -> list[Example]:
    """Prompts from a file with columns `prompt`, `task_type` and `expected_format`.

    Raises InputError for a row that no rule can judge.
    """
    return read_prompt_file(path, _columns)


def _columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    expected = row.get("expected_format")
    if expected is None:
        what = "nothing says when an answer will do"
        fix = 'write constraints, as {"keywords": ["Paris"], "max_words": 20}'
        raise InputError(Problem(where, "expected_format", what, fix))
    check_expected_format(expected, where)
    return {"task_type": str(row.get("task_type") or "any"), "expected_format": expected}


class _Pair(NamedTuple):
    """A prompt's row of the model before tuning, and that of the tuned model."""

    before: Row
    after: Row


def measure_retention(base: Evaluation, tuned: Evaluation) -> Measured:
    """Plain data for `metrics.json`, and one value per prompt for `RETENTION_METRICS`.

    The data: the share of prompts that each model passes and the paired difference, in all and by
    kind; `kept`, of what passed before the share that still does; the prompts lost and gained.
    """
    check_same_rows(base, tuned)
    kinds_before = rows_by_task_type(base.rows)
    kinds = {}
    for name, rows in rows_by_task_type(tuned.rows).items():
        kinds[name] = _compared(kinds_before[name], rows)
    losses = list(map(sub, passed(base.rows), passed(tuned.rows)))
    values = {"retention_loss": values_of_prompts(tuned.rows, losses)}
    pairs = list(map(_Pair, base.rows, tuned.rows))
    content = {
        **_compared(base.rows, tuned.rows),
        "kinds": kinds,
        "indicators": estimate_indicators(RETENTION_METRICS, values),
        "lost": list(_changed(pairs, passed_before=True)),
        "gained": list(_changed(pairs, passed_before=False)),
    }
    return Measured(content, values)


def passed(rows: Sequence[Row]) -> list[float]:
    """For each row 1.0 where the answer does what was asked, else 0.0."""
    return [float(_passes(row)) for row in rows]


def _passes(row: Row) -> bool:
    return not FAILING & set(row["flags"])


def _compared(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """The shares passed, their difference, and what was kept of those passed before."""
    passed_before = passed(before)
    passed_after = passed(after)
    kept = []
    for was_passed, is_passed in zip(passed_before, passed_after, strict=True):
        kept.append(is_passed if was_passed else None)
    difference = paired_difference(
        passed_before, passed_after, groups=prompts_of(after), higher_is_better=True
    )
    return {
        "base": _share(before, passed_before),
        "tuned": _share(after, passed_after),
        "difference": difference.as_json(),
        "kept": _share(after, kept),
    }


def _share(rows: Sequence[Row], values: Sequence[float | None]) -> dict[str, Any]:
    of_prompts = values_of_prompts(rows, values)
    return proportion_of(of_prompts, higher_is_better=True).as_json()


def _changed(pairs: Sequence[_Pair], passed_before: bool) -> Iterator[dict[str, Any]]:
    """The prompts that one of the models alone passes: that before tuning, or the tuned one."""
    for pair in pairs:
        if _passes(pair.before) is passed_before and _passes(pair.after) is not passed_before:
            yield _both_answers(pair)


def _both_answers(pair: _Pair) -> dict[str, Any]:
    row = pair.after
    failed = pair.after if _passes(pair.before) else pair.before
    return {
        "source": row["source"],
        "row": row["row"],
        "line": row.get("line"),
        "task_type": row["task_type"],
        "prompt": row["messages"][-2]["content"],
        "base": pair.before["response"],
        "tuned": pair.after["response"],
        "why": sorted(FAILING & set(failed["flags"])),
    }
