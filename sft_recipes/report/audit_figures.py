"""The figures of a data quality report, each drawn from the audit's numbers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from sft_recipes.report import page

Audit = Mapping[str, Any]
# Above it, points of the usual size hide one another; a few have to be seen, too.
_MANY_POINTS = 100
# From this ratio of the ends on, ticks at 1, 2 and 5 stand too close.
_WIDE_AXIS = 1000
# Below it the ticks at 1, 2 and 5 say too little of an axis.
_FEWEST_TICKS = 3
_LABEL_GAP = 4  # in pixels, on each side of a label


def draw_figures(section: str, audit: Audit) -> list[Markup]:
    """The figures of a section, each an empty text where the audit has no numbers for it.

    Where figures cannot be drawn at all, the reason stands in their place.
    """
    drawn = []
    for draw in _FIGURES.get(section, ()):
        drawn.append(page.figure_or_note(partial(draw, audit)))
    return drawn


class _Curve(NamedTuple):
    label: str
    colour: str
    style: str


_CURVES = {
    "total_tokens": _Curve("whole rows", page.ACCENT, "-"),
    "prompt_tokens": _Curve("prompts alone", page.MUTED, "--"),
}


def _reach(audit: Audit) -> Markup:
    if not audit["truncation"]:
        return Markup()
    figure, axes = page.new_figure(9.6, 3.2)
    lengths: list[float] = []
    for name, curve in _CURVES.items():
        histogram = audit["lengths"][name]["histogram"]
        edges = histogram["edges"]
        rows = np.array([0, *histogram["counts"]])
        shares = np.cumsum(rows) / rows.sum()
        axes.plot(
            edges,
            shares,
            label=curve.label,
            color=curve.colour,
            linestyle=curve.style,
            linewidth=2,
        )
        lengths.extend(edges)
    limit = audit["settings"]["max_length"]
    if limit:
        axes.axvline(limit, color=page.INK, linestyle=":", label=f"max_length {limit:,}")
        lengths.append(limit)
    _count_axis(axes, "x", lengths, "tokens")
    axes.set(ylabel="rows up to this length")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    label = "Share of rows up to each length: where the line is high, most rows fit."
    return page.figure_svg(figure, label)


def _lengths(part: str, name: str, audit: Audit) -> Markup:
    unit = audit["lengths"]["unit"]
    numbers = audit["lengths"][f"{part}_{unit}"]
    figure, axes = page.new_figure(5.6, 2.3)
    _draw_histogram(axes, numbers["histogram"], "rows")
    _count_axis(axes, "x", numbers["histogram"]["edges"], f"{unit} in the {name}")
    what = f"{unit.capitalize()} in the {name}"
    label = f"{what}: half of the rows have at most {numbers['median']:,.0f}."
    return page.figure_svg(figure, label)


def _shapes(audit: Audit) -> Markup:
    figure, axes = page.new_figure(5.6, 3.2)
    unit = audit["lengths"]["unit"]
    points = audit["lengths"]["points"]
    prompts, answers = zip(*points, strict=True)
    axes.plot(
        prompts,
        answers,
        ".",
        color=page.ACCENT,
        markersize=4 if len(points) > _MANY_POINTS else 9,
        alpha=0.5,
        markeredgewidth=0,
    )
    _count_axis(axes, "x", prompts, f"{unit} in the prompt")
    _count_axis(axes, "y", answers, f"{unit} in the answer")
    drawn = f"a point for each of {len(points):,} rows drawn at random"
    label = f"How long prompt and answer are together, {drawn}."
    return page.figure_svg(figure, label)


def _alike(audit: Audit) -> Markup:
    near = audit["duplicates"]["near"]
    if not any(near["histogram"]["counts"]):
        return Markup()
    figure, axes = page.new_figure(9.6, 2.6)
    _draw_histogram(axes, near["histogram"], "pairs of rows")
    threshold = near["threshold"]
    axes.axvline(threshold, color=page.INK, linestyle=":", label=f"threshold {threshold:.0%}")
    axes.set(xlabel="three-word runs that two rows share, of all that they have")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    label = "How alike similar rows are: pairs to the right of the line are near-duplicates."
    return page.figure_svg(figure, label)


def _draw_histogram(axes: Any, histogram: Mapping[str, Sequence[float]], y_label: str) -> None:
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=page.ACCENT)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylabel=y_label)


def _count_axis(axes: Any, name: str, values: Sequence[float], label: str) -> None:
    """A logarithmic axis, "x" or "y", with few ticks that are plain numbers; 0 is left of 1."""
    low = max(min(values), 1)
    high = max(*values, 2)
    ticks = _ticks(low, high)
    if len(ticks) < _FEWEST_TICKS:
        ticks = _even_ticks(low, high)
    getattr(axes, f"set_{name}scale")("symlog", linthresh=1)
    getattr(axes, f"set_{name}lim")(min(values) / 1.1, high * 1.1)
    getattr(axes, f"set_{name}ticks")(ticks)
    getattr(axes, f"set_{name}label")(f"{label} (logarithmic)")
    axes.minorticks_off()
    axis = getattr(axes, f"{name}axis")
    axis.set_major_formatter("{x:,.0f}")
    axis.set_ticks(_ticks_apart(axis))


def _ticks(low: float, high: float) -> list[float]:
    digits = [1, 2, 5]
    if high > _WIDE_AXIS * low:
        digits = [1]
    ticks: list[float] = []
    for power in range(9):
        for digit in digits:
            tick = digit * 10**power
            if low <= tick <= high:
                ticks.append(tick)
    return ticks


def _even_ticks(low: float, high: float) -> list[float]:
    """Whole numbers at even distances, for an axis that is too short for 1, 2 and 5."""
    from matplotlib.ticker import MaxNLocator

    ticks = []
    for tick in MaxNLocator(nbins=4, integer=True).tick_values(low, high):
        if low <= tick <= high:
            ticks.append(float(tick))
    return ticks or [low]


def _ticks_apart(axis: Any) -> list[float]:
    """The ticks of an axis whose labels, as they are drawn, stay apart from the one before."""
    axis.figure.draw_without_rendering()
    ticks: list[float] = []
    box_before = None
    for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
        box = label.get_window_extent()
        # A browser's letters are wider than those that were measured, and need a gap.
        padded = box.padded(_LABEL_GAP)
        if box_before is None or not padded.overlaps(box_before):
            ticks.append(float(tick))
            box_before = padded
    return ticks


_FIGURES: Mapping[str, Sequence[Callable[[Audit], Markup]]] = {
    "truncation": (_reach,),
    "lengths": (
        partial(_lengths, "prompt", "prompt"),
        partial(_lengths, "response", "answer"),
        _shapes,
    ),
    "duplicates": (_alike,),
}
