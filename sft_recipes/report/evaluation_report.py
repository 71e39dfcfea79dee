"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`, of one model or of two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sft_recipes.report.page import (
    ACCENT,
    INK,
    MUTED,
    Section,
    figure_or_note,
    figure_svg,
    fill,
    format_difference,
    format_estimate,
    format_number,
    new_figure,
    render_page,
    table,
    visible,
)

Row = Mapping[str, Any]

# Samples beyond this many stay in samples.jsonl: a page has to open on a phone.
SHOWN_SAMPLES = 200


@dataclass(frozen=True, slots=True)
class MetricText:
    """How a metric is called and what it counts."""

    label: str
    definition: str


METRIC_TEXTS: Mapping[str, MetricText] = {
    "exact_match": MetricText("Exact match", "Answers equal to the reference, outer whitespace aside."),
    "completion_rate": MetricText(
        "Completion rate", "Answers that end by themselves, are not empty, do not loop and leave nothing open."
    ),
    "format_adherence": MetricText("Format adherence", "Answers without any flag."),
    "eos_rate": MetricText("EOS rate", "Answers that end with a stop token within the token budget."),
    "length_ratio": MetricText("Length ratio, median", "Tokens of the answer over tokens of the reference."),
    "length_ratio_finished": MetricText("Length ratio, finished", "The median without answers cut at the budget."),
    "length_ratio_geometric": MetricText(
        "Length ratio, geometric", "exp of the mean log ratio, empty answers left out."
    ),
    "length_ratio_corpus": MetricText("Length ratio, corpus", "All answer tokens over all reference tokens."),
    "length_ratio_outside": MetricText("Length off by a factor of 2", "Length ratios below 0.5 or above 2."),
    "chapter_length_ratio": MetricText("Chapter: length ratio", "Mean ratio in words."),
    "chapter_completion_rate": MetricText(
        "Chapter: completion rate", "Share of the instruction's words in the answer."
    ),
    "chapter_format_adherence": MetricText("Chapter: format adherence", "0 empty, 0.5 starts with ###, else 1."),
    "reference_beyond_budget": MetricText("References beyond budget", "References too long for max_new_tokens."),
}

_SAMPLES = """
<div class="filters">
{% for name, options in filters.items() %}
<label>{{ name }} <select data-filter="{{ name }}"><option value="">all</option>
{% for option in options %}<option value="{{ option }}">{{ option }}</option>{% endfor %}</select></label>
{% endfor %}
<span class="muted"><span id="shown">{{ samples | length }}</span> of {{ total }} shown</span>
</div>
{% for sample in samples %}
<article class="sample"{% for name, values in sample.attributes.items() %} data-{{ name }}="{{ values }}"{% endfor %}>
<header><strong>{{ sample.name }}</strong>
{% for text, kind in sample.marks %}<span class="{{ kind }}">{{ text }}</span>{% endfor %}</header>
<div>{% for title, text in sample.parts %}<section><h3>{{ title }}</h3><pre>{{ text }}</pre></section>{% endfor %}</div>
</article>
{% endfor %}
"""

_FILTER_SCRIPT = Markup("""
const filters = [...document.querySelectorAll("select[data-filter]")];
function applyFilters() {
  let shown = 0;
  for (const sample of document.querySelectorAll(".sample")) {
    const fits = (f) => !f.value || JSON.parse(sample.dataset[f.dataset.filter]).includes(f.value);
    sample.hidden = !filters.every(fits);
    shown += !sample.hidden;
  }
  document.getElementById("shown").textContent = shown;
}
filters.forEach((f) => f.addEventListener("change", applyFilters));
applyFilters();
""")


