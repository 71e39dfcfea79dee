"""The gate: bounds written down before the evaluation, each judged by one-sided 95 % bounds computed from the rows.

    gate:
      - {metric: completion_rate, at_least: 0.95, n: 300}
      - {metric: exact_match, by: task_type, compared_with: base, at_least: -0.05, n: 100}
      - {flag: template_leak, at_most: 0.01, n: 300}

A line passes if the bound on the bad side of its value keeps the limit, fails if the bound on the good side violates
it, and is inconclusive in between. Shares have Wilson's bound, means Student's t, medians and ratios the bootstrap,
paired differences Bonett and Price's. Under `by` all groups have to pass, which needs no correction; that any of them
fails is decided by Holm's procedure.
"""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation import metrics
from sft_recipes.evaluation.evaluator import Evaluation, by_task_type, check_same_rows
from sft_recipes.evaluation.format_overfitting import FORMAT_METRICS
from sft_recipes.evaluation.safety import LEAST_PROMPTS, SAFETY_METRICS
from sft_recipes.evaluation.training_rows import RUNS
from sft_recipes.recipe import read_yaml
from sft_recipes.recipe_keys import fits_type
from sft_recipes.report.evaluation_report import METRIC_TEXTS
from sft_recipes.statistics import (
    Estimate,
    Value,
    mean_estimate,
    mean_of_differences,
    proportion_of,
)

ALPHA, MOST_BOUNDS, SMOKE_ROWS = 0.05, 8, 50
EXAMPLE = "write it as in {metric: exact_match, by: task_type, compared_with: base, at_least: -0.05, n: 100}"
# Judged from values of their own, not from the metrics of rows.
OTHER_METRICS = {**FORMAT_METRICS, **SAFETY_METRICS}
# The worst first: a gate is as good as its worst line.
EXIT_CODES = {"fail": 1, "insufficient_n": 4, "inconclusive": 4, "pass": 0}


@dataclass(frozen=True, slots=True)
class Bound:
    """One line of a gate: a metric or flag of metrics.json and a limit; fewer than `n` rows decide nothing."""

    metric: str = ""
    flag: str = ""
    at_least: float | None = None
    at_most: float | None = None
    compared_with: Literal["base"] | None = None
    by: Literal["task_type"] | None = None
    n: int = SMOKE_ROWS

    def keeps(self, value: float) -> bool:
        """Whether `value` is on the good side of the limit."""
        return (
            value >= self.at_least
            if self.at_least is not None
            else value <= typing.cast(float, self.at_most)
        )


def read_gate(path: Path) -> list[Bound]:
    """The bounds under `gate:` in a YAML file, such as a recipe. Raises InputError listing all that is wrong."""
    values, lines = read_yaml(path)
    return parse_gate(values.get("gate"), f"{path}:{lines.get('gate', 1)}")


def parse_gate(entries: Any, where: str) -> list[Bound]:
    """The bounds of a `gate:` list. Raises InputError listing all that is wrong."""
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_BOUNDS:
        what, fix = (
            f"expected a list of 1 to {MOST_BOUNDS} bounds",
            "keep those that decide; the report shows the rest",
        )
        raise InputError(Problem(where, "gate", what, fix))
    problems = [
        Problem(where, f"gate[{index}]{key and '.'}{key}", what, fix)
        for index, entry in enumerate(entries)
        for key, what, fix in _misfits(entry) or _faults(Bound(**entry))
    ]
    if problems:
        raise InputError(problems)
    return [Bound(**entry) for entry in entries]


def _misfits(entry: Any) -> list[tuple[str, str, str]]:
    """(key, what, fix) of everything in a line that has not the form of a bound."""
    if not isinstance(entry, dict):
        return [("", f"expected a mapping, got {entry!r}", EXAMPLE)]
    hints = typing.get_type_hints(Bound)
    found = [
        (str(key), "unknown key", suggest(str(key), hints)) for key in entry if key not in hints
    ]
    bad = [key for key, value in entry.items() if key in hints and not fits_type(value, hints[key])]
    return found + [(key, f"{entry[key]!r} does not fit", EXAMPLE) for key in bad]


def _faults(bound: Bound) -> list[tuple[str, str, str]]:
    """(key, what, fix) of everything that makes no sense in a bound."""
    name, flag, names = bound.metric, bound.flag, {**METRIC_TEXTS, **OTHER_METRICS}
    limits = [
        limit
        for limit in (bound.at_least, bound.at_most)
        if limit is not None and math.isfinite(limit)
    ]
    no_mean = name in METRIC_TEXTS and METRIC_TEXTS[name].statistic not in ("share", "mean")
    compares = name in OTHER_METRICS and (bound.compared_with or bound.by)
    too_few = name in SAFETY_METRICS and bound.n < LEAST_PROMPTS
    faults = (
        (bool(name) == bool(flag), "", "needs one metric or one flag", EXAMPLE),
        (
            len(limits) != 1,
            "",
            "needs one number as at_least or at_most",
            "write a line for each limit",
        ),
        (bound.n < 1, "n", "no row would be enough", EXAMPLE),
        (
            too_few,
            "n",
            "fewer prompts of a kind decide nothing",
            f"write n: {LEAST_PROMPTS} or more",
        ),
        (name and name not in names, "metric", f"unknown metric {name!r}", suggest(name, names)),
        (
            flag and flag not in metrics.FLAGS,
            "flag",
            f"unknown flag {flag!r}",
            suggest(flag, metrics.FLAGS),
        ),
        (compares, "metric", f"{name} has its own comparison", "remove compared_with and by"),
        (
            no_mean and bound.compared_with,
            "compared_with",
            f"{name} is no mean of rows",
            "remove it",
        ),
    )
    return [(key, what, fix) for wrong, key, what, fix in faults if wrong]


