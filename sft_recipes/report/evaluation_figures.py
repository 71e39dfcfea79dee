"""The figures of an evaluation report: empty without content, a note without matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from sft_recipes.report import page

Content = Mapping[str, Any]
Estimates = Mapping[str, Content]


class _Style(NamedTuple):
    """Systems and curves differ in more than colour."""

    colour: str
    mark: str


_STYLES = (
    _Style(page.ACCENT, "o"),
    _Style(page.MUTED, "o"),
    _Style(page.INK, "s"),
    _Style(page.MUTED, "^"),
    _Style(page.ACCENT, "D"),
)
_LINES = ("-", "--", ":")
_MARKED_POINTS = 25
# On the learning curve; more lines than two are not told apart.
_SCORES_ON_CURVE = 2
_RATIO_TICKS = {
    1 / 16: "\u2264 1/16",
    1 / 4: "1/4",
    1 / 2: "1/2",
    1: "1",
    2: "2",
    4: "4",
    16: "\u2265 16",
}


def _figure(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """A figure that is nothing without content, and a note where figures cannot be drawn."""

    @wraps(draw)
    def drawn(content: Any, *more: Any) -> Markup:
        if not content:
            return Markup()
        return page.figure_or_note(lambda: draw(content, *more))

    return drawn


@_figure
def forest(systems: Sequence[Content], metrics: Estimates) -> Markup:
    """Paired differences to every system."""
    rows: dict[str, dict[str, Content]] = {}
    for name, metric in metrics.items():
        differences = _by_system(systems, name)
        if differences:
            rows[metric["label"]] = differences
    drawing = _intervals(rows, [system["name"] for system in systems])
    drawing.axes.axvline(0, color=page.MUTED, linewidth=1)
    drawing.axes.set_xlabel("tuned \u2212 other, points of the metric; right of the line is better")
    return page.figure_svg(drawing.figure, "Paired differences with 95 % intervals")


def _by_system(systems: Sequence[Content], metric: str) -> dict[str, Content]:
    """The differences of one metric by the system's name."""
    differences = {}
    for system in systems:
        if metric in system["differences"]:
            differences[system["name"]] = system["differences"][metric]
    return differences


@_figure
def formats(content: Content, metrics: Estimates) -> Markup:
    """The scores of each format, of both models."""
    rows: dict[str, dict[str, Content]] = {}
    for metric, words in metrics.items():
        for name, by_model in content["formats"].items():
            if metric in by_model["tuned"]:
                scores = {model: estimates[metric] for model, estimates in by_model.items()}
                rows[f"{words['label']}, {name}"] = scores
    drawing = _intervals(rows, ["tuned", "base"])
    drawing.axes.set_xlim(-0.03, 1.03)
    return page.figure_svg(drawing.figure, "Scores by format with 95 % intervals")