def render_evaluation_report(
    metrics: Row, samples: Sequence[Row], base_metrics: Row | None = None, base_samples: Sequence[Row] | None = None
) -> str:
    """The report as one HTML document.

    `metrics` is the content of `metrics.json` (`info`, `n`, `metrics`, `flags`, `stop_reasons`, `task_types`, and with
    a base `differences`), `samples` the rows of `samples.jsonl`; the base's rows are in the same order.
    """
    sections = [Section("Metrics", _metrics_table(metrics, base_metrics))]
    if metrics.get("differences"):
        sections.append(Section("Difference to the base", figure_or_note(lambda: _forest(metrics["differences"]))))
    if metrics["task_types"]:
        sections.append(Section("Task types", _task_types(metrics, base_metrics)))
    health = Markup("").join(
        [
            _stop_reasons(metrics, base_metrics),
            _flags(metrics, base_metrics),
            figure_or_note(lambda: _length_histogram(samples, base_samples)),
        ]
    )
    sections += [
        Section("Health of the output", health),
        Section("Answers", _samples(samples, base_samples)),
        Section("Provenance", _provenance(metrics["info"])),
    ]
    model = metrics["info"].get("model", "model not recorded")
    summary = f"{metrics['n']} prompts, greedy decoding, two-sided 95 % intervals."
    return render_page(f"Evaluation of {model}", summary, sections, _FILTER_SCRIPT)


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


def _metrics_table(metrics: Row, base: Row | None) -> Markup:
    differences = metrics.get("differences", {})
    headers = ["Metric", "n", *(["Base", "Tuned", "Tuned \u2212 base", "p"] if base else ["Value"])]
    rows = []
    for name, estimate in metrics["metrics"].items():
        text = METRIC_TEXTS[name]
        better = {True: "; higher is better", False: "; lower is better", None: ""}[estimate["higher_is_better"]]
        definition = f"{text.definition} Unit: {estimate['unit']}{better}."
        excluded = f"{estimate['n_excluded']} excluded" if estimate["n_excluded"] else ""
        row: list[Any] = [_two_lines(text.label, definition), _two_lines(estimate["n"], excluded)]
        row += [format_estimate(base["metrics"][name])] if base else []
        row += [format_estimate(estimate), *(_difference_cells(differences.get(name)) if base else [])]
        rows.append(row)
    explanation = (
        "Proportions have Wilson's interval, means Student's t, ratios the percentile bootstrap. Differences are paired"
        " by prompt (percentile bootstrap); p is McNemar's exact test."
    )
    return fill("<p class='muted'>{{ text }}</p>", text=explanation) + table(headers, rows, numeric=(1, 2, 3, 4, 5))


def _two_lines(first: Any, second: str) -> Markup:
    return fill("{{ first }}<small>{{ second }}</small>", first=first, second=second)


def _difference_cells(difference: Row | None) -> list[str]:
    if difference is None:
        return ["", ""]
    p = difference["p_value"]
    return [format_difference(difference), "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"]


def _forest(differences: Row) -> Markup:
    defined = [(name, value) for name, value in differences.items() if value["ci_low"] is not None]
    figure, axes = new_figure(7.2, 0.9 + 0.38 * max(len(defined), 1))
    axes.axvline(0, color=MUTED, linewidth=1)
    for position, (_, value) in enumerate(defined):
        axes.plot([value["ci_low"], value["ci_high"]], [position, position], color=ACCENT, linewidth=2)
        axes.plot(value["value"], position, "o", color=ACCENT, markersize=6)
    axes.set_yticks(range(len(defined)), [METRIC_TEXTS[name].label for name, _ in defined])
    axes.invert_yaxis()
    axes.margins(y=0.25)
    axes.set_xlabel("tuned \u2212 base, points of the metric; right of the line is better")
    return figure_svg(figure, "Paired differences with 95 % intervals")


def _task_types(metrics: Row, base: Row | None) -> Markup:
    headers = ["Exact match by task type", "n", *(["Base", "Tuned"] if base else ["Value"])]
    rows = []
    for name, estimate in metrics["task_types"].items():
        before = [format_estimate(base["task_types"][name])] if base else []
        rows.append([name, estimate["n"], *before, format_estimate(estimate)])
    return table(headers, rows, numeric=(1, 2, 3))


