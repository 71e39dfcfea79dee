"""Estimates with their intervals: every number that reaches a report is one of these.

Intervals are two-sided, 95 % unless `confidence` says otherwise; the ends of a 90 % interval are the two one-sided 95 %
bounds. An estimate over no rows has the value None, never 0. Rows whose value is None do not count towards `n`; they
are reported as `n_excluded`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
BOOTSTRAP: Mapping[str, Any] = {
    "vectorized": True,
    "n_resamples": 2000,
    "batch": 100,
    "method": "percentile",
}

Value = float | bool | None


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

    as_json = dataclasses.asdict  # plain data


@dataclass(frozen=True, slots=True)
class PairedDifference(Estimate):
    """Mean of `after - before` over the same rows. `gained` and `lost` count the rows that went up and down.

    `p_value`: exact two-sided McNemar test, None for values that are not 0 or 1.
    """

    p_value: float | None = None
    gained: int = 0
    lost: int = 0


def proportion(successes: float, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """Share of successes with Wilson's interval, which keeps its coverage near 0 and 1 where Wald's does not.

    Rows may succeed in part (a share of several answers): their variance is at most that of whole successes.
    """
    if not n:
        return Estimate(None, 0, unit="proportion")
    # Written out because scipy's takes whole successes only.
    share, z = successes / n, float(stats.norm.ppf((1 + confidence) / 2))
    centre, reach = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((centre + sign * reach) / (1 + z**2 / n) for sign in (-1, 1))
    return Estimate(
        share, n, 0, low if successes else 0.0, high if successes < n else 1.0, "proportion"
    )


def proportion_of(
    values: Sequence[Value], *, higher_is_better: bool | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """`proportion` of values in [0, 1], usually true or false; None is excluded."""
    present = [value for value in values if value is not None]
    found = proportion(sum(present), len(present), confidence=confidence)
    return dataclasses.replace(
        found, n_excluded=len(values) - len(present), higher_is_better=higher_is_better
    )


def mean_estimate(
    values: Sequence[Value], *, unit: str, confidence: float = CONFIDENCE
) -> Estimate:
    """Mean with Student's t interval; one value has no interval."""
    present = np.asarray([value for value in values if value is not None], dtype=float)
    n = len(present)
    value = float(present.mean()) if n else None
    low = high = None
    if value is not None and n > 1:
        reach = float(stats.t.ppf((1 + confidence) / 2, n - 1) * present.std(ddof=1) / n**0.5)
        low, high = value - reach, value + reach
    return Estimate(value, n, len(values) - n, low, high, unit)


def mean_of_differences(values: Sequence[Value], *, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of per-row differences between two scores in [0, 1], with Bonett and Price's adjusted interval (2012).

    Two rows, one better by 1 and one worse, are added for the interval only. Where few rows differ, that keeps the
    one-sided 95 % bound within 9 % misses; the percentile bootstrap misses up to 55 % there (simulated, n 60 to 600).
    """
    own = mean_estimate(values, unit="difference")
    if own.value is None:
        return own
    adjusted = np.append([value for value in values if value is not None], [1.0, -1.0])
    reach = float(stats.norm.ppf((1 + confidence) / 2) * adjusted.std() / len(adjusted) ** 0.5)
    centre, edge = float(adjusted.mean()), float(abs(adjusted).max())
    # The centre lies towards 0; the interval holds the value itself all the same, and nothing that cannot be.
    low, high = min(centre - reach, own.value), max(centre + reach, own.value)
    return dataclasses.replace(own, ci_low=max(low, -edge), ci_high=min(high, edge))


def bootstrap_estimate(
    *samples: Sequence[float],
    statistic: Callable[..., Any],
    unit: str,
    centred: bool = False,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic with its percentile bootstrap interval: rows are resampled, then the statistic is computed again.

    Several `samples` are columns of the same rows and are resampled together. `statistic(*samples, axis)` works along
    an axis, as `numpy.median` does. `centred` is for statistics in [0, 1] that depend on how often rows repeat (the
    share of the most frequent text): resampling repeats rows, so the interval is moved until the mean resample is the
    value.
    """
    columns = [np.asarray(sample, dtype=float) for sample in samples]
    n = len(columns[0])
    value = float(statistic(*columns, axis=-1)) if n else None
    if value is None or n < 2:
        return Estimate(value, n, unit=unit)
    settings = {
        "paired": len(columns) > 1,
        "confidence_level": confidence,
        "rng": np.random.default_rng(seed),
    }
    result = stats.bootstrap(columns, statistic, **settings, **BOOTSTRAP)
    low, high = map(float, result.confidence_interval)
    if centred:
        shift = value - float(result.bootstrap_distribution.mean())
        low, high = max(low + shift, 0.0), min(high + shift, 1.0)
    return Estimate(value, n, 0, low, high, unit)


def paired_difference(
    before: Sequence[Value],
    after: Sequence[Value],
    *,
    unit: str = "proportion",
    higher_is_better: bool | None = None,
) -> PairedDifference:
    """Compare two systems on the same rows, in the same order; a row without both values is excluded.

    The interval is that of `mean_of_differences` for values of 0 and 1, and where no row differs, which is no proof of
    equality; else the percentile bootstrap over rows. Raises ValueError if the lengths differ.
    """
    pairs = [
        (float(b), float(a))
        for b, a in zip(before, after, strict=True)
        if b is not None and a is not None
    ]
    differences = [a - b for b, a in pairs]
    gained, lost = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    binary = all(x in (0.0, 1.0) for pair in pairs for x in pair)
    if binary or not gained + lost:
        found = mean_of_differences(differences)
    else:
        found = bootstrap_estimate(differences, statistic=np.mean, unit=unit)
    p_value = sign_test(gained, gained + lost) if binary and pairs else None
    ends, excluded = (found.ci_low, found.ci_high), len(before) - len(pairs)
    return PairedDifference(
        found.value, found.n, excluded, *ends, unit, higher_is_better, p_value, gained, lost
    )


def sign_test(successes: int, n: int) -> float:
    """Exact two-sided p-value of so many successes where each is as likely as not; on rows that differ, McNemar's."""
    return float(stats.binomtest(successes, n).pvalue) if n else 1.0
