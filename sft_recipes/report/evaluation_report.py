"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`, of one model or of two."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from sft_recipes.report import page

Row = Mapping[str, Any]

# Samples beyond this many stay in samples.jsonl: a page has to open on a phone.
SHOWN_SAMPLES = 200
# Systems and curves differ in more than colour.
_STYLES = (
    (page.ACCENT, "o"),
    (page.MUTED, "o"),
    (page.INK, "s"),
    (page.MUTED, "^"),
    (page.ACCENT, "D"),
)
_LINES = ("-", "--", ":")


@dataclass(frozen=True, slots=True)
class MetricText:
    """How a metric is called and what it counts, and which statistic of the rows' values it is."""

    label: str
    definition: str
    statistic: str = "share"
    unit: str = "proportion"
    higher_is_better: bool | None = None


_TABLE = yaml.safe_load((Path(__file__).parent / "metrics.yaml").read_text(encoding="utf-8"))
METRIC_TEXTS = {name: MetricText(**fields) for name, fields in _TABLE.items()}


def render_evaluation_report(
    metrics: Row,
    samples: Sequence[Row],
    base_metrics: Row | None = None,
    base_samples: Sequence[Row] | None = None,
) -> str:
    """The report as one HTML document.

    `metrics` is the content of `metrics.json`: what `Evaluation.as_json` gives, `info`, and where known `gate`,
    `comparisons`, `task_differences`, `format_overfitting`, `training_curves` and `safety`. `samples` are the rows of
    `samples.jsonl`; the base's are in the same order.
    """
    parts, base = page.macros("evaluation.html"), base_metrics
    pairs = [
        (*pair, change_of(*pair)) for pair in order_rows(samples, base_samples)[:SHOWN_SAMPLES]
    ]
    filters = {
        "task": sorted(
            {str(row["task_type"]) for row, _, _ in pairs if row["task_type"] is not None}
        ),
        "flag": sorted({flag for row, _, _ in pairs for flag in row["flags"]}),
        "change": ["lost", "gained", "same"] if base_samples is not None else [],
    }
    alone = (
        [{"name": "base", "differences": metrics["differences"]}]
        if "differences" in metrics
        else []
    )
    others = metrics.get("comparisons") or alone
    formats, curves = metrics.get("format_overfitting"), metrics.get("training_curves", {})
    openers = [
        Counter(filter(None, (row.get("opener") for row in rows)))
        for rows in (base_samples or (), samples)
    ]
    sections = {
        "Gate": parts.gate(metrics.get("gate")),
        "Differences": parts.differences(
            others, METRIC_TEXTS, _forest(others), _learning_curve(metrics, others)
        ),
        "Metrics": parts.metrics(metrics, base, METRIC_TEXTS),
        "Task types": parts.task_types(
            metrics, base, metrics.get("task_differences", {}), filters["task"]
        ),
        "Format overfitting": parts.format_overfitting(formats, metrics["n"], _formats(formats)),
        "Health of the output": parts.health(metrics, base, openers)
        + _length_histogram(samples, base_samples),
        "Answers": parts.answers(pairs, filters, len(samples)),
        "Over training": _over_training(curves),
        "Safety": parts.safety(metrics.get("safety")),
        "Provenance": parts.provenance(metrics["info"]),
    }
    model = metrics["info"].get("model", "model not recorded")
    summary = f"{metrics['n']} prompts, greedy decoding, two-sided 95 % intervals."
    return page.render_page(f"Evaluation of {model}", summary, sections, parts.script())


def change_of(row: Row, base_row: Row | None) -> str:
    """`lost` (right in the base, wrong now), `gained`, `same`; empty without a base."""
    if base_row is None:
        return ""
    before, after = bool(base_row["exact_match"]), bool(row["exact_match"])
    return "same" if before == after else "gained" if after else "lost"


def order_rows(
    samples: Sequence[Row], base_samples: Sequence[Row] | None
) -> list[tuple[Row, Row | None]]:
    """Rows with their base rows: those that became wrong first, the rest in data order."""
    bases: Sequence[Row | None] = (
        base_samples if base_samples is not None else [None] * len(samples)
    )
    return sorted(zip(samples, bases, strict=True), key=lambda pair: change_of(*pair) != "lost")


