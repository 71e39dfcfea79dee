"""The gate: bounds written down beforehand, judged by one-sided 95 % bounds over prompts.

    gate:
      - {metric: completion_rate, at_least: 0.95, n: 300}
      - {metric: exact_match, by: task_type, compared_with: base, at_least: -0.05, n: 100}
      - {flag: template_leak, at_most: 0.01, n: 300}

A line passes if the bound on the bad side of its value keeps the limit, fails if the bound on the
good side violates it, and is inconclusive in between. Shares have Wilson's bound, means Student's
t, medians and ratios the bootstrap, paired differences Bonett and Price's. Under `by` all groups
have to pass, which needs no correction; that any of them fails is decided by Holm's procedure. A
line that nothing could fail, or nothing pass, is refused (`gate_bounds.py`).
"""

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation.answer import FLAGS
from sft_recipes.evaluation.evaluator import Evaluation, check_same_rows, rows_by_task_type
from sft_recipes.evaluation.gate_bounds import (
    ALPHA,
    INDICATORS,
    SMOKE_ROWS,
    Bound,
    Estimator,
    Fault,
    estimator_of,
    faults_of_numbers,
    least_rows,
)
from sft_recipes.evaluation.metrics import METRICS, flagged
from sft_recipes.evaluation.prompts import Row, count_prompts, values_of_prompts
from sft_recipes.evaluation.safety import LEAST_PROMPTS, SAFETY_METRICS
from sft_recipes.recipe import read_yaml
from sft_recipes.recipe_checks import fits_type
from sft_recipes.statistics import Estimate, Value, differences_of_rows

# So that a report cannot be gated on whatever looks good in it.
MOST_BOUNDS = 8
EXAMPLE = (
    "write it as in {metric: exact_match, by: task_type, compared_with: base, "
    "at_least: -0.05, n: 100}"
)
# The worst first: a gate is as good as its worst line.
EXIT_CODES = {
    "fail": 1,
    "insufficient_n": 4,
    "inconclusive": 4,
    "pass": 0,
}


def read_gate(path: Path) -> list[Bound]:
    """The bounds under `gate:` in a YAML file, such as a recipe.

    Raises InputError listing all that is wrong.
    """
    values, lines = read_yaml(path)
    return parse_gate(values.get("gate"), f"{path}:{lines.get('gate', 1)}")


def parse_gate(entries: Any, where: str) -> list[Bound]:
    """The bounds of a `gate:` list. Raises InputError listing all that is wrong."""
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_BOUNDS:
        what = f"expected a list of 1 to {MOST_BOUNDS} bounds"
        fix = "keep those that decide; the report shows the rest"
        raise InputError(Problem(where, "gate", what, fix))
    problems = []
    for index, entry in enumerate(entries):
        for fault in _misfits(entry) or _faults(Bound(**entry), "n" in entry):
            field = f"gate[{index}]"
            if fault.key:
                field += f".{fault.key}"
            problems.append(Problem(where, field, fault.what, fault.fix))
    if problems:
        raise InputError(problems)
    return list(map(_bound, entries))


def _bound(entry: Mapping[str, Any]) -> Bound:
    """The bound of a line; without `n`, of as many rows as it takes to decide it, and of 50."""
    bound = Bound(**entry)
    if "n" in entry:
        return bound
    return replace(bound, n=max(SMOKE_ROWS, least_rows(bound)))


def _misfits(entry: Any) -> list[Fault]:
    """Everything in a line that has not the form of a bound."""
    if not isinstance(entry, dict):
        return [Fault("", f"expected a mapping, got {entry!r}", EXAMPLE)]
    types = typing.get_type_hints(Bound)
    unknown = []
    misfits = []
    for key, value in entry.items():
        if key not in types:
            unknown.append(Fault(str(key), "unknown key", suggest(str(key), types)))
        elif not fits_type(value, types[key]):
            misfits.append(Fault(key, f"{value!r} does not fit", EXAMPLE))
    return unknown + misfits


def _faults(bound: Bound, says_n: bool) -> list[Fault]:
    """Everything that makes no sense in a bound; the numbers count once the rest does."""
    faults = [*_faults_of_form(bound), *_faults_of_name(bound)]
    return faults or list(faults_of_numbers(bound, says_n))


def _faults_of_form(bound: Bound) -> Iterator[Fault]:
    if bool(bound.metric) == bool(bound.flag):
        yield Fault("", "needs one metric or one flag", EXAMPLE)
    has_one_limit = (bound.at_least is None) != (bound.at_most is None)
    if not has_one_limit or not math.isfinite(bound.limit):
        fix = "write a line for each limit"
        yield Fault("", "needs one number as at_least or at_most", fix)
    if bound.n < 1:
        yield Fault("n", f"{bound.n} rows decide nothing", EXAMPLE)


def _faults_of_name(bound: Bound) -> Iterator[Fault]:
    name = bound.metric
    metric = METRICS.get(name)
    if name in SAFETY_METRICS and bound.n < LEAST_PROMPTS:
        fix = f"write n: {LEAST_PROMPTS} or more"
        yield Fault("n", "fewer prompts of a kind decide nothing", fix)
    if name and metric is None and name not in INDICATORS:
        known = [*METRICS, *INDICATORS]
        yield Fault("metric", f"unknown metric {name!r}", suggest(name, known))
    if bound.flag and bound.flag not in FLAGS:
        yield Fault("flag", f"unknown flag {bound.flag!r}", suggest(bound.flag, FLAGS))
    if name in INDICATORS and (bound.compared_with or bound.by):
        fix = "remove compared_with and by"
        yield Fault("metric", f"{name} has its own comparison", fix)
    if metric is not None and bound.compared_with and not metric.is_mean_of_rows:
        yield Fault("compared_with", f"{name} is no mean of rows", "remove it")


