"""Known answers for every estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sft_recipes.statistics import (
    bootstrap_estimate,
    mean_estimate,
    mean_of_differences,
    paired_difference,
    proportion,
    proportion_of,
    ratio_estimate,
)


def test_proportion_has_wilsons_interval() -> None:
    """8 of 10 has the textbook Wilson interval 0.490 to 0.943."""
    estimate = proportion_of([True] * 8 + [False] * 2, higher_is_better=True)
    assert estimate.value == 0.8
    assert (estimate.ci_low, estimate.ci_high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert estimate.as_json() == {
        "value": 0.8,
        "n": 10,
        "n_excluded": 0,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "unit": "proportion",
        "higher_is_better": True,
    }


def test_all_successes_still_leave_doubt() -> None:
    """Wilson's bound for 50 of 50 is n / (n + z^2), not 1."""
    estimate = proportion(50, 50)
    assert estimate.ci_low == pytest.approx(50 / (50 + 1.959964**2), abs=1e-6)
    assert estimate.ci_high == pytest.approx(1.0)


@pytest.mark.parametrize(
    "estimate",
    [
        proportion(0, 0),
        proportion_of([None, None]),
        mean_estimate([None], unit="x"),
        mean_of_differences([None]),
        bootstrap_estimate([], statistic=np.median, unit="x"),
        paired_difference([None], [True]),
    ],
)
def test_no_rows_give_no_value(estimate) -> None:
    """n = 0 has value None and no interval, never 0."""
    assert (estimate.value, estimate.n, estimate.ci_low, estimate.ci_high) == (None, 0, None, None)


def test_excluded_rows_are_counted_apart() -> None:
    """None does not count as a failure."""
    estimate = proportion_of([True, None, False, True])
    assert (estimate.value, estimate.n, estimate.n_excluded) == (2 / 3, 3, 1)


def test_mean_has_students_interval() -> None:
    """1, 2, 3: mean 2, sd 1, t(2) = 4.3027, so 2 +- 4.3027 / sqrt(3)."""
    estimate = mean_estimate([1.0, 2.0, 3.0, None], unit="words")
    reach = 4.302653 / 3**0.5
    assert (estimate.value, estimate.n, estimate.n_excluded, estimate.unit) == (2.0, 3, 1, "words")
    assert (estimate.ci_low, estimate.ci_high) == (
        pytest.approx(2 - reach),
        pytest.approx(2 + reach),
    )


def test_a_ratio_is_of_sums() -> None:
    """6 + 2 of 2 + 4 tokens is 8/6; the interval is Student's with the error of a ratio of two sums, by hand."""
    estimate = ratio_estimate([6.0, 2.0], [2, 4], unit="nats a token")
    assert estimate.value == pytest.approx(8 / 6) and estimate.n == 2
    # Residuals 6 - 2 x 4/3 = 10/3 and 2 - 4 x 4/3 = -10/3; t of one degree of freedom is 12.706.
    reach = 12.7062 * (2 * (10 / 3) ** 2 * 2) ** 0.5 / 6
    assert estimate.ci_high == pytest.approx(8 / 6 + reach, rel=1e-4)
    assert estimate.ci_low == pytest.approx(8 / 6 - reach, rel=1e-4)


def test_a_ratio_of_equal_sizes_is_a_mean() -> None:
    """Rows of one size have the mean's value and interval; no rows, and no tokens, have none."""
    values = [0.5, 1.5, 1.0, 3.0]
    ratio = ratio_estimate([2 * value for value in values], [2] * 4, unit="x")
    mean = mean_estimate(values, unit="x")
    assert ratio.value == mean.value
    assert (ratio.ci_low, ratio.ci_high) == pytest.approx((mean.ci_low, mean.ci_high))
    assert ratio_estimate([], [], unit="x").value is None
    assert ratio_estimate([0.0], [0], unit="x").value is None
    assert ratio_estimate([3.0], [2], unit="x").ci_low is None


