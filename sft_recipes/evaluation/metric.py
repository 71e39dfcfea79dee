"""What a metric is: its words, its value for one answer, and how the values of prompts become one number.

The metrics themselves stand in `metrics.py`. No torch here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.prompts import Row, values_of_prompts
from sft_recipes.statistics import (
    CONFIDENCE,
    Estimate,
    bootstrap_estimate,
    mean_estimate,
    proportion_of,
)

Measure = Callable[[Answer], Any]
Statistic = Callable[[Sequence[Any], float], Estimate]

# The headings of the report, in its order.
TASK = "Task and form"
LENGTH = "Length"
REPETITION = "Repetition and openers"
CHAPTER = "The chapter's own: report only, never gated on"
BUDGET = "Token budget"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its words, its value of an answer, and its number over rows.

    `measure` gives an answer's value, None where the answer does not count; it is stored in a row
    under `column` (a row is `complete`, the rate over rows is `completion_rate`). `statistic` makes
    one number of the values. `headline`: compared between systems pair by pair and drawn, all of
    them scores from 0 to 1 that are better when higher. `higher_is_better` None: neither is better.
    `low` and `high`: no value lies beyond. `combine` makes the value of a prompt from its rows'.

    `unit`: of the number, as reports print it. `share` in the unit that is the default makes a
    metric yes or no: `measure` gives true or false. Scores between 0 and 1 name a unit of their
    own. `group`: the heading under which the report shows it; metrics of a group stand together.
    """

    name: str
    label: str
    definition: str
    measure: Measure
    statistic: Statistic
    column: str = ""
    unit: str = "proportion"
    higher_is_better: bool | None = None
    group: str = TASK
    headline: bool = False
    low: float = 0.0
    high: float = 1.0
    combine: Callable[[Sequence[Any]], Any] = fmean

    @property
    def key(self) -> str:
        """Where a row holds the value."""
        return self.column or self.name

    @property
    def is_yes_or_no(self) -> bool:
        """Whether every row's value is true or false: a `share` in the default unit.

        `benchmarks/gate_faults.py` makes a count of rows of such a number again.
        """
        return self.statistic is share and self.unit == "proportion"

    @property
    def is_mean_of_rows(self) -> bool:
        """Whether the difference between two systems is the mean of the rows' differences.

        The gate refuses `compared_with` for any other.
        """
        return self.statistic is share or self.statistic is mean

    @property
    def is_unbounded_mean(self) -> bool:
        """Whether it is a mean whose values may lie beyond 0 and 1.

        The gate compares such means with Student's interval, all others with one for scores.
        """
        return self.statistic is mean

    def of_rows(self, rows: Sequence[Row]) -> list[Any]:
        """The values of scored rows, None where a row has none."""
        return [row.get(self.key) for row in rows]

    def of_prompts(self, rows: Sequence[Row]) -> list[Any]:
        """The values of the prompts of scored rows, which is what an estimate is made of."""
        return values_of_prompts(rows, self.of_rows(rows), self.combine)

    def estimate(self, values: Sequence[Any], confidence: float = CONFIDENCE) -> Estimate:
        """The number over prompts with its interval; None is excluded and counted."""
        estimate = self.statistic(values, confidence)
        return replace(
            estimate,
            n_excluded=len(values) - estimate.n,
            unit=self.unit,
            higher_is_better=self.higher_is_better,
        )

    def describe(self, estimate: Estimate) -> dict[str, Any]:
        """The estimate as plain data, with the words that a reader needs beside it."""
        return {
            **estimate.as_json(),
            "label": self.label,
            "definition": self.definition,
            "group": self.group,
            "headline": self.headline,
        }


def share(values: Sequence[Any], confidence: float) -> Estimate:
    """Mean of values in [0, 1] with Wilson's interval.

    For scores between 0 and 1 it is wider than need be, but it keeps its coverage where nearly all
    of them are 0 or 1.
    """
    return proportion_of(values, confidence=confidence)


def mean(values: Sequence[Any], confidence: float) -> Estimate:
    """Mean with Student's t interval."""
    return mean_estimate(values, unit="", confidence=confidence)


def median(values: Sequence[Any], confidence: float) -> Estimate:
    """Median with the percentile bootstrap."""
    return bootstrap_estimate(_known(values), statistic=np.median, unit="", confidence=confidence)


def evenness(values: Sequence[Any], confidence: float) -> Estimate:
    """Entropy of the texts over that of n different ones: 0 all alike, 1 all different."""
    codes = np.unique(_known(values), return_inverse=True)[1]
    return bootstrap_estimate(
        codes.tolist(),
        statistic=_evenness_of_codes,
        unit="",
        centred=True,
        confidence=confidence,
    )


def _known(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _evenness_of_codes(codes: Any, axis: int) -> Any:
    """Evenness along an axis of numbers 0, 1, 2 ... that stand for texts."""
    return np.apply_along_axis(lambda row: _evenness(np.bincount(row.astype(int))), axis, codes)


def _evenness(counts: Any) -> float:
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    # The sign of a zero would be printed.
    return float(abs(entropy) / math.log(max(counts.sum(), 2)))
