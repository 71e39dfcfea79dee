"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`, of one model or of two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    parts = page.macros("evaluation.html")
    sections = [Section("Gate", parts.gate(metrics["gate"]))] if "gate" in metrics else []
    sections.append(Section("Metrics", parts.metrics(metrics, base_metrics, METRIC_TEXTS)))
    if metrics.get("differences"):
        sections.append(Section("Difference to the base", page.figure_or_note(lambda: _forest(metrics["differences"]))))
    if metrics["task_types"]:
        sections.append(Section("Task types", parts.task_types(metrics, base_metrics)))
    if "format_overfitting" in metrics:
        found = metrics["format_overfitting"]
        figure = page.figure_or_note(lambda: _formats(found["formats"]))
        sections.append(Section("Format overfitting", parts.format_overfitting(found, metrics["n"], figure)))
    health = parts.health(metrics, base_metrics) + page.figure_or_note(lambda: _length_histogram(samples, base_samples))
    pairs = [(row, base, change_of(row, base)) for row, base in order_rows(samples, base_samples)[:SHOWN_SAMPLES]]
    filters = {
        "task": sorted({str(row["task_type"]) for row, _, _ in pairs if row["task_type"] is not None}),
        "flag": sorted({flag for row, _, _ in pairs for flag in row["flags"]}),
        "change": ["lost", "gained", "same"] if base_samples is not None else [],
    }
    info = [
        [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for key, value in metrics["info"].items()
    ]
    sections += [
        Section("Health of the output", health),
        Section("Answers", parts.answers(pairs, filters, len(samples))),
        Section("Provenance", page.table(["What", "Value"], info)),
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
    defined = {name: value for name, value in differences.items() if value["ci_low"] is not None}
    figure, axes = page.new_figure(7.2, 0.9 + 0.38 * max(len(defined), 1))
    axes.axvline(0, color=page.MUTED, linewidth=1)
    for position, value in enumerate(defined.values()):
        axes.plot([value["ci_low"], value["ci_high"]], [position, position], color=page.ACCENT, linewidth=2)
        axes.plot(value["value"], position, "o", color=page.ACCENT, markersize=6)
    axes.set_yticks(range(len(defined)), [METRIC_TEXTS[name].label for name in defined])
    axes.invert_yaxis()
    axes.margins(y=0.25)
    axes.set_xlabel("tuned \u2212 base, points of the metric; right of the line is better")
    return page.figure_svg(figure, "Paired differences with 95 % intervals")


def _formats(formats: Row) -> Markup:
    """One row for each score and format: the tuned model filled, the base as a ring."""
    scores = [name for name in next(iter(formats.values()))["tuned"] if name in METRIC_TEXTS]
    rows = [(score, name) for score in scores for name in formats]
    figure, axes = page.new_figure(7.2, 0.8 + 0.24 * len(rows))
    for position, (score, name) in enumerate(rows):
        for model, colour, face in (("base", page.MUTED, "none"), ("tuned", page.ACCENT, page.ACCENT)):
            one = formats[name].get(model, {}).get(score, {"value": None})
            if one["value"] is not None:
                label = model if position == 0 else None
                axes.plot([one["ci_low"], one["ci_high"]], [position, position], color=colour, linewidth=2)
                axes.plot(one["value"], position, "o", color=colour, markerfacecolor=face, markersize=6, label=label)
    axes.set_yticks(range(len(rows)), [f"{METRIC_TEXTS[score].label}, {name}" for score, name in rows])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    return page.figure_svg(figure, "Scores by format with 95 % intervals")


def _length_histogram(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> Markup:
    def clipped(rows: Sequence[Row]) -> list[float]:
        return [min(max(row["length_ratio"], 0.0626), 15.9) for row in rows if row["length_ratio"] is not None]

    figure, axes = page.new_figure(7.2, 2.6)
    bins = [2 ** (step / 2) for step in range(-8, 9)]
    ended = clipped([row for row in samples if row["stop_reason"] != "length"])
    cut = clipped([row for row in samples if row["stop_reason"] == "length"])
    axes.hist(
        [ended, cut],
        bins,
        stacked=True,
        color=[page.ACCENT, page.MUTED],
        label=["ended by itself", "cut at the budget"],
    )
    if base_samples is not None:
        axes.hist(clipped(base_samples), bins, histtype="step", color=page.INK, linewidth=1.2, label="base")
    axes.axvline(1, color=page.INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = {1 / 16: "\u2264 1/16", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1", 2: "2", 4: "4", 16: "\u2265 16"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("answer tokens / reference tokens")
    axes.set_ylabel("answers")
    axes.legend(frameon=False)
    return page.figure_svg(figure, "Length ratio")