def check_possible(bounds: Sequence[Bound], *, model: bool, answers: bool) -> None:
    """Raise InputError, before anything is generated, for bounds that need a base and have none.

    `model`: a base that can be asked; `answers`: that, or an earlier evaluation.
    """
    problems = []
    for bound in bounds:
        if "_did" in bound.metric and not model:
            fix = "add --base MODEL, not an earlier evaluation: it is asked more"
            problems.append(Problem("gate", bound.metric, "there is no base to ask", fix))
        if bound.compared_with and not answers:
            what = "there is no base to compare with"
            field = bound.metric or bound.flag
            problems.append(Problem("gate", field, what, "add --base MODEL"))
    if problems:
        raise InputError(problems)


def judge(
    bounds: Sequence[Bound],
    tuned: Evaluation,
    base: Evaluation | None = None,
    values: Mapping[str, Sequence[Value]] | None = None,
    seen: Sequence[Any] = (),
) -> dict[str, Any]:
    """The verdict of the gate and of each line, as plain data.

    `values` holds those of INDICATORS; `seen`: the rows that were trained on.
    `bound` is the one-sided bound on the bad side of `value`; `ci_low` and `ci_high` are the bounds
    on both sides. Raises InputError unless the base answered the same rows.
    """
    if base is not None:
        check_same_rows(base, tuned)
    lines: list[dict[str, Any]] = []
    for bound in bounds:
        if bound.metric in INDICATORS:
            own_values = (values or {})[bound.metric]
            estimators = {"": partial(estimator_of(bound), own_values)}
        else:
            estimators = _estimators(bound, tuned, base)
        lines += _judge(bound, estimators)
    verdict = min((line["verdict"] for line in lines), key=list(EXIT_CODES).index)
    return {
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "smoke": count_prompts(tuned.rows) < SMOKE_ROWS,
        "trained_rows": len(seen),
        "lines": lines,
    }


def _estimators(
    bound: Bound, tuned: Evaluation, base: Evaluation | None
) -> dict[str, partial[Estimate]]:
    """The estimators by group; without `by` there is one group without a name."""
    estimate = estimator_of(bound)
    before = _grouped(bound, base) if bound.compared_with and base else {}
    estimators = {}
    for group, rows in _grouped(bound, tuned).items():
        values = _values_of_prompts(bound, rows, before.get(group))
        estimators[group] = partial(estimate, values)
    return estimators


def _grouped(bound: Bound, evaluation: Evaluation) -> Mapping[str, Sequence[Row]]:
    if not bound.by:
        return {"": evaluation.rows}
    # Groups that do not exist have decided nothing.
    return rows_by_task_type(evaluation.rows) or {"": []}


def _values_of_prompts(
    bound: Bound, rows: Sequence[Row], before: Sequence[Row] | None
) -> list[Any]:
    """What a line judges, one value for each prompt: the metric, or its difference to `before`."""
    if before is not None:
        differences = differences_of_rows(
            _values_of_rows(bound, before), _values_of_rows(bound, rows)
        )
        return values_of_prompts(rows, differences)
    if bound.flag:
        return values_of_prompts(rows, _values_of_rows(bound, rows))
    return METRICS[bound.metric].of_prompts(rows)


def _values_of_rows(bound: Bound, rows: Sequence[Row]) -> list[Any]:
    if bound.flag:
        return flagged(rows, bound.flag)
    return METRICS[bound.metric].of_rows(rows)


def _judge(bound: Bound, estimators: Mapping[str, Estimator]) -> list[dict[str, Any]]:
    """A line of the verdict for each group."""
    estimates = {
        group: estimate(confidence=1 - 2 * ALPHA) for group, estimate in estimators.items()
    }
    enough = {}
    for group, estimate in estimates.items():
        if estimate.n >= bound.n and estimate.ci_low is not None:
            enough[group] = estimators[group]
    failed = _failed_groups(bound, enough)
    lines = []
    for group, estimate in estimates.items():
        if group not in enough:
            verdict = "insufficient_n"
        elif group in failed:
            verdict = "fail"
        elif bound.keeps(bound.worst_of(estimate)):
            verdict = "pass"
        else:
            verdict = "inconclusive"
        lines.append(_line(bound, group, estimate, verdict))
    return lines


def _failed_groups(bound: Bound, estimators: Mapping[str, Estimator]) -> set[str]:
    """Holm's procedure in terms of bounds.

    All groups are judged at alpha over their number, then those left at alpha over theirs, until no
    further one falls.
    """
    left = dict(estimators)
    failed: set[str] = set()
    while left:
        confidence = 1 - 2 * ALPHA / len(left)
        fallen = set()
        for group, estimate in left.items():
            if not bound.keeps(bound.best_of(estimate(confidence=confidence))):
                fallen.add(group)
        if not fallen:
            break
        failed |= fallen
        for group in fallen:
            del left[group]
    return failed


def _line(bound: Bound, group: str, estimate: Estimate, verdict: str) -> dict[str, Any]:
    return {
        "name": bound.name,
        "compared_with": bound.compared_with,
        "group": group,
        "side": bound.side,
        "limit": bound.limit,
        "bound": bound.worst_of(estimate),
        "value": estimate.value,
        "n": estimate.n,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "n_min": bound.n,
        "verdict": verdict,
    }