def test_one_value_has_no_interval() -> None:
    """A single row says nothing about spread."""
    assert mean_estimate([2.0], unit="x").ci_low is None
    assert bootstrap_estimate([2.0], statistic=np.median, unit="x").ci_high is None


def test_equal_values_have_a_point_interval() -> None:
    """All equal: mean and median are that value, without NaN."""
    for estimate in (
        mean_estimate([2.0] * 5, unit="x"),
        bootstrap_estimate([2.0] * 5, statistic=np.median, unit="x"),
    ):
        assert (estimate.value, estimate.ci_low, estimate.ci_high) == (2.0, 2.0, 2.0)


def test_bootstrap_of_the_mean_agrees_with_theory_and_is_seeded() -> None:
    """For 400 values the percentile interval of the mean is close to the normal one, and repeats
    itself."""
    values = list(np.random.default_rng(1).normal(5, 2, 400))
    first = bootstrap_estimate(values, statistic=np.mean, unit="x")
    reach = 1.96 * np.std(values) / 20
    assert first.ci_low == pytest.approx(np.mean(values) - reach, abs=0.03)
    assert first.ci_high == pytest.approx(np.mean(values) + reach, abs=0.03)
    assert first == bootstrap_estimate(values, statistic=np.mean, unit="x")
    assert first != bootstrap_estimate(values, statistic=np.mean, unit="x", seed=7)


def test_mcnemar_is_exact_and_two_sided() -> None:
    """9 gained and 1 lost of 20: p = 2 * (1 + 10) / 2^10 = 0.0215, difference 0.4."""
    before = [False] * 9 + [True] + [True] * 10
    after = [True] * 9 + [False] + [True] * 10
    difference = paired_difference(before, after)
    assert (difference.value, difference.gained, difference.lost, difference.n) == (
        pytest.approx(0.4),
        9,
        1,
        20,
    )
    assert difference.p_value == pytest.approx(22 / 1024)
    assert difference.ci_low == pytest.approx(0.15, abs=0.06)
    assert difference.ci_high == pytest.approx(0.65, abs=0.06)


def test_no_discordant_pair_is_no_evidence_of_equality() -> None:
    """p = 1, and the interval is that of one row up and one down among n + 2, z * sqrt(2) / (n +
    2), not a point."""
    for before, after in (([True] * 20, [True] * 20), ([0.3] * 20, [0.3] * 20)):
        difference = paired_difference(before, after)
        bound = 1.959964 * 2**0.5 / 22
        assert (difference.value, difference.p_value) == (0.0, 1.0 if before[0] is True else None)
        assert (difference.ci_low, difference.ci_high) == (
            pytest.approx(-bound),
            pytest.approx(bound),
        )


def test_all_gained_stays_inside_the_scale() -> None:
    """A difference of 1 in every row has an upper bound of 1 and a lower bound below it, by the
    rows added."""
    difference = paired_difference([False] * 20, [True] * 20)
    assert difference.ci_high == 1.0
    assert difference.ci_low == pytest.approx(
        20 / 22 - 1.959964 * ((1 - (20 / 22) ** 2) / 22) ** 0.5
    )