def _intervals(rows: Mapping[str, Estimates], names: Sequence[str]) -> page.Drawing:
    """One line for each label, on it the estimates by name.

    The first is filled, others are rings and further marks.
    """
    drawing = page.new_figure(7.2, 0.9 + (0.18 + 0.08 * len(names)) * len(rows))
    axes = drawing.axes
    for place, (name, style) in enumerate(zip(names, cycle(_STYLES), strict=False)):
        # The systems of one line stand above and below its middle.
        shift = 0.16 * (place - (len(names) - 1) / 2)
        points = []
        for height, estimates in enumerate(rows.values()):
            estimate = estimates.get(name)
            if estimate is not None and estimate["ci_low"] is not None:
                ends = [estimate["value"], estimate["ci_low"], estimate["ci_high"]]
                points.append([height + shift, *ends])
        heights, values, lows, highs = np.reshape(points, (-1, 4)).T
        axes.hlines(heights, lows, highs, color=style.colour, linewidth=2)
        axes.plot(
            values,
            heights,
            style.mark,
            color=style.colour,
            markerfacecolor=style.colour if place == 0 else "none",
            label=name,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if len(names) > 1:
        columns = min(len(names), 2)
        drawing.figure.legend(frameon=False, loc="outside upper center", ncols=columns)
    return drawing


def learning_curve(content: Content, systems: Sequence[Content]) -> Markup:
    """The first scores by rows trained, of this run and those that differ in nothing else."""
    points = [system for system in systems if system.get("on_curve")]
    if not points:
        return Markup()
    # [there, here] of what differs: the same number here for every point.
    _, own_rows = points[0]["changed"]["data"]["rows"]
    runs = [(system["rows_trained"], system["metrics"]) for system in points]
    runs.append((own_rows, content["metrics"]))
    curves: dict[str, list[list[float]]] = {}
    for name in points[0]["differences"]:
        if len(curves) < _SCORES_ON_CURVE:
            curve = []
            for rows, metrics in runs:
                curve.append([rows, *_ends(metrics[name])])
            curves[content["metrics"][name]["label"]] = sorted(curve)
    title = "Learning curve: the same recipe on fewer rows, 95 % intervals"
    return _curves(curves, "rows trained", "score", title)


def _ends(estimate: Content) -> list[Any]:
    return [estimate["value"], estimate["ci_low"], estimate["ci_high"]]


def over_training(content: Content, metrics: Estimates) -> Markup:
    """Losses, those of each data set of a mixture, then what the callback scored."""
    curves = content.get("training_curves", {})
    losses = {}
    for name, label in (("loss", "training rows"), ("eval_loss", "held-out rows")):
        if name in curves:
            losses[label] = curves[name]
    loss_title = "Loss"
    if curves.get("eval_loss"):
        best_step, _ = min(curves["eval_loss"], key=lambda point: point[1])
        loss_title += f"; best on held-out rows at step {best_step}"
    scores = {}
    for name, metric in metrics.items():
        if metric["headline"] and f"eval_{name}" in curves:
            scores[metric["label"]] = curves[f"eval_{name}"]
    score_title = "Scores while training: a trend on few prompts, no verdict"
    by_data_set = {}
    for name in content.get("data_set_losses", {}):
        if f"eval_{name}_loss" in curves:
            by_data_set[name] = curves[f"eval_{name}_loss"]
    drawn = _curves(losses, "step", "loss", loss_title)
    drawn += _curves(by_data_set, "step", "loss", "Loss of held-out rows by data set")
    return drawn + _curves(scores, "step", "score", score_title)


@_figure
def _curves(curves: Mapping[str, Sequence[Sequence[float]]], x: str, y: str, title: str) -> Markup:
    """Lines through points `[x, y]`, or `[x, y, low, high]` with intervals."""
    figure, axes = page.new_figure(7.2, 2.8)
    styles = zip(curves.items(), cycle(_STYLES), cycle(_LINES), strict=False)
    for (label, points), style, line in styles:
        columns = list(zip(*points, strict=True))
        # Evaluations are few and stand out as points; a loss of every step is a line.
        mark = style.mark if len(points) <= _MARKED_POINTS else ""
        axes.plot(
            *columns[:2],
            mark + line,
            color=style.colour,
            markersize=4,
            label=label,
        )
        if len(columns) > 2:
            axes.vlines(columns[0], *columns[2:], color=style.colour)
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return page.figure_svg(figure, title)


@_figure
def length_histogram(samples: Sequence[Content], base_samples: Sequence[Content] | None) -> Markup:
    """How long answers are beside their references; the base's as an outline."""
    bins = 2 ** np.arange(-4.25, 4.5, 0.5)  # 1 stands in the middle of a bin
    figure, axes = page.new_figure(7.2, 2.6)
    axes.hist(
        [_ratios(samples, bins, cut=False), _ratios(samples, bins, cut=True)],
        bins,
        stacked=True,
        color=[page.ACCENT, page.MUTED],
        label=["ended by itself", "cut at the budget"],
    )
    if base_samples is not None:
        axes.hist(
            _ratios(base_samples, bins),
            bins,
            histtype="step",
            color=page.INK,
            linewidth=1.2,
            label="base",
        )
    axes.axvline(1, color=page.INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(_RATIO_TICKS), list(_RATIO_TICKS.values()))
    axes.set(xlabel="answer tokens / reference tokens", ylabel="answers")
    axes.legend(frameon=False)
    return page.figure_svg(figure, "Length ratio")


def _ratios(rows: Sequence[Content], bins: Any, cut: bool | None = None) -> Any:
    """The known length ratios; those beyond the bins are put into the outermost.

    `cut`: only of answers that were cut at the token budget, or only of the others.
    """
    ratios = []
    for row in rows:
        was_cut = row["stop_reason"] == "length"
        if row["length_ratio"] is not None and cut in (None, was_cut):
            ratios.append(row["length_ratio"])
    return np.clip(ratios, bins[0], bins[-1])
