"""The evaluation report shows the numbers it was given, and text as text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.report.evaluation_answers import SHOWN_SAMPLES
from sft_recipes.report.evaluation_parts import order_rows
from sft_recipes.report.evaluation_report import render_evaluation_report
from sft_recipes.response_patterns import opener

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


def described(value: float | None, n: int = 4) -> dict[str, Any]:
    """An estimate of every metric, as `metrics.json` holds it."""
    words = ("label", "definition", "group", "headline")
    return {
        name: estimate(value, n) | {word: getattr(metric, word) for word in words}
        for name, metric in METRICS.items()
    }


def metrics(value: float = 0.5, **rest: Any) -> dict[str, Any]:
    return {
        "info": {"model": "tiny <b>", "decoding": {"do_sample": False}},
        "n": 4,
        "rows": 4,
        "metrics": described(value),
        "flags": {"loop": estimate(0.25), "empty": estimate(0.0)},
        "stop_reasons": {"eos": 3, "length": 1},
        "task_types": {"count": estimate(0.75)},
    } | rest


def sample(row: int, exact: bool, **rest: Any) -> dict[str, Any]:
    made = {
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
    return {"opener": opener(made["response"])} | made


SAMPLES = [sample(row, exact) for row, exact in enumerate((True, False, False, True))]
BASES = [
    sample(row, exact, response=f"base {row}")
    for row, exact in enumerate((True, True, False, False))
]
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
    """Each metric has a row with its definition; compared metrics carry the paired difference and
    p."""
    document = both()
    for metric in METRICS.values():
        (row,) = [row for row in document.rows if f" {metric.label} {metric.definition}" in row]
        assert "0.500 [0.40, 0.60]" in row and "0.300 [0.20, 0.40]" in row
    groups = [metric.group for metric in METRICS.values()]
    headings = [row.strip() for row in document.rows if row.strip() in groups]
    assert headings == list(dict.fromkeys(groups))
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
    assert re.search(r"cut at the token limit\s+1 \(0\.250\)\s+1 \(0\.250\)", rows)
    assert re.search(r"Loops\s+0\.250 \[0\.15, 0\.35\]", rows)


def test_lost_rows_come_first_and_can_be_filtered() -> None:
    """Rows right in the base and wrong now lead; filters know task, flags and change of each
    row."""
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


def system(name: str, **rest: Any) -> dict[str, Any]:
    content = {
        "metrics": metrics()["metrics"],
        "differences": {"exact_match": DIFFERENCE},
        "changed": {},
    }
    return {"name": name, "rows_trained": None, "on_curve": False, **content, **rest}


def full(name: str = "other", task: str = "count") -> dict[str, Any]:
    """Everything that an evaluation can hold; `name` and `task` stand wherever data names
    something."""
    refused = [
        {"model": "tuned", "format": "template", "label": label} | estimate(0.5)
        for label in ("safe", "unsafe")
    ]
    line = {
        "name": "exact_match",
        "compared_with": None,
        "group": task,
        "side": "at_least",
        "limit": 0.5,
        "bound": 0.4,
    }
    formats = {
        "template": {"tuned": {name: estimate(0.5) for name in ("exact_match", "template_leak")}}
    }
    rule = {"n": 9, "precision": 0.9, "recall": 0.8}
    changed = {"recipe": {"max_rows": [50, None], name: [name, name]}, "data": {"rows": [50, 100]}}
    return {
        "gate": {"verdict": "fail", "exit_code": 1, "smoke": False}
        | {"lines": [line | estimate(0.5) | {"n_min": 4, "verdict": "fail"}]},
        "comparisons": [
            system("base"),
            system(name, rows_trained=50, on_curve=True, changed=changed),
        ],
        "task_types": {task: estimate(0.75)},
        "task_differences": {task: {"training_rows": 0, "p_holm": 0.02} | DIFFERENCE},
        "format_overfitting": {
            "n": 4,
            "formats": formats,
            "indicators": {},
            "format_spread": {"exact_match": 0.25, "completion_rate": None},
        },
        "training_curves": {
            "loss": [[1, 2.0], [2, 1.0]],
            "eval_loss": [[1, 1.5]],
            "eval_exact_match": [[1, 0.5]],
        },
        "safety": {
            "prompts": name,
            "n_min": 200,
            "rule": rule,
            "refused": refused,
            "indicators": {},
        }
        | {
            "complied": [
                {
                    "model": "tuned",
                    "format": name,
                    "source": name,
                    "row": 1,
                    "prompt": name,
                    "response": name,
                }
            ]
        },
    }


ORDER = [
    "Verdict",
    "Gate",
    "Answers",
    "Differences",
    "Metrics",
    "Task types",
    "Format overfitting",
    "Health of the output",
]
ORDER += ["During training", "Safety", "Provenance"]


def test_sections_stand_in_order_and_only_with_content() -> None:
    """What was found decides what is shown; the verdict comes first, provenance last."""

    def titles(html: str) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", html)

    assert titles(render_evaluation_report(metrics(**full()), SAMPLES, metrics(), BASES)) == ORDER
    few = titles(render_evaluation_report(metrics(task_types={}), SAMPLES))
    assert few == ["Verdict", "Answers", "Metrics", "Health of the output", "Provenance"]


def test_systems_stand_side_by_side_with_what_else_differs() -> None:
    """One column each, paired difference with n and p; keys that differ; the learning curve; losses
    and scores."""
    document = both(**full("runs/half"))
    row = next(row for row in document.rows if row.count("+0.050 [-0.05, +0.15]") == 2)
    assert row.count("n 4, p < 0.001") == 2
    assert any(
        re.search(r"runs/half\s+recipe: max_rows\s+50\s+not set", row) for row in document.rows
    )
    for title in (
        "Learning curve",
        "Loss; best on held-out rows at step 1",
        "Scores while training",
    ):
        assert title in document.text
    # Forest plot, learning curve, formats, lengths, losses, scores; one bar of the gate.
    assert document.tags.count("svg") == 7


def test_a_task_type_shows_test_and_whether_training_had_it() -> None:
    """n, both values, difference, discordant pairs, p alone and by Holm; none in the training data
    is marked."""
    row = next(
        row for row in both(**full()).rows if "+0.050 [-0.05, +0.15]" in row and "1 / 1" in row
    )
    assert re.search(r"count\s+none\s+4 .*1 / 1\s+< 0\.001\s+0\.020", row)


def test_openers_and_ends_of_answers() -> None:
    """What ended the answers as a bar of shares; the first four words of longer answers with their
    share."""
    rows = [sample(row, True, response="Sure, here is the answer.") for row in range(3)] + [
        sample(3, True)
    ]
    html = render_evaluation_report(metrics(), rows)
    assert (
        'class="eos" style="width: 75.0%"' in html and 'class="length" style="width: 25.0%"' in html
    )
    assert any(re.search(r"sure, here is the\s+3\s+1\.000", row) for row in Document(html).rows)


def test_names_are_inert_everywhere() -> None:
    """Markup in the name of a run, a key, a task type or any text beside the answers makes no
    element."""
    plain = render_evaluation_report(
        metrics(**full("usual", "usual")),
        SAMPLES,
        metrics(0.3, task_types={"usual": estimate(0.1)}),
        BASES,
    )
    hostile = render_evaluation_report(
        metrics(**full(HOSTILE, HOSTILE)),
        SAMPLES,
        metrics(0.3, task_types={HOSTILE: estimate(0.1)}),
        BASES,
    )
    assert Document(hostile).tags == Document(plain).tags
    assert "\u202e" not in hostile and "<script>alert" not in hostile
    assert Document(hostile).text.count("</pre><script>alert(1)</script>\u27e8U+202E\u27e9") > 10


def test_no_rows_and_no_values_still_make_a_page() -> None:
    """n = 0 renders: no value, no answers, an empty histogram."""
    empty = metrics(
        n=0,
        stop_reasons={},
        task_types={},
        metrics=described(None, 0),
    )
    differences = {"exact_match": estimate(None, 0) | {"p_value": None}}
    document = Document(
        render_evaluation_report(empty | {"differences": differences}, [], empty, [])
    )
    assert "No rows were answered" in document.text
    assert not any("Exact match" in row for row in document.rows if "Answers equal" in row)


def test_many_rows_are_cut_and_said_so() -> None:
    """The page shows a bounded number of answers and names the total."""
    many = [sample(row, True) for row in range(SHOWN_SAMPLES + 5)]
    document = Document(render_evaluation_report(metrics(), many))
    assert len(document.samples) == SHOWN_SAMPLES
    assert f"of {SHOWN_SAMPLES + 5} shown" in document.text


def test_without_matplotlib_the_report_is_written_with_notes(monkeypatch) -> None:
    """Figures are replaced by a visible note that says how to get them; the rest of the report is
    there."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    document = both()
    assert document.text.count("pip install 'sft-recipes[report]'") == 2
    assert "svg" not in document.tags
    assert "answer 2" in document.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/runs/mine", "mine"),
        ("../runs/mine/", "mine"),
        ("C:\\runs\\mine", "mine"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("runs/mine", "runs/mine"),
        ("/", "/"),
    ],
)
def test_the_title_shows_no_path_of_a_machine(name: str, shown: str) -> None:
    """Of a path the last part, a name of the Hub as it is."""
    page = render_evaluation_report(metrics(info={"model": name}), SAMPLES)
    assert f"<title>Evaluation of {shown}</title>" in page


