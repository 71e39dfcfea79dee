"""The gate: bounds written down beforehand, judged by one-sided 95 % bounds computed from the rows.

    gate:
      - {metric: completion_rate, at_least: 0.95, n: 300}
      - {metric: exact_match, by: task_type, compared_with: base, at_least: -0.05, n: 100}
      - {flag: template_leak, at_most: 0.01, n: 300}

A line passes if the bound on the bad side of its value keeps the limit, fails if the bound on the
good side violates it, and is inconclusive in between. Shares have Wilson's bound, means Student's
t, medians and ratios the bootstrap, paired differences Bonett and Price's. Under `by` all groups
have to pass, which needs no correction; that any of them fails is decided by Holm's procedure.
"""

import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation.answer import FLAGS
from sft_recipes.evaluation.evaluator import Evaluation, by_task_type, check_same_rows
from sft_recipes.evaluation.format_overfitting import FORMAT_METRICS
from sft_recipes.evaluation.metrics import METRICS, flag_share, flagged
from sft_recipes.evaluation.questions import Indicator
from sft_recipes.evaluation.safety import LEAST_PROMPTS, SAFETY_METRICS
from sft_recipes.recipe import read_yaml
from sft_recipes.recipe_checks import fits_type
from sft_recipes.statistics import Estimate, Value, mean_estimate, mean_of_differences

ALPHA = 0.05
# So that a report cannot be gated on whatever looks good in it.
MOST_BOUNDS = 8
SMOKE_ROWS = 50
EXAMPLE = (
    "write it as in {metric: exact_match, by: task_type, compared_with: base, "
    "at_least: -0.05, n: 100}"
)
# Judged from values of their own, not from the metrics of rows.
INDICATORS: Mapping[str, Indicator] = {**FORMAT_METRICS, **SAFETY_METRICS}
# The worst first: a gate is as good as its worst line.
EXIT_CODES = {
    "fail": 1,
    "insufficient_n": 4,
    "inconclusive": 4,
    "pass": 0,
}

# An estimate as a function of its `confidence`.
Estimator = Callable[..., Estimate]


@dataclass(frozen=True, slots=True)
class Bound:
    """One line of a gate: a metric or flag and a limit; fewer than `n` rows decide nothing."""

    metric: str = ""
    flag: str = ""
    at_least: float | None = None
    at_most: float | None = None
    compared_with: Literal["base"] | None = None
    by: Literal["task_type"] | None = None
    n: int = SMOKE_ROWS

    @property
    def name(self) -> str:
        """What it is about, as the report calls it."""
        return self.metric or f"flag {self.flag}"

    @property
    def limit(self) -> float:
        """The number that is kept or violated."""
        return typing.cast(float, self.at_most if self.at_least is None else self.at_least)

    def keeps(self, value: float) -> bool:
        """Whether `value` is on the good side of the limit."""
        if self.at_least is not None:
            return value >= self.at_least
        return value <= self.limit

    def worst_of(self, estimate: Estimate) -> float:
        """The end of the interval on the bad side; there is one where rows are enough."""
        end = estimate.ci_high if self.at_least is None else estimate.ci_low
        return typing.cast(float, end)

    def best_of(self, estimate: Estimate) -> float:
        """The end of the interval on the good side; there is one where rows are enough."""
        end = estimate.ci_low if self.at_least is None else estimate.ci_high
        return typing.cast(float, end)


class _Fault(NamedTuple):
    """What is wrong with a line of a gate, and with which of its keys, "" for the line."""

    key: str
    what: str
    fix: str


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
        for fault in _misfits(entry) or _faults(Bound(**entry)):
            field = f"gate[{index}]"
            if fault.key:
                field += f".{fault.key}"
            problems.append(Problem(where, field, fault.what, fault.fix))
    if problems:
        raise InputError(problems)
    return [Bound(**entry) for entry in entries]


def _misfits(entry: Any) -> list[_Fault]:
    """Everything in a line that has not the form of a bound."""
    if not isinstance(entry, dict):
        return [_Fault("", f"expected a mapping, got {entry!r}", EXAMPLE)]
    types = typing.get_type_hints(Bound)
    unknown = []
    misfits = []
    for key, value in entry.items():
        if key not in types:
            unknown.append(_Fault(str(key), "unknown key", suggest(str(key), types)))
        elif not fits_type(value, types[key]):
            misfits.append(_Fault(key, f"{value!r} does not fit", EXAMPLE))
    return unknown + misfits


