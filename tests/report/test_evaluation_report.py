"""The evaluation report shows the numbers it was given, and text as text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from sft_recipes.report.evaluation_report import METRIC_TEXTS, SHOWN_SAMPLES, order_rows, render_evaluation_report

HOSTILE = "</pre><script>alert(1)</script>\u202e"


def estimate(value: float | None, n: int = 4) -> dict[str, Any]:
    ends = (None, None) if value is None else (value - 0.1, value + 0.1)
    return {
        "value": value,
        "n": n,
        "n_excluded": 1,
        "ci_low": ends[0],
        "ci_high": ends[1],
        "unit": "proportion",
        "higher_is_better": True,
    }


def metrics(value: float = 0.5, **rest: Any) -> dict[str, Any]:
    return {
        "info": {"model": "tiny <b>", "decoding": {"do_sample": False}},
        "n": 4,
        "metrics": {name: estimate(value) for name in METRIC_TEXTS},
        "flags": {"loop": estimate(0.25), "empty": estimate(0.0)},
        "stop_reasons": {"eos": 3, "length": 1},
        "task_types": {"count": estimate(0.75)},
    } | rest


def sample(row: int, exact: bool, **rest: Any) -> dict[str, Any]:
    return {
        "row": row,
        "source": "test.jsonl",
        "task_type": "count" if row % 2 else None,
        "prompt": f"question {row}",
        "reference": "yes",
        "response": f"answer {row}",
        "stop_reason": "length" if row == 1 else "eos",
        "flags": ["loop"] if row == 1 else [],
        "exact_match": exact,
        "length_ratio": [1.0, 0.0, 40.0, None][row % 4],
    } | rest


SAMPLES = [sample(row, exact) for row, exact in enumerate((True, False, False, True))]
BASES = [sample(row, exact, response=f"base {row}") for row, exact in enumerate((True, True, False, False))]
DIFFERENCE = estimate(0.05) | {"p_value": 0.0004, "gained": 1, "lost": 1}


class Document(HTMLParser):
    """Tags, and the text of table rows and of answers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.samples: list[dict[str, str | None]] = []
        self.rows: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "article":
            self.samples.append(dict(attrs))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows:
            self.rows[-1] += f" {data.strip()}"


def both(**rest: Any) -> Document:
    content = metrics(differences={"exact_match": DIFFERENCE, "eos_rate": DIFFERENCE})
    return Document(render_evaluation_report(content | rest, SAMPLES, metrics(0.3), BASES))


def test_every_metric_is_shown_with_its_interval_base_and_difference() -> None:
    """Each metric has a row with its definition; compared metrics carry the paired difference and p."""
    document = both()
    for text in METRIC_TEXTS.values():
        assert any(
            text.label in row and "0.500 [0.40, 0.60]" in row and "0.300 [0.20, 0.40]" in row for row in document.rows
        )
    row = next(row for row in document.rows if "Exact match" in row and "Answers equal" in row)
    assert "+0.050 [-0.05, +0.15]" in row
    assert "< 0.001" in row
    assert "4 1 excluded" in row


def test_one_model_needs_no_base() -> None:
    """Without a base there is no comparison: no forest plot, no change filter."""
    document = Document(render_evaluation_report(metrics(), SAMPLES))
    assert "Difference to the base" not in document.text
    assert document.tags.count("svg") == 1
    assert "data-change" not in document.samples[0]
    assert both().tags.count("svg") == 2


def test_output_health_lists_stops_and_flags() -> None:
    """Stop reasons with counts and shares, the rate of each flag."""
    rows = " | ".join(both().rows)
    assert re.search(r"cut at max_new_tokens\s+1 \(0\.250\)\s+1 \(0\.250\)", rows)
    assert re.search(r"loop\s+0\.250 \[0\.15, 0\.35\]", rows)


def test_lost_rows_come_first_and_can_be_filtered() -> None:
    """Rows right in the base and wrong now lead; filters know task, flags and change of each row."""
    assert [row["row"] for row, _ in order_rows(SAMPLES, BASES)] == [1, 0, 2, 3]
    samples = both().samples
    assert [json.loads(str(attributes["data-change"])) for attributes in samples] == [
        ["lost"],
        ["same"],
        ["same"],
        ["gained"],
    ]
    assert json.loads(str(samples[0]["data-flag"])) == ["loop"]
    assert json.loads(str(samples[0]["data-task"])) == ["count"]


def test_all_four_texts_of_a_row_stand_side_by_side() -> None:
    """Prompt, reference, base and tuned answer are all on the page."""
    text = both().text
    for expected in ("question 2", "yes", "base 2", "answer 2"):
        assert expected in text


@pytest.mark.parametrize("field", ["prompt", "reference", "response", "task_type", "source"])
def test_model_text_is_inert(field: str) -> None:
    """Markup in any text of a row makes no element; a bidirectional override is spelled out."""
    usual = [dict(row, task_type="usual") for row in SAMPLES]
    hostile = [dict(row, task_type="usual") | {field: HOSTILE} for row in SAMPLES]
    document = Document(render_evaluation_report(metrics(), hostile))
    assert document.tags == Document(render_evaluation_report(metrics(), usual)).tags
    assert "</pre><script>alert(1)</script>\u27e8U+202E\u27e9" in document.text
    assert "\u202e" not in document.text


def test_provenance_is_text_too() -> None:
    """Everything in `info` is listed; a model's name is not markup."""
    document = both()
    assert "Evaluation of tiny <b>" in document.text
    assert any('{"do_sample": false}' in row for row in document.rows)
    assert "b" not in document.tags


def test_no_rows_and_no_values_still_make_a_page() -> None:
    """n = 0 renders: no value, no answers, an empty histogram."""
    empty = metrics(n=0, stop_reasons={}, task_types={}, metrics={name: estimate(None, 0) for name in METRIC_TEXTS})
    differences = {"exact_match": estimate(None, 0) | {"p_value": None}}
    document = Document(render_evaluation_report(empty | {"differences": differences}, [], empty, []))
    assert any("Exact match" in row and "none" in row for row in document.rows)


def test_many_rows_are_cut_and_said_so() -> None:
    """The page shows a bounded number of answers and names the total."""
    many = [sample(row, True) for row in range(SHOWN_SAMPLES + 5)]
    document = Document(render_evaluation_report(metrics(), many))
    assert len(document.samples) == SHOWN_SAMPLES
    assert f"of {SHOWN_SAMPLES + 5} shown" in document.text


def test_without_matplotlib_the_report_is_written_with_notes(monkeypatch) -> None:
    """Figures are replaced by a visible note that says how to get them; the rest of the report is there."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    document = both()
    assert document.text.count("pip install 'sft-recipes[report]'") == 2
    assert "svg" not in document.tags
    assert "answer 2" in document.text