def _stop_reasons(metrics: Row, base: Row | None) -> Markup:
    texts = {"eos": "stop token", "stop_string": "stop string", "length": "cut at max_new_tokens", "time": "time limit"}
    sources = [base, metrics] if base else [metrics]
    rows = []
    for reason, text in texts.items():
        counts = [source["stop_reasons"].get(reason, 0) for source in sources]
        if any(counts):
            rows.append([text, *(f"{count} ({format_number(count / metrics['n'])})" for count in counts)])
    return table(["Answers ended by", *(["Base", "Tuned"] if base else ["Count and share"])], rows, numeric=(1, 2))


def _flags(metrics: Row, base: Row | None) -> Markup:
    rows = []
    for name, estimate in metrics["flags"].items():
        before = [format_estimate(base["flags"][name])] if base else []
        rows.append([name, *before, format_estimate(estimate)])
    return table(["Answers flagged", *(["Base", "Tuned"] if base else ["Share"])], rows, numeric=(1, 2))


def _length_histogram(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> Markup:
    def clipped(rows: Sequence[Row], cut: bool | None = None) -> list[float]:
        kept = [row for row in rows if cut is None or (row["stop_reason"] == "length") == cut]
        return [min(max(row["length_ratio"], 0.0626), 15.9) for row in kept if row["length_ratio"] is not None]

    figure, axes = new_figure(7.2, 2.6)
    bins = [2 ** (step / 2) for step in range(-8, 9)]
    ended, cut = clipped(samples, False), clipped(samples, True)
    axes.hist([ended, cut], bins, stacked=True, color=[ACCENT, MUTED], label=["ended by itself", "cut at the budget"])
    if base_samples is not None:
        axes.hist(clipped(base_samples), bins, histtype="step", color=INK, linewidth=1.2, label="base")
    axes.axvline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = [1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16]
    axes.set_xticks(ticks, ["\u2264 1/16", "1/4", "1/2", "1", "2", "4", "\u2265 16"])
    axes.set_xlabel("answer tokens / reference tokens")
    axes.set_ylabel("answers")
    axes.legend(frameon=False)
    return figure_svg(figure, "Length ratio")


def _samples(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> Markup:
    pairs = order_rows(samples, base_samples)[:SHOWN_SAMPLES]
    tasks = {str(row["task_type"]) for row, _ in pairs if row["task_type"] is not None}
    filters = {"task": sorted(tasks), "flag": sorted({flag for row, _ in pairs for flag in row["flags"]})}
    if base_samples is not None:
        filters["change"] = ["lost", "gained", "same"]
    filters = {name: [visible(option) for option in options] for name, options in filters.items() if options}
    shown = [_sample(row, base_row, filters) for row, base_row in pairs]
    return fill(_SAMPLES, filters=filters, samples=shown, total=len(samples))


def _sample(row: Row, base_row: Row | None, filters: Mapping[str, Any]) -> dict[str, Any]:
    task = [] if row["task_type"] is None else [visible(str(row["task_type"]))]
    change = change_of(row, base_row)
    verdict = {True: ("exact match", "good"), False: ("not exact", "muted"), None: ("no reference", "muted")}
    marks = [(text, "muted") for text in task] + [verdict[row["exact_match"]]]
    marks += [(change, {"lost": "bad", "gained": "good"}[change])] if change in ("lost", "gained") else []
    marks += [(flag, "bad") for flag in row["flags"]]
    parts = [("Prompt", row["prompt"]), ("Reference", row["reference"] or "")]
    parts += [("Base", base_row["response"])] if base_row else []
    parts.append(("Tuned", row["response"]))
    values = {"task": task, "flag": list(row["flags"]), "change": [change]}
    return {
        "name": visible(f"{row['source']} row {row['row']}"),
        "attributes": {name: json.dumps(values[name]) for name in filters},
        "marks": marks,
        "parts": [(title, visible(text)) for title, text in parts],
    }


def _provenance(info: Row) -> Markup:
    rows = [
        [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] for key, value in info.items()
    ]
    return table(["What", "Value"], rows)
