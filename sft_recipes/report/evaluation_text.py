"""What `evaluate` prints unless it is asked for all: a verdict, five figures, some answers.

All of it comes from the content of `metrics.json`; `evaluation_tables.py` has the rest.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.report.evaluation_parts import (
    Row,
    RowPair,
    question,
)
from sft_recipes.report.number_texts import (
    counted,
    format_estimate,
    in_percent,
    in_points,
    where,
)
from sft_recipes.report.text_tables import paragraph, side_by_side, text_table

Content = Mapping[str, Any]

# Of a question or an answer; all of it stands in the report.
SHOWN_CHARACTERS = 200
SHOWN_LINES = 6
_CUT = " ..."


class Figure(NamedTuple):
    """A metric that is shown before all others, in words that need no definition."""

    metric: str
    words: str


FIGURES = (
    Figure("exact_match", "Answered as expected"),
    Figure("tool_call_exact", "Called the expected tools"),
    Figure("token_f1", "Words shared with what is expected"),
    Figure("eos_rate", "Ended by itself"),
    Figure("format_adherence", "Well formed"),
    Figure("length_ratio", "Length, expected = 1"),
)
SHOWN_FIGURES = 5


def main_figures(content: Content, most: int = SHOWN_FIGURES) -> list[Figure]:
    """The first of them that any answer has a value for."""
    return [figure for figure in FIGURES if content["metrics"][figure.metric]["n"]][:most]


def verdict_text(content: Content) -> str:
    """The sentence, and below it what makes the figures worth less than they look."""
    text = paragraph(content["verdict"])
    for warning in content["warnings"]:
        text += paragraph(f"WARNING: {warning}")
    return text


def rows_text(content: Content, samples: Sequence[Row]) -> str:
    """Which rows were answered."""
    if not samples:
        return "no rows answered\n"
    sources = Counter(row["source"] for row in samples)
    counts = ", ".join(f"{count} of {source}" for source, count in sources.items())
    text = f"{len(samples)} rows answered: {counts}"
    if content["n"] < len(samples):
        text += f"; {content['n']} different prompts, each of which counts once"
    return paragraph(text)


def figures_text(content: Content, base: Content | None) -> str:
    """Five metrics with their intervals, the base's before the tuned model's."""
    differences = content.get("differences", {})
    rows = []
    for figure in main_figures(content):
        tuned = content["metrics"][figure.metric]
        cells = [figure.words]
        if base is not None:
            cells.append(in_percent(base["metrics"][figure.metric]))
        cells.append(in_percent(tuned))
        if base is not None:
            difference = differences.get(figure.metric)
            cells.append(in_points(difference) if difference else "")
        rows.append(cells)
    title = "with 95 % intervals"
    if base is None:
        return text_table([title, "tuned"], rows)
    return text_table([title, "base", "tuned", "difference"], rows)


def answers_text(pairs: Sequence[RowPair]) -> str:
    """What was asked, and beside one another what was expected and what was answered."""
    text = ""
    for pair in pairs:
        row = pair.row
        columns = []
        if row["reference"] is not None:
            columns.append(("expected", row["reference"]))
        if pair.base is not None:
            columns.append(("base", pair.base["response"]))
        columns.append(("tuned", row["response"]))
        shown = [(title, _beginning(answer)) for title, answer in columns]
        heading = ", ".join(filter(None, [where(row), pair.outcome]))
        text += "\n" + paragraph(f"---- {heading}") + paragraph(_beginning(question(row)))
        text += side_by_side(shown)
    return text


def _beginning(text: str) -> str:
    """The first lines of a text, as far as they help."""
    lines = text.strip().splitlines()
    beginning = "\n".join(lines[:SHOWN_LINES])
    if len(lines) <= SHOWN_LINES and len(beginning) <= SHOWN_CHARACTERS:
        return beginning
    return beginning[:SHOWN_CHARACTERS].rstrip() + _CUT


def task_types_text(content: Content) -> str:
    """Where it is worst and best by task type, on one line; nothing for one type or none."""
    shares = {name: estimate["value"] for name, estimate in content["task_types"].items()}
    order = sorted(shares, key=lambda name: shares[name] or 0.0)
    if len(order) < 2:
        return ""
    types = content["task_types"]
    worst = f"{order[0]} {in_percent(types[order[0]])}"
    best = f"{order[-1]} {in_percent(types[order[-1]])}"
    return paragraph(f"By task type: worst {worst}, best {best} of {counted(len(order), 'type')}")


def data_sets_text(content: Content) -> str:
    """Exact match and loss of each data set of a mixture, on one line; nothing for one set."""
    losses = content.get("data_set_losses", {})
    matches = content.get("data_sets", {})
    sets: list[str] = []
    for name in sorted({*matches, *losses}):
        figures = [in_percent(matches[name])] if name in matches else []
        if name in losses:
            figures.append(f"loss {format_estimate(losses[name])}")
        sets.append(f"{name} {', '.join(figures)}")
    return paragraph(f"By data set: {'; '.join(sets)}") if sets else ""


def where_the_rest_is(folder: Path, everything: bool) -> str:
    """The files that were written, and how to see every figure here."""
    more = "" if everything else "more figures here: add --all\n"
    return f"\n{more}report: {folder}/report.html\nanswers: {folder}/samples.jsonl\n"
