"""Estimates with their intervals: every number that reaches a report is one of these.

All intervals are two-sided 95 %. An estimate over no rows has the value None, never 0. Rows whose value is None do not
count towards `n`; they are reported as `n_excluded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000

Value = float | bool | None
Interval = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its interval. `n` rows count, `n_excluded` have no value; `higher_is_better` None: neither."""

    value: float | None
    n: int
    n_excluded: int = 0
    ci_low: float | None = None
    ci_high: float | None = None
    unit: str = ""
    higher_is_better: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `after - before` over the same rows. `gained` and `lost` count the rows that went up and down.

    `p_value`: exact two-sided McNemar test, None for values that are not 0 or 1.
    """

    value: float | None
    n: int
    n_excluded: int = 0
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    gained: int = 0
    lost: int = 0
    unit: str = ""
    higher_is_better: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def proportion(
    successes: int, n: int, *, n_excluded: int = 0, unit: str = "proportion", higher_is_better: bool | None = None
) -> Estimate:
    """Share of successes with Wilson's interval, which keeps its coverage near 0 and 1 where Wald's does not."""
    low, high = _wilson(successes, n) if n else (None, None)
    return Estimate(successes / n if n else None, n, n_excluded, low, high, unit, higher_is_better)


def proportion_of(values: Sequence[bool | None], *, higher_is_better: bool | None = None) -> Estimate:
    """`proportion` of the true values; None is excluded."""
    present = [bool(value) for value in values if value is not None]
    excluded = len(values) - len(present)
    return proportion(sum(present), len(present), n_excluded=excluded, higher_is_better=higher_is_better)


def mean_estimate(values: Sequence[Value], *, unit: str, higher_is_better: bool | None = None) -> Estimate:
    """Mean with Student's t interval; one value has no interval."""
    present = np.asarray([value for value in values if value is not None], dtype=float)
    n = len(present)
    value = float(present.mean()) if n else None
    low = high = None
    if value is not None and n > 1:
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * present.std(ddof=1) / n**0.5)
        low, high = value - reach, value + reach
    return Estimate(value, n, len(values) - n, low, high, unit, higher_is_better)


def bootstrap_estimate(
    *samples: Sequence[float], statistic: Callable[..., Any], unit: str, n_excluded: int = 0, seed: int = 0
) -> Estimate:
    """A statistic with its percentile bootstrap interval: rows are resampled, then the statistic is computed again.

    Several `samples` are columns of the same rows and are resampled together. `statistic(*samples, axis)` works along
    an axis, as `numpy.median` does.
    """
    columns = [np.asarray(sample, dtype=float) for sample in samples]
    n = len(columns[0])
    value = float(statistic(*columns, axis=-1)) if n else None
    low, high = _percentile_interval(columns, statistic, seed)
    return Estimate(value, n, n_excluded, low, high, unit)


def paired_difference(
    before: Sequence[Value], after: Sequence[Value], *, unit: str = "proportion", higher_is_better: bool | None = None
) -> PairedDifference:
    """Compare two systems on the same rows, in the same order; a row without both values is excluded.

    The interval is the percentile bootstrap over rows. Where all 0/1 rows differ alike (usually: none differs) that
    would be a single point however few rows there are, so Wilson's bound on the share of rows that could still differ
    is used. Raises ValueError if the lengths differ.
    """
    pairs = [(float(b), float(a)) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    n, excluded = len(pairs), len(before) - len(pairs)
    if n == 0:
        return PairedDifference(None, 0, excluded, unit=unit, higher_is_better=higher_is_better)
    differences = np.asarray([a - b for b, a in pairs])
    value, gained, lost = float(differences.mean()), int((differences > 0).sum()), int((differences < 0).sum())
    binary = all(x in (0.0, 1.0) for pair in pairs for x in pair)
    low: float | None
    high: float | None
    if binary and gained in (0, n) and lost in (0, n):
        reach = _wilson(0, n)[1] * (1 + abs(value))
        low, high = max(-1.0, value - reach), min(1.0, value + reach)
    else:
        low, high = _percentile_interval([differences], np.mean)
    discordant = gained + lost
    p_value = (float(stats.binomtest(gained, discordant).pvalue) if discordant else 1.0) if binary else None
    return PairedDifference(value, n, excluded, low, high, p_value, gained, lost, unit, higher_is_better)


def _wilson(successes: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _percentile_interval(columns: Sequence[Any], statistic: Callable[..., Any], seed: int = 0) -> Interval:
    if len(columns[0]) < 2:
        return None, None
    result = stats.bootstrap(
        columns,
        statistic,
        paired=len(columns) > 1,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