def _figure(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """A figure that is nothing without content, and a note where figures cannot be drawn."""
    return lambda content, *more: (
        page.figure_or_note(lambda: draw(content, *more)) if content else Markup()
    )


@_figure
def _forest(others: Sequence[Row]) -> Markup:
    rows = {
        text.label: {
            one["name"]: one["differences"][name] for one in others if name in one["differences"]
        }
        for name, text in METRIC_TEXTS.items()
        if any(name in one["differences"] for one in others)
    }
    figure, axes = _intervals(rows, [one["name"] for one in others])
    axes.axvline(0, color=page.MUTED, linewidth=1)
    axes.set_xlabel("tuned \u2212 other, points of the metric; right of the line is better")
    return page.figure_svg(figure, "Paired differences with 95 % intervals")


@_figure
def _formats(content: Row) -> Markup:
    rows = {
        f"{text.label}, {name}": {model: scores[score] for model, scores in by_model.items()}
        for score, text in METRIC_TEXTS.items()
        for name, by_model in content["formats"].items()
        if score in by_model["tuned"]
    }
    figure, axes = _intervals(rows, ["tuned", "base"])
    axes.set_xlim(-0.03, 1.03)
    return page.figure_svg(figure, "Scores by format with 95 % intervals")


def _intervals(rows: Mapping[str, Row], names: Sequence[str]) -> tuple[Any, Any]:
    """One line for each label, on it the estimates by name: the first filled, others as rings and further marks."""
    figure, axes = page.new_figure(7.2, 0.9 + (0.18 + 0.08 * len(names)) * len(rows))
    for place, (name, (colour, mark)) in enumerate(zip(names, cycle(_STYLES), strict=False)):
        found = [
            (y + 0.16 * (place - (len(names) - 1) / 2), row[name])
            for y, row in enumerate(rows.values())
            if name in row
        ]
        known = [
            (y, one["value"], one["ci_low"], one["ci_high"])
            for y, one in found
            if one["ci_low"] is not None
        ]
        positions, values, lows, highs = np.reshape(known, (-1, 4)).T
        axes.hlines(positions, lows, highs, color=colour, linewidth=2)
        axes.plot(
            values,
            positions,
            mark,
            color=colour,
            markerfacecolor=colour if place == 0 else "none",
            label=name,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if len(names) > 1:
        figure.legend(frameon=False, loc="outside upper center", ncols=min(len(names), 2))
    return figure, axes


def _learning_curve(metrics: Row, others: Sequence[Row]) -> Markup:
    """The first two scores by rows trained, of this run and those that differ from it in nothing else."""
    points = [one for one in others if one.get("on_curve")]
    every = points + [
        {**metrics, "rows_trained": one["changed"]["data"]["rows"][1]} for one in points[:1]
    ]
    curves = {
        text.label: sorted(
            [
                one["rows_trained"],
                *(one["metrics"][name][key] for key in ("value", "ci_low", "ci_high")),
            ]
            for one in every
        )
        for name, text in METRIC_TEXTS.items()
        if points and name in points[0]["differences"]
    }
    title = "Learning curve: the same recipe on fewer rows, 95 % intervals"
    return _curves(dict(islice(curves.items(), 2)), "rows trained", "score", title)


def _over_training(curves: Row) -> Markup:
    """Losses, then what the callback scored."""
    losses = {name: curves[name] for name in ("loss", "eval_loss") if name in curves}
    best = min(curves.get("eval_loss", []), key=lambda point: point[1], default=["none"])[0]
    scores = {
        text.label: curves[f"eval_{name}"]
        for name, text in METRIC_TEXTS.items()
        if text.statistic == "share" and text.higher_is_better and f"eval_{name}" in curves
    }
    title = "Scores of the callback: a trend on few prompts, no verdict"
    return _curves(losses, "step", "loss", f"Loss; step of the best eval loss: {best}") + _curves(
        scores, "step", "score", title
    )


@_figure
def _curves(curves: Mapping[str, Sequence[Sequence[float]]], x: str, y: str, title: str) -> Markup:
    """Lines through points `[x, y]`, or `[x, y, low, high]` with intervals."""
    figure, axes = page.new_figure(7.2, 2.8)
    for (label, points), (colour, mark), line in zip(
        curves.items(), cycle(_STYLES), cycle(_LINES), strict=False
    ):
        columns = list(zip(*points, strict=True))
        axes.plot(*columns[:2], mark + line, color=colour, markersize=4, label=label)
        if len(columns) > 2:
            axes.vlines(columns[0], *columns[2:], color=colour)
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return page.figure_svg(figure, title)


@_figure
def _length_histogram(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> Markup:
    bins = 2 ** np.arange(-4.25, 4.5, 0.5)  # 1 stands in the middle of a bin

    def ratios(rows: Sequence[Row]) -> Any:
        return np.clip(
            [row["length_ratio"] for row in rows if row["length_ratio"] is not None],
            bins[0],
            bins[-1],
        )

    figure, axes = page.new_figure(7.2, 2.6)
    parts = [
        ratios([row for row in samples if (row["stop_reason"] == "length") is cut])
        for cut in (False, True)
    ]
    names, colours = ["ended by itself", "cut at the budget"], [page.ACCENT, page.MUTED]
    axes.hist(parts, bins, stacked=True, color=colours, label=names)
    if base_samples is not None:
        axes.hist(
            ratios(base_samples), bins, histtype="step", color=page.INK, linewidth=1.2, label="base"
        )
    axes.axvline(1, color=page.INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = {
        1 / 16: "\u2264 1/16",
        1 / 4: "1/4",
        1 / 2: "1/2",
        1: "1",
        2: "2",
        4: "4",
        16: "\u2265 16",
    }
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="answer tokens / reference tokens", ylabel="answers")
    axes.legend(frameon=False)
    return page.figure_svg(figure, "Length ratio")
