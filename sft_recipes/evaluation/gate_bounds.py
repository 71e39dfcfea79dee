"""A bound of the gate, and whether its numbers can decide anything.

A line is refused unless, with the `n` rows that it asks for, a model could fail it and a model
could pass it: the best and the worst values that its metric can have are put into the line's own
statistic. So nobody passes a gate by writing limits that no answer could miss.
"""

import math
import typing
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from sft_recipes.evaluation.format_overfitting import FORMAT_METRICS
from sft_recipes.evaluation.metrics import METRICS, flag_share
from sft_recipes.evaluation.questions import Indicator
from sft_recipes.evaluation.retention import RETENTION_METRICS, least_prompts
from sft_recipes.evaluation.safety import SAFETY_METRICS
from sft_recipes.statistics import Estimate, mean_estimate, mean_of_differences

ALPHA = 0.05
SMOKE_ROWS = 50
# Judged from values of their own, not from the metrics of rows.
INDICATORS: Mapping[str, Indicator] = {
    **FORMAT_METRICS,
    **SAFETY_METRICS,
    **RETENTION_METRICS,
}
# What more rows than these could show, no evaluation is going to.
_MOST_ROWS = 100_000

# An estimate as a function of its values and its `confidence`.
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
    def side(self) -> str:
        """The key of its limit."""
        return "at_most" if self.at_least is None else "at_least"

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


class Fault(NamedTuple):
    """What is wrong with a line of a gate, and with which of its keys, "" for the line."""

    key: str
    what: str
    fix: str


class _Reach(NamedTuple):
    """The ends between which everything lies that a line can be about."""

    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"above {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


def estimator_of(bound: Bound) -> Estimator:
    """How one number is made of the values that a line is about."""
    if bound.metric in INDICATORS:
        return INDICATORS[bound.metric].estimate
    metric = METRICS.get(bound.metric)
    if not bound.compared_with:
        return metric.estimate if metric else flag_share
    # A mean of anything but scores from 0 to 1, which the adjusted interval is for.
    if metric and metric.is_unbounded_mean:
        return partial(mean_estimate, unit="difference")
    return mean_of_differences


def faults_of_numbers(bound: Bound, says_n: bool) -> Iterator[Fault]:
    """What is wrong with the limit, or with `n` where the line says one."""
    reach = _reach(bound)
    fix = f"write a number {reach}"
    if bound.keeps(_worst(bound, reach)):
        what = f"nothing could fail {bound.limit:g}: {bound.name} lies {reach}"
        yield Fault(bound.side, what, fix)
        return
    least = least_rows(bound)
    if not bound.keeps(_best(bound, reach)) or least > _MOST_ROWS:
        what = f"nothing could pass {bound.limit:g}: the bound of {bound.name} stays {reach}"
        yield Fault(bound.side, what, fix)
    elif says_n and bound.n < least:
        what = "so few rows cannot decide it, whatever is answered to them"
        fix = f"write n: {least} or more"
        if bound.metric in RETENTION_METRICS:
            what = "so few prompts cannot tell such a loss from none"
            fix += " and bring as many: --retention_data FILE; or raise the limit"
        yield Fault("n", what, fix)


def least_rows(bound: Bound) -> int:
    """From how many rows on a line can be passed and failed."""
    reach = _reach(bound)
    metric = METRICS.get(bound.metric)
    is_resampled = metric is not None and not metric.is_mean_of_rows
    if is_resampled or not math.isfinite(reach.high):
        return 2  # an interval needs two

    def is_decided_by(n: int) -> bool:
        return _can_pass(bound, _best(bound, reach), n) and _can_fail(
            bound, _worst(bound, reach), n
        )

    least = 1 + bisect_left(range(1, _MOST_ROWS + 1), True, key=is_decided_by)
    if bound.metric in RETENTION_METRICS:
        return max(least, least_prompts(bound.limit))
    return least


def _can_pass(bound: Bound, best: float, n: int) -> bool:
    estimate = estimator_of(bound)([best] * n, confidence=1 - 2 * ALPHA)
    return estimate.ci_low is not None and bound.keeps(bound.worst_of(estimate))


def _can_fail(bound: Bound, worst: float, n: int) -> bool:
    estimate = estimator_of(bound)([worst] * n, confidence=1 - 2 * ALPHA)
    return estimate.ci_low is not None and not bound.keeps(bound.best_of(estimate))


def _reach(bound: Bound) -> _Reach:
    if bound.metric in INDICATORS:
        indicator = INDICATORS[bound.metric]
        return _Reach(indicator.low, indicator.high)
    own = _Reach(0.0, 1.0)
    if bound.metric:
        metric = METRICS[bound.metric]
        own = _Reach(metric.low, metric.high)
    if bound.compared_with:
        return _Reach(own.low - own.high, own.high - own.low)
    return own


def _best(bound: Bound, reach: _Reach) -> float:
    return reach.low if bound.at_least is None else reach.high


def _worst(bound: Bound, reach: _Reach) -> float:
    return reach.high if bound.at_least is None else reach.low