def _faults(bound: Bound) -> list[_Fault]:
    """Everything that makes no sense in a bound."""
    return [*_faults_of_form(bound), *_faults_of_name(bound)]


def _faults_of_form(bound: Bound) -> Iterator[_Fault]:
    if bool(bound.metric) == bool(bound.flag):
        yield _Fault("", "needs one metric or one flag", EXAMPLE)
    has_one_limit = (bound.at_least is None) != (bound.at_most is None)
    if not has_one_limit or not math.isfinite(bound.limit):
        fix = "write a line for each limit"
        yield _Fault("", "needs one number as at_least or at_most", fix)
    if bound.n < 1:
        yield _Fault("n", "no row would be enough", EXAMPLE)


def _faults_of_name(bound: Bound) -> Iterator[_Fault]:
    name = bound.metric
    metric = METRICS.get(name)
    if name in SAFETY_METRICS and bound.n < LEAST_PROMPTS:
        fix = f"write n: {LEAST_PROMPTS} or more"
        yield _Fault("n", "fewer prompts of a kind decide nothing", fix)
    if name and metric is None and name not in INDICATORS:
        known = [*METRICS, *INDICATORS]
        yield _Fault("metric", f"unknown metric {name!r}", suggest(name, known))
    if bound.flag and bound.flag not in FLAGS:
        yield _Fault("flag", f"unknown flag {bound.flag!r}", suggest(bound.flag, FLAGS))
    if name in INDICATORS and (bound.compared_with or bound.by):
        fix = "remove compared_with and by"
        yield _Fault("metric", f"{name} has its own comparison", fix)
    if metric is not None and bound.compared_with and not metric.is_mean_of_rows:
        yield _Fault("compared_with", f"{name} is no mean of rows", "remove it")


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
) -> dict[str, Any]:
    """The verdict of the gate and of each line, as plain data; `values` holds those of INDICATORS.

    `bound` is the one-sided bound on the bad side of `value`; `ci_low` and `ci_high` are the bounds
    on both sides. Raises InputError unless the base answered the same rows.
    """
    if base is not None:
        check_same_rows(base, tuned)
    lines: list[dict[str, Any]] = []
    for bound in bounds:
        if bound.metric in INDICATORS:
            estimate = INDICATORS[bound.metric].estimate
            estimators: dict[str, Estimator] = {
                "": partial(estimate, (values or {})[bound.metric]),
            }
        else:
            estimators = _estimators(bound, tuned, base)
        lines += _judge(bound, estimators)
    verdict = min((line["verdict"] for line in lines), key=list(EXIT_CODES).index)
    return {
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "smoke": len(tuned.rows) < SMOKE_ROWS,
        "lines": lines,
    }


def _estimators(bound: Bound, tuned: Evaluation, base: Evaluation | None) -> dict[str, Estimator]:
    """The estimators by group; without `by` there is one group without a name."""
    values = _row_values(bound, tuned)
    estimate = _estimate_of(bound)
    if bound.compared_with and base:
        values = _differences(_row_values(bound, base), values)
    if not bound.by:
        return {"": partial(estimate, values)}
    # Groups that do not exist have decided nothing.
    groups = by_task_type(tuned.rows, values) or {"": []}
    return {group: partial(estimate, own) for group, own in groups.items()}


def _estimate_of(bound: Bound) -> Estimator:
    metric = METRICS.get(bound.metric)
    if not bound.compared_with:
        return metric.estimate if metric else flag_share
    # A mean of anything but scores from 0 to 1, which the adjusted interval is for.
    if metric and metric.is_unbounded_mean:
        return partial(mean_estimate, unit="difference")
    return mean_of_differences


def _row_values(bound: Bound, evaluation: Evaluation) -> list[Any]:
    if bound.flag:
        return flagged(evaluation.rows, bound.flag)
    return METRICS[bound.metric].of_rows(evaluation.rows)


def _differences(before: Sequence[Any], after: Sequence[Any]) -> list[float | None]:
    differences: list[float | None] = []
    for old, new in zip(before, after, strict=True):
        is_known = old is not None and new is not None
        differences.append(float(new) - float(old) if is_known else None)
    return differences


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
        "side": "at_most" if bound.at_least is None else "at_least",
        "limit": bound.limit,
        "bound": bound.worst_of(estimate),
        "value": estimate.value,
        "n": estimate.n,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "n_min": bound.n,
        "verdict": verdict,
    }
