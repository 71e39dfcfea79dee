"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`, of one model or of two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from sft_recipes.report import page
from sft_recipes.report.page import Section

Row = Mapping[str, Any]

# Samples beyond this many stay in samples.jsonl: a page has to open on a phone.
SHOWN_SAMPLES = 200


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
    metrics: Row, samples: Sequence[Row], base_metrics: Row | None = None, base_samples: Sequence[Row] | None = None
) -> str:
    """The report as one HTML document.

    `metrics` is the content of `metrics.json` (`info`, `n`, `metrics`, `flags`, `stop_reasons`, `task_types`, with a
    base `differences`, and where asked for `gate` and `format_overfitting`), `samples` the rows of `samples.jsonl`; the
    base's rows are in the same order.
    """
    parts, base = page.macros("evaluation.html"), base_metrics
    sections = [Section("Gate", parts.gate(metrics["gate"]))] if "gate" in metrics else []
    sections.append(Section("Metrics", parts.metrics(metrics, base, METRIC_TEXTS)))
    if metrics.get("differences"):
        sections.append(Section("Difference to the base", page.figure_or_note(lambda: _forest(metrics["differences"]))))
    if metrics["task_types"]:
        sections.append(Section("Task types", parts.task_types(metrics, base)))
    if found := metrics.get("format_overfitting"):
        figure = page.figure_or_note(lambda: _formats(found["formats"]))
        sections.append(Section("Format overfitting", parts.format_overfitting(found, metrics["n"], figure)))
    histogram = page.figure_or_note(lambda: _length_histogram(samples, base_samples))
    pairs = [(*pair, change_of(*pair)) for pair in order_rows(samples, base_samples)[:SHOWN_SAMPLES]]
    filters = {
        "task": sorted({str(row["task_type"]) for row, _, _ in pairs if row["task_type"] is not None}),
        "flag": sorted({flag for row, _, _ in pairs for flag in row["flags"]}),
        "change": ["lost", "gained", "same"] if base_samples is not None else [],
    }
    sections += [
        Section("Health of the output", parts.health(metrics, base) + histogram),
        Section("Answers", parts.answers(pairs, filters, len(samples))),
        Section("Provenance", parts.provenance(metrics["info"])),
    ]
    model = metrics["info"].get("model", "model not recorded")
    summary = f"{metrics['n']} prompts, greedy decoding, two-sided 95 % intervals."
    return page.render_page(f"Evaluation of {model}", summary, sections, parts.script())


def change_of(row: Row, base_row: Row | None) -> str:
    """`lost` (right in the base, wrong now), `gained`, `same`; empty without a base."""
    if base_row is None:
        return ""
    before, after = bool(base_row["exact_match"]), bool(row["exact_match"])
    return "same" if before == after else "gained" if after else "lost"


def order_rows(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> list[tuple[Row, Row | None]]:
    """Rows with their base rows: those that became wrong first, the rest in data order."""
    bases: Sequence[Row | None] = base_samples if base_samples is not None else [None] * len(samples)
    return sorted(zip(samples, bases, strict=True), key=lambda pair: change_of(*pair) != "lost")


def _forest(differences: Row) -> Markup:
    figure, axes = _intervals({METRIC_TEXTS[name].label: {"tuned": one} for name, one in differences.items()})
    axes.axvline(0, color=page.MUTED, linewidth=1)
    axes.set_xlabel("tuned \u2212 base, points of the metric; right of the line is better")
    return page.figure_svg(figure, "Paired differences with 95 % intervals")


def _formats(formats: Row) -> Markup:
    rows = {
        f"{text.label}, {name}": {model: scores[score] for model, scores in by_model.items()}
        for score, text in METRIC_TEXTS.items()
        for name, by_model in formats.items()
        if score in by_model["tuned"]
    }
    figure, axes = _intervals(rows)
    axes.set_xlim(-0.03, 1.03)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    return page.figure_svg(figure, "Scores by format with 95 % intervals")


def _intervals(rows: Mapping[str, Row]) -> tuple[Any, Any]:
    """One line for each label, on it the estimates by model: the tuned one filled, the base as a ring."""
    figure, axes = page.new_figure(7.2, 0.9 + 0.24 * len(rows))
    for model, colour, face in (("base", page.MUTED, "none"), ("tuned", page.ACCENT, page.ACCENT)):
        found = [(position, row[model]) for position, row in enumerate(rows.values()) if model in row]
        known = [(y, one["value"], one["ci_low"], one["ci_high"]) for y, one in found if one["ci_low"] is not None]
        positions, values, lows, highs = np.reshape(known, (-1, 4)).T
        axes.hlines(positions, lows, highs, color=colour, linewidth=2)
        axes.plot(values, positions, "o", color=colour, markerfacecolor=face, markersize=6, label=model)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure, axes


def _length_histogram(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> Markup:
    bins = 2 ** np.arange(-4, 4.5, 0.5)

    def ratios(rows: Sequence[Row]) -> Any:
        return np.clip([row["length_ratio"] for row in rows if row["length_ratio"] is not None], bins[0], bins[-1])

    figure, axes = page.new_figure(7.2, 2.6)
    parts = [ratios([row for row in samples if (row["stop_reason"] == "length") is cut]) for cut in (False, True)]
    names, colours = ["ended by itself", "cut at the budget"], [page.ACCENT, page.MUTED]
    axes.hist(parts, bins, stacked=True, color=colours, label=names)
    if base_samples is not None:
        axes.hist(ratios(base_samples), bins, histtype="step", color=page.INK, linewidth=1.2, label="base")
    axes.axvline(1, color=page.INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = {1 / 16: "\u2264 1/16", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1", 2: "2", 4: "4", 16: "\u2265 16"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="answer tokens / reference tokens", ylabel="answers")
    axes.legend(frameon=False)
    return page.figure_svg(figure, "Length ratio")