def test_the_card_shows_four_figures_of_base_and_tuned() -> None:
    """With both intervals and n; the verdict's sentence and every warning stand above them."""
    document = both(warnings=["a warning"], rows=4)
    assert (
        "The tuned model answers 2 of 4 rows as expected (50 %), the base 1 (30 %)" in document.text
    )
    words = " ".join(document.text.split())
    assert "Answered as expected 30 % → 50 % 20 to 40 % → 40 to 60 %, n 4" in words
    assert words.count("20 to 40 % → 40 to 60 %") == 4
    assert words.index("a warning") < words.index("Answered as expected")


def test_the_gate_shows_the_base_and_folds_what_was_not_judged() -> None:
    """The base's own value of metric, flag or task type stands beside each bound."""
    gate = full()["gate"]
    line = gate["lines"][0]
    lines = [
        line | {"group": ""},
        line,
        line | {"name": "flag loop", "group": "", "verdict": "insufficient_n"},
    ]
    base = metrics(0.3)
    page = render_evaluation_report(metrics(gate=gate | {"lines": lines}), SAMPLES, base, BASES)
    section = page[page.index("<h2>Gate</h2>") : page.index("<h2>Answers</h2>")]
    rows = [" ".join(row.split()) for row in Document(section).rows]
    assert any(row.startswith("Exact match fail 0.300 0.500") for row in rows)
    assert any(row.startswith("Exact match: count fail 0.750 0.500") for row in rows)
    folded = section[section.index("<details") :]
    assert "1 not judged" in folded and "Answer loops" in folded and "too few rows" in folded
    assert "Exact match" not in folded


def test_words_that_differ_are_marked() -> None:
    """The surplus of an answer, and nothing in an answer that is what was expected."""
    rows = [sample(0, False, reference="4, 20", response="4, 20, 20")]
    page = render_evaluation_report(metrics(), rows)
    assert "<pre>4, 20<mark>, 20</mark></pre>" in page
    rows = [sample(0, True, reference="4, 20", response="4, 20")]
    assert "<mark>" not in render_evaluation_report(metrics(), rows)


def test_the_question_stands_without_the_template_around_it() -> None:
    """What the model read is folded below it."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]
    rows = [sample(0, True, prompt="<s>### Instruction: Why?", messages=turns)]
    page = render_evaluation_report(metrics(), rows)
    assert "<h3>Question</h3><pre>Why?</pre>" in page
    assert "<summary>as the model read it</summary><pre>&lt;s&gt;### Instruction: Why?" in page
