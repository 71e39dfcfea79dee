"""The audit report shows what audit.json says, in order, and text as text."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.report.audit_report import render, write_audit_report
from sft_recipes.report.page import new_figure
from tests.audit.planted import plant
from tests.report.document import Document

Audit = dict[str, Any]
MakeAudit = Callable[..., Audit]

TITLES = [
    "Verdict",
    "Broken rows, and what cleaning drops",
    "Rows that are too long",
    "Lengths",
    "Duplicates",
    "Overlap with evaluation data",
    "Patterns",
    "Diversity",
    "Private data",
    "Control tokens in the text",
    "Sample rows",
    "Definitions and settings",
]
# The sections that say what a tokenizer would add.
NEED_TOKENIZER = [
    "Verdict",
    "Rows that are too long",
    "Lengths",
    "Control tokens in the text",
    "Sample rows",
]
HOSTILE = (
    "</pre></mark><script>alert(1)</script>\u202e<img src=x onerror=alert(1)>\"'`&{{ 7 * 7 }} "
)
HARMLESS = "a" * (len(HOSTILE) - 1) + " "
ROW = {"prompt": "What is the capital of France?", "completion": "Paris."}


@pytest.fixture(scope="module")
def planted(make_audit: MakeAudit) -> Audit:
    """The audit of rows with every kind of fault, compared with some of them as evaluation data."""
    rows: list[Any] = []
    for example in plant(clean=200, each=5).examples:
        user, answer = example.messages
        rows.append({"prompt": user["content"], "completion": answer["content"]})
    return make_audit([*rows, {"prompt": 3, "completion": "x"}], held_out=rows[:20])


@pytest.fixture(scope="module")
def page(planted: Audit) -> Document:
    return Document(render(planted))


def percent(share: float) -> str:
    return "below 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def cells(page: Document) -> list[list[str]]:
    """All table rows of the page, white space joined."""
    rows = []
    for row in page.rows:
        rows.append([" ".join(cell.split()) for cell in row])
    return rows


def test_sections_stand_in_their_order(page: Document) -> None:
    """All twelve sections, always in the same order.

    Every link leads to something on the page.
    """
    assert list(page.sections) == TITLES
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    own = [name for name in page.ids if name.startswith(("section-", "check-"))]
    assert len(own) == len(set(own))


def test_every_finding_is_shown_once_with_all_that_is_known(planted: Audit, page: Document) -> None:
    """Severity, count, share, definition, what to do and examples, in the section of the check."""
    assert len(planted["findings"]) > 20
    words = {"error": "Error", "warning": "Warning", "info": "Note"}
    for finding in planted["findings"]:
        text = " ".join(page.sections[page.articles[finding["check"]]].split())
        share = percent(finding["share"])
        amount = f"{finding['count']:,} of {finding['n']:,} rows ({share})"
        word = words[finding["severity"]]
        assert f"{word} {capital(finding['title'])} {amount}" in text
        assert letters(finding["definition"]) in letters(text)
        assert letters(finding["fix"]) in letters(text)
        for example in finding["examples"][:5]:
            assert example["where"].rpartition("/")[2] in text
    assert page.articles["duplicate_row"] == "Duplicates"
    assert page.articles["identity"] == "Patterns"
    assert page.articles["template_variant"] == "Duplicates"


def capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def letters(text: str) -> str:
    """The text without spaces and the marks of code."""
    return "".join(text.replace("`", "").split())


def test_a_check_that_no_section_names_is_not_lost(planted: Audit) -> None:
    """A finding of an unknown check stands with the broken rows."""
    changed = copy.deepcopy(planted)
    changed["findings"][-1]["check"] = "brand_new"
    assert Document(render(changed)).articles["brand_new"] == TITLES[1]


def test_the_verdict_counts_rows_and_findings(planted: Audit, page: Document) -> None:
    """Rows in, rows kept, number of errors, warnings and notes, and where all this comes from."""
    text = " ".join(page.sections["Verdict"].split())
    kept = planted["rows_in"] - sum(step["rows"] for step in planted["waterfall"])
    assert kept < planted["rows_in"]
    severities = Counter(finding["severity"] for finding in planted["findings"])
    counts = [
        plural(severities["error"], "error"),
        plural(severities["warning"], "warning"),
        plural(severities["info"], "note"),
    ]
    rows = f"{planted['rows_in']} rows in the data {kept} rows left after cleaning"
    assert text.startswith(f"{rows} {' '.join(counts)}")
    assert planted["files"][0]["sha256"] in text
    assert planted["settings"]["template_sha256"][:16] in text
    assert f"It took {planted['seconds']} seconds." in text


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def test_cleaning_shows_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """Rows that each check drops, those under it for any reason, and a bar of what is kept."""
    rows = cells(page)
    checks = {finding["check"]: finding for finding in (*planted["findings"], *planted["passed"])}
    kept = planted["rows_in"]
    for step in planted["waterfall"]:
        kept -= step["rows"]
        if step["reason"] in checks:
            check = checks[step["reason"]]
            dropped = f"−{step['rows']:,}" if step["rows"] else "0"
            assert [capital(check["title"]), dropped, "", f"{check['count']:,}"] in rows
    assert f"width:{100 * kept / planted['rows_in']:.2f}%" in page.styles


def test_max_lengths_show_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """What each max_length costs, in rows and in trained tokens."""
    rows = cells(page)
    for cost in planted["truncation"]:
        expected = [
            f"{cost['max_length']:,}",
            f"{cost['rows_cut']:,}",
            f"{cost['answers_lost']:,}",
            f"{cost['trained_tokens_lost']:,} ({percent(cost['share'])})",
            f"{cost['trained_tokens_dropped']:,} ({percent(cost['share_dropped'])})",
        ]
        assert expected in rows


@pytest.mark.parametrize(
    "name",
    ["prompt_words", "response_words", "prompt_tokens", "response_tokens", "total_tokens"],
)
def test_lengths_show_the_numbers_of_the_json(planted: Audit, page: Document, name: str) -> None:
    """Extremes, mean and quantiles of each length stand in one table row."""
    numbers = planted["lengths"][name]
    expected = []
    for key in ("min", "median", "mean", "p90", "p99", "max"):
        expected.append(f"{numbers[key]:,.0f}")
    assert expected in [row[1:] for row in cells(page)]


def test_duplicates_show_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """Each kind of exact repeat with count and share."""
    shown = [row[1:3] for row in cells(page)]
    for number in planted["duplicates"]["exact"].values():
        assert [f"{number:,}", percent(number / planted["duplicates"]["rows"])] in shown


def test_overlaps_show_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """Of each evaluation set rows, hits, training rows to remove, and hits by rule."""
    (table,) = planted["contamination"]
    expected = [
        table["name"],
        f"{table['rows']:,}",
        f"{table['rows_hit']:,} ({percent(table['share'])})",
        f"{table['train_rows']:,}",
    ]
    for number in table["rows_hit_by_rule"].values():
        expected.append(f"{number:,}")
    assert expected in cells(page)


@pytest.mark.parametrize("kind", ["instruction_openers", "response_openers"])
def test_openers_show_the_numbers_of_the_json(planted: Audit, page: Document, kind: str) -> None:
    """Each opener with count and share."""
    openers = planted["patterns"][kind]["top"]
    assert openers
    rows = cells(page)
    for opener in openers:
        assert [opener["text"], f"{opener['rows']:,}", percent(opener["share"]), ""] in rows


def test_diversity_shows_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """Unique shares with the number of rows they are of."""
    shown = [row[1:] for row in cells(page)]
    for share in planted["diversity"]["unique"].values():
        assert [f"{planted['rows_read']:,} rows", f"{share:.3f}"] in shown


def test_private_data_shows_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """Each kind of private data with its count."""
    assert planted["private_data"]
    rows = cells(page)
    for kind, number in planted["private_data"].items():
        assert [kind.replace("_", " "), f"{number:,}"] in rows


def test_group_sizes_add_up(planted: Audit) -> None:
    """Every near-duplicate group is counted in one range of sizes, the largest included."""
    changed = copy.deepcopy(planted)
    changed["duplicates"]["near"] |= {
        "rows": 9,
        "clusters_by_size": {"2": 4, "5": 3, "10": 2, "11": 1, "7000": 1},
    }
    groups = []
    for row in cells(Document(render(changed))):
        if len(row) == 4 and re.fullmatch(r"\d.* rows", row[0]):
            groups.append(row[:2])
    assert groups == [
        ["2 rows", "4"],
        ["4 to 5 rows", "3"],
        ["6 to 10 rows", "2"],
        ["11 to 20 rows", "1"],
        ["51 or more rows", "1"],
    ]


def test_trained_text_is_marked_as_it_is(planted: Audit, page: Document) -> None:
    """The marked texts of the sample rows are the trained ones, white space included."""
    trained = set()
    for sample in (*planted["samples"]["kept"], *planted["samples"]["dropped"]):
        # An answer and its end token are two parts of the row and one mark.
        text = "".join(text for text, is_trained in sample["text"] if is_trained)
        if len(text) <= 800 and text.isprintable():
            trained.add(text)
    assert len(trained) > 10
    assert trained <= set(page.trained)


def test_checks_and_kinds_stand_in_words(make_audit: MakeAudit) -> None:
    """Steps of cleaning that were not checked, formats of files and kinds of private data are named as
    people would; a check's own name stands only where `--drop` and `flagged.jsonl` need it.
    """
    secret = {"prompt": "Keep it.", "completion": 'Write password = "q7Hx92-bKd0p" there.'}
    audit = make_audit([ROW, secret], tokenizer=False)
    html = render(audit)
    page = Document(html)
    assert audit["waterfall"][-1]["reason"] == "contamination"
    cleaning = page.sections["Broken rows, and what cleaning drops"]
    assert "Training rows that stand in an evaluation set not checked here" in cleaning
    assert "JSON Lines: prompts with their completions" in page.sections["Verdict"]
    assert "assistant (turn 2): assigned secret" in page.sections["Private data"]
    without_code = re.sub(r"<code>.*?</code>", "", html)
    for check in (*audit["findings"], *audit["passed"]):
        if "_" in check["check"]:
            assert f">{check['check']}<" not in without_code


@pytest.mark.parametrize(
    ("low", "high"),
    [(36, 38), (36, 60), (7, 7), (1, 1), (0, 3), (900, 450_000), (1000, 999_000), (1, 4_000_000)],
)
@pytest.mark.parametrize("name", ["x", "y"])
def test_labels_of_an_axis_stay_apart(low: float, high: float, name: str) -> None:
    """From one length to millions of them, the labels that are drawn do not touch, and there is one."""
    from sft_recipes.report.audit_figures import _count_axis

    drawing = new_figure(5.6, 2.3)
    _count_axis(drawing.axes, name, [low, high], "tokens")
    drawing.figure.draw_without_rendering()
    labels = getattr(drawing.axes, f"get_{name}ticklabels")()
    boxes = [label.get_window_extent() for label in labels]
    assert boxes
    for before, after in itertools.pairwise(boxes):
        assert not before.overlaps(after)
    if high > 1.5 * low > 0:
        assert len(boxes) > 1


@pytest.mark.parametrize("tokenizer", [True, False])
def test_one_row_without_findings(make_audit: MakeAudit, tokenizer: bool) -> None:
    """A single good row makes a whole page that says what was looked for.

    It also says what a tokenizer or test data would add.
    """
    audit = make_audit([ROW], tokenizer=tokenizer, limit=None)
    page = Document(render(audit))
    assert audit["findings"] == []
    assert list(page.sections) == TITLES
    assert page.articles.keys() <= {""}
    assert f"None of the {len(audit['passed'])} checks found anything." in page.sections["Verdict"]
    shown = " ".join(page.sections.values()).lower()
    for check in audit["passed"]:
        assert check["title"].lower() in shown
    needed = [title for title in TITLES if "--tokenizer" in page.sections[title]]
    assert needed == ([] if tokenizer else NEED_TOKENIZER)
    assert "--eval_data FILE" in page.sections["Overlap with evaluation data"]
    assert [tag for tag, _ in page.tags].count("svg") == (4 if tokenizer else 3)


# Keys whose values no data can change.
OUR_OWN = ("check", "severity", "reason", "reasons", "seconds", "schema_version", "drop", "unit")


def replaced(value: Any, text: str, key: str = "") -> Any:
    """The audit with every text that comes from outside set to `text`.

    The second text of a pair is another one.
    """
    if isinstance(value, dict):
        changed = {}
        for number, (name, item) in enumerate(value.items()):
            shown_name = f"{text}{number}" if key in ("private_data", "versions") else name
            changed[shown_name] = item if name in OUR_OWN else replaced(item, text, name)
        return changed
    if isinstance(value, list) and key == "texts":
        return [text, f"{text}other"]
    if isinstance(value, list):
        return [replaced(item, text, key) for item in value]
    return text if isinstance(value, str) else value


def test_text_makes_no_element_and_no_attribute(planted: Audit) -> None:
    """With hostile text in every place the page has the elements of a harmless one.

    Hidden characters are spelled.
    """
    assert planted["duplicates"]["near"]["just_above"]
    assert planted["contamination"][0]["hits"]
    hostile = render(replaced(planted, HOSTILE))
    harmless = render(replaced(planted, HARMLESS))
    assert Document(hostile).tags == Document(harmless).tags
    assert HOSTILE.count("\u202e") == 1
    assert "\u202e" not in hostile
    assert "\u27e8U+202E\u27e9" in hostile
    assert "<script" not in hostile
    assert "{{ 7 * 7 }}" in hostile


def test_long_texts_are_cut_with_their_length(planted: Audit) -> None:
    """Texts of a megabyte leave a page of some kilobytes that says how much is missing.

    Short ones stay whole.
    """
    long = "ab " * 300_000
    changed = copy.deepcopy(planted)
    changed["samples"]["kept"][0]["text"] = [
        ["<start>" + long + "<end>", False],
        ["b" * 750, True],
        ["c" * 2_000, False],
    ]
    turns = [["turn", bool(number % 2)] for number in range(40)]
    changed["samples"]["kept"][1]["text"] = turns
    changed["findings"][0]["examples"][0]["detail"] = long
    changed["findings"][0]["examples"][0]["related"] = ["rows.jsonl:1"] * 50_000
    changed["lengths"]["longest"][0]["prompt"] = long
    changed["patterns"]["response_openers"]["top"][0]["text"] = long
    html = render(changed)
    assert len(html) < len(render(planted)) + 10_000
    for note in (
        "899,214 characters not shown",
        "1,202 characters not shown",
        "Not shown: 28 more parts of this row",
        "and 49,997 more",
    ):
        assert note in html
    assert "&lt;start&gt;ab" in html and "&lt;end&gt;" in html and "b" * 750 in html


def test_the_report_is_written_beside_its_json(
    planted: Audit, page: Document, tmp_path: Path
) -> None:
    """The file holds what `render` returns, each time, and asks for nothing outside itself."""
    (tmp_path / "audit.json").write_text(json.dumps(planted), encoding="utf-8")
    path = write_audit_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(planted)
    for _, names in page.tags:
        assert not set(names) & {"src", "srcset", "action", "onclick", "onload"}


def test_without_matplotlib_the_numbers_stay(
    planted: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures give way to a note with the fix, and the tables stay."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Document(render(planted))
    assert page.sections["Lengths"].count("pip install") == 3
    assert "svg" not in [tag for tag, _ in page.tags]
    assert list(page.sections) == TITLES


def test_overlaps_show_both_texts_and_mark_what_they_share(make_audit: MakeAudit) -> None:
    """Evaluation and training text stand side by side, the overlap alone marked."""
    shared = (
        "a merchant from the coast sends three carts of salt to the market behind the mountains"
    )
    train = {"prompt": f"Now {shared} ?", "completion": "Yes."}
    held_out = {"prompt": f"So {shared} !", "completion": "Yes."}
    html = render(make_audit([train], held_out=[held_out]))
    assert f"Now<mark> {shared} </mark>?" in html
    assert f"So<mark> {shared} </mark>!" in html


def test_samples_without_a_tokenizer_say_who_speaks(make_audit: MakeAudit) -> None:
    """The role stands before each turn, and only the assistant's words are marked."""
    page = Document(render(make_audit([ROW], tokenizer=False)))
    assert "user: What is the capital of France?\nassistant: Paris." in page.sections["Sample rows"]
    assert [text for text in page.trained if text] == ["Paris."]