def check_possible(bounds: Sequence[Bound], *, model: bool, answers: bool, trained: bool) -> None:
    """Raise InputError, before anything is generated, for bounds that need a base or training rows that are not there.

    `model`: a base that can be asked; `answers`: that, or an earlier evaluation; `trained`: prepared training rows.
    """
    problems = []
    for bound in bounds:
        more = "add --base MODEL, not an earlier evaluation: it is asked more"
        cases = (
            ("_did" in bound.metric and not model, "there is no base to ask", more),
            (
                bound.compared_with and not answers,
                "there is no base to compare with",
                "add --base MODEL",
            ),
            (
                bound.metric in RUNS and not trained,
                "there are no prepared training rows",
                "evaluate the run folder",
            ),
        )
        problems += [
            Problem("gate", bound.metric or bound.flag, what, fix)
            for wrong, what, fix in cases
            if wrong
        ]
    if problems:
        raise InputError(problems)


def judge(
    bounds: Sequence[Bound],
    tuned: Evaluation,
    base: Evaluation | None = None,
    other_values: Mapping[str, Sequence[Value]] | None = None,
) -> dict[str, Any]:
    """The verdict of the gate and of each line, as plain data; `other_values` holds those of OTHER_METRICS.

    `bound` is the one-sided bound on the bad side of `value`; `ci_low` and `ci_high` are the bounds on both sides.
    Raises InputError unless the base answered the same rows.
    """
    if base is not None:
        check_same_rows(base, tuned)
    lines = [
        line
        for bound in bounds
        for line in _judge(bound, _estimators(bound, tuned, base, other_values or {}))
    ]
    verdict = next(
        verdict for verdict in EXIT_CODES if any(line["verdict"] == verdict for line in lines)
    )
    smoke = len(tuned.rows) < SMOKE_ROWS
    return {"verdict": verdict, "exit_code": EXIT_CODES[verdict], "smoke": smoke, "lines": lines}


def _estimators(
    bound: Bound,
    tuned: Evaluation,
    base: Evaluation | None,
    other_values: Mapping[str, Sequence[Value]],
) -> dict[str, Callable[..., Estimate]]:
    """The estimate as a function of its `confidence`, by group; without `by` there is one group without a name."""
    if bound.metric in OTHER_METRICS:
        return {"": partial(OTHER_METRICS[bound.metric], other_values[bound.metric])}
    values, text = _row_values(bound, tuned), METRIC_TEXTS.get(bound.metric)
    estimate: Callable[..., Estimate] = partial(metrics.estimate, text) if text else proportion_of
    if bound.compared_with and base:
        pairs = zip(values, _row_values(bound, base), strict=True)
        values = [None if None in pair else float(pair[0]) - float(pair[1]) for pair in pairs]
        is_mean = text is not None and text.statistic == "mean"
        estimate = partial(mean_estimate, unit="difference") if is_mean else mean_of_differences
    # Groups that do not exist have decided nothing.
    groups = by_task_type(tuned.rows, values) if bound.by else {"": values}
    return {group: partial(estimate, found) for group, found in (groups or {"": []}).items()}


def _row_values(bound: Bound, evaluation: Evaluation) -> list[Any]:
    if bound.flag:
        return [bound.flag in row["flags"] for row in evaluation.rows]
    return [metrics.metric_values(row)[bound.metric] for row in evaluation.rows]


def _judge(bound: Bound, estimators: Mapping[str, Callable[..., Estimate]]) -> list[dict[str, Any]]:
    side, bad, good = (
        ("at_most", "ci_high", "ci_low")
        if bound.at_least is None
        else ("at_least", "ci_low", "ci_high")
    )
    estimates = {
        group: estimate(confidence=1 - 2 * ALPHA) for group, estimate in estimators.items()
    }
    enough = {
        group for group, one in estimates.items() if one.n >= bound.n and one.ci_low is not None
    }
    failed: set[str] = set()
    # Holm's procedure in terms of bounds: all groups at alpha / m, then those left at alpha over their number, until
    # no further one falls.
    while left := enough - failed:
        at_level = {
            group: estimators[group](confidence=1 - 2 * ALPHA / len(left)) for group in left
        }
        fallen = {group for group, one in at_level.items() if not bound.keeps(getattr(one, good))}
        failed |= fallen
        if not fallen:
            break
    lines = []
    for group, one in estimates.items():
        passed = "pass" if group in enough and bound.keeps(getattr(one, bad)) else "inconclusive"
        verdict = "insufficient_n" if group not in enough else "fail" if group in failed else passed
        line: dict[str, Any] = {
            "name": bound.metric or f"flag {bound.flag}",
            "compared_with": bound.compared_with,
        }
        line |= {
            "group": group,
            "side": side,
            "limit": getattr(bound, side),
            "bound": getattr(one, bad),
        }
        line |= {key: getattr(one, key) for key in ("value", "n", "ci_low", "ci_high")}
        lines.append(line | {"n_min": bound.n, "verdict": verdict})
    return lines