def test_the_table_and_the_gate_agree_on_paired_differences() -> None:
    """For values of 0 and 1 the interval is that of `mean_of_differences`, which the gate takes its
    bounds from."""
    before, after = [False] * 7 + [True] * 13, [True] * 12 + [False] * 8
    difference = paired_difference(before, after)
    expected = mean_of_differences(
        [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    )
    assert (difference.gained, difference.lost, difference.value) == (7, 8, expected.value)
    assert (difference.ci_low, difference.ci_high) == (expected.ci_low, expected.ci_high)


def test_graded_pairs_have_no_mcnemar_test() -> None:
    """Values between 0 and 1 are compared by their mean difference only; a row without a partner is
    excluded."""
    difference = paired_difference([0.5, 0.2, None], [0.7, 0.6, 1.0])
    assert difference.value == pytest.approx(0.3)
    assert (difference.p_value, difference.n, difference.n_excluded) == (None, 2, 1)


def test_graded_differences_have_the_bootstraps_interval() -> None:
    """Half the rows 0.2 up, half unchanged: the mean is 0.1 and the interval that of a share of
    0.5, times 0.2."""
    difference = paired_difference([0.5] * 100, [0.7] * 50 + [0.5] * 50)
    assert difference.value == pytest.approx(0.1)
    assert (difference.gained, difference.lost) == (50, 0)
    reach = 0.2 * 1.96 * (0.25 / 100) ** 0.5
    assert difference.ci_low == pytest.approx(0.1 - reach, abs=0.004)
    assert difference.ci_high == pytest.approx(0.1 + reach, abs=0.004)


def test_a_centred_interval_holds_its_value() -> None:
    """A resample of n different rows holds 63 % of them; the centred interval is around the value
    all the same."""

    def distinct(codes: Any, axis: int) -> Any:
        return np.apply_along_axis(lambda one: len(np.unique(one)) / len(one), axis, codes)

    plain, centred = (
        bootstrap_estimate(range(50), statistic=distinct, unit="x", centred=way)
        for way in (False, True)
    )
    assert plain.value == centred.value == 1.0
    assert plain.ci_high is not None and plain.ci_high < 0.8
    assert centred.ci_high == 1.0
    assert centred.ci_low == pytest.approx(1 - (0.634 - plain.ci_low), abs=0.01)


def test_pairs_of_different_length_are_refused() -> None:
    """Pairing rows of two lists that do not belong together is a mistake of the caller."""
    with pytest.raises(ValueError, match="zip"):
        paired_difference([True], [True, False])


def test_differences_have_bonett_and_prices_interval() -> None:
    """Three of ten rows up, one down: the normal interval after adding one of each; all equal rows
    leave doubt, too."""
    estimate = mean_of_differences([1, 1, 1, -1, 0, 0, 0, 0, 0, 0, None], confidence=0.9)
    centre = (4 - 2) / 12
    reach = 1.6448536 * (((4 + 2) / 12 - centre**2) / 12) ** 0.5
    assert (estimate.value, estimate.n, estimate.n_excluded) == (0.2, 10, 1)
    assert (estimate.ci_low, estimate.ci_high) == (
        pytest.approx(centre - reach),
        pytest.approx(centre + reach),
    )
    equal = mean_of_differences([1.0] * 50)
    assert equal.value == equal.ci_high == 1.0 and equal.ci_low == pytest.approx(
        50 / 52 - 1.959964 * ((1 - (50 / 52) ** 2) / 52) ** 0.5
    )


def test_a_90_percent_interval_has_the_one_sided_95_percent_bounds() -> None:
    """Zero of 300: Wilson's one-sided bound is z^2 / (n + z^2) with z of 95 %; parts of successes
    count as such."""
    assert proportion(0, 300, confidence=0.9).ci_high == pytest.approx(
        1.6448536**2 / (300 + 1.6448536**2)
    )
    assert proportion_of([1 / 3] * 3 + [0.0] * 7) == proportion(1.0, 10)


SIMULATED = 1500
# How far the share of intervals that hold the truth may lie below 95 % by chance, with a
# probability of 1 in 1,000.
SLACK = 3.09 * (0.95 * 0.05 / SIMULATED) ** 0.5


def coverage(
    draw: Callable[[Any], Any], interval: Callable[[Any], Any], truth: float, simulated: int
) -> float:
    """The share of drawn samples whose interval holds the truth."""
    rng = np.random.default_rng(0)
    found = [interval(draw(rng)) for _ in range(simulated)]
    return float(np.mean([one.ci_low - 1e-12 <= truth <= one.ci_high + 1e-12 for one in found]))


def paired(draws: Any) -> Any:
    """The comparison of two systems that differ by `draws` (-1, 0 or 1) in each row."""
    return paired_difference((draws < 0).tolist(), (draws > 0).tolist())


def losses_of_rows(rng: Any) -> Any:
    """Of 100 rows the sum of losses and the tokens: 1 to 39 tokens, each row's mean loss 1 on average."""
    tokens = rng.integers(1, 40, 100)
    return np.stack([rng.gamma(4, 0.25, 100) * tokens, tokens])


# Each: how a sample is drawn, its interval, the truth, and what the interval is known to fall short
# of 95 % by.
COVERAGE = {
    "wilson, p = .5, n = 100": (
        lambda r: r.random(100) < 0.5,
        lambda x: proportion_of(x.tolist()),
        0.5,
        0.01,
    ),
    "wilson, p = .98, n = 50": (
        lambda r: r.random(50) < 0.98,
        lambda x: proportion_of(x.tolist()),
        0.98,
        0.03,
    ),
    "wilson, p = .99, n = 200": (
        lambda r: r.random(200) < 0.99,
        lambda x: proportion_of(x.tolist()),
        0.99,
        0.01,
    ),
    "wilson, scores": (lambda r: r.beta(4, 1, 60), lambda x: proportion_of(x.tolist()), 0.8, 0.0),
    "mean, normal, n = 8": (
        lambda r: r.normal(3, 1, 8),
        lambda x: mean_estimate(x.tolist(), unit=""),
        3.0,
        0.0,
    ),
    "mean, skewed, n = 100": (
        lambda r: r.gamma(2, 1, 100),
        lambda x: mean_estimate(x.tolist(), unit=""),
        2.0,
        0.02,
    ),
    "ratio, loss a token, n = 100": (
        losses_of_rows,
        lambda x: ratio_estimate(x[0].tolist(), x[1].tolist(), unit=""),
        1.0,
        0.01,
    ),
    "pairs, 10 % up, 5 % down, n = 100": (
        lambda r: r.choice([1, -1, 0], 100, p=[0.1, 0.05, 0.85]),
        paired,
        0.05,
        0.0,
    ),
    "pairs, 2 % up, n = 60": (
        lambda r: r.choice([1, -1, 0], 60, p=[0.02, 0, 0.98]),
        paired,
        0.02,
        0.0,
    ),
    "pairs, 40 % each, n = 60": (
        lambda r: r.choice([1, -1, 0], 60, p=[0.4, 0.4, 0.2]),
        paired,
        0.0,
        0.01,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name: str) -> None:
    """Closed forms: in 1,500 draws 95 % of the intervals hold the truth, less the known shortfall
    and chance."""
    draw, interval, truth, shortfall = COVERAGE[name]
    assert coverage(draw, interval, truth, SIMULATED) >= 0.95 - shortfall - SLACK


def median_of(values: Any) -> Any:
    return bootstrap_estimate(values, statistic=np.median, unit="x")


def graded(values: Any) -> Any:
    return paired_difference([0.0] * len(values), values.tolist())


BOOTSTRAPPED = {
    "median, skewed, n = 101": (lambda r: r.gamma(2, 1, 101), median_of, 1.6783, 0.02),
    "graded differences, n = 100": (lambda r: r.normal(0.1, 0.3, 100), graded, 0.1, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOOTSTRAPPED)
def test_bootstrapped_intervals_hold_the_truth(name: str) -> None:
    """The same for the bootstrap, which takes longer: 400 draws, and so more room for chance."""
    draw, interval, truth, shortfall = BOOTSTRAPPED[name]
    assert (
        coverage(draw, interval, truth, 400) >= 0.95 - shortfall - SLACK * (SIMULATED / 400) ** 0.5
    )


@pytest.mark.slow
def test_walds_interval_would_fail_this_test() -> None:
    """The simulation can tell: Wald's interval for a share of .98 in 50 rows holds the truth in
    about 65 % of draws."""

    def wald(draws: Any) -> Any:
        share = float(draws.mean())
        reach = 1.96 * (share * (1 - share) / len(draws)) ** 0.5
        return type("Interval", (), {"ci_low": share - reach, "ci_high": share + reach})

    assert coverage(lambda r: r.random(50) < 0.98, wald, 0.98, SIMULATED) < 0.75
