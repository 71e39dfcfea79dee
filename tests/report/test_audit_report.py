"""The audit report shows what audit.json says, in order, and text as text."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.audit.audit import AuditRequest, run_audit
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings
from sft_recipes.report.audit_report import compare, render, write_audit_report
from tests.audit.planted import plant

Audit = dict[str, Any]
MakeAudit = Callable[..., Audit]

TITLES = [
    *(
        "Verdict",
        "Broken rows, and what cleaning drops",
        "Rows that are too long",
        "Lengths",
        "Duplicates",
    ),
    *(
        "Overlap with evaluation data",
        "Patterns",
        "Diversity",
        "Scripts",
        "Private data",
        "Control tokens in the text",
    ),
    *("Sample rows", "Definitions and settings"),
]
HOSTILE = (
    "</pre></mark><script>alert(1)</script>\u202e<img src=x onerror=alert(1)>\"'`&{{ 7 * 7 }} "
)
HARMLESS = "a" * (len(HOSTILE) - 1) + " "
ROW = {"prompt": "What is the capital of France?", "completion": "Paris."}


class Document(HTMLParser):
    """Tags and attributes in order, and for each section its heading, text, table rows and marked pieces."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.links: list[str] = []
        self.styles: list[str] = []
        self.ids: list[str] = []
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.trained: list[str] = []
        self.articles: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self._heading = self._article = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, [name for name, _ in attrs]))
        if tag not in ("meta", "br", "img", "path", "use", "rect", "link"):
            self._open.append((tag, values.get("class", "")))
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.styles += [values["style"]] if "style" in values else []
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "mark" and values.get("class") == "trained":
            self.trained.append("")
        if tag == "article":
            self._article = values.get("id", "").removeprefix("check-")
            self.articles.setdefault(self._article, self._heading)
        if tag == "h2":
            self._heading = ""

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self._open]
        if inside and inside[-1] == "h2":
            self._heading += data
            return
        if self._heading:
            self.sections[self._heading] = self.sections.get(self._heading, "") + data
        if "td" in inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        if ("mark", "trained") in self._open and "pre" in inside:
            self.trained[-1] += data


@pytest.fixture(scope="module")
def make_audit(
    make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> MakeAudit:
    """Audit rows, with the tests' tokenizer and ChatML or without, and return what audit.json holds."""
    renderer = attach_chat_template(make_tokenizer(), TemplateSettings(chat_template="chatml"))

    def make(
        rows: Sequence[Any],
        held_out: Sequence[Any] = (),
        tokenizer: bool = True,
        limit: int | None = 60,
    ) -> Audit:
        folder = tmp_path_factory.mktemp("audit")
        for name, some in {"rows": rows, "test": held_out}.items():
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in some), encoding="utf-8"
            )
        data = DataSettings(datasets=(DatasetSource(str(folder / "rows.jsonl")),))
        others = {"test.jsonl": DatasetSource(str(folder / "test.jsonl"))} if held_out else {}
        chosen = renderer if tokenizer else None
        settings = LabelSettings(max_length=limit)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sft_recipes.audit.audit.write_audit_report", lambda folder: None)
            run_audit(
                AuditRequest("rows", data, settings, folder / "out", chosen, others, progress=False)
            )
        return json.loads((folder / "out" / "audit.json").read_text(encoding="utf-8"))

    return make


@pytest.fixture(scope="module")
def planted(make_audit: MakeAudit) -> Audit:
    """The audit of rows that hold every kind of fault, compared with some of them as evaluation data."""
    messages = [example.messages for example in plant(clean=200, each=5).examples]
    rows = [
        {"prompt": user["content"], "completion": answer["content"]} for user, answer in messages
    ]
    return make_audit([*rows, {"prompt": 3, "completion": "x"}], held_out=rows[:20])


@pytest.fixture(scope="module")
def page(planted: Audit) -> Document:
    return Document(render(planted))


def percent(share: float) -> str:
    return "below 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def cells(page: Document) -> list[list[str]]:
    """All table rows of the page, white space joined."""
    return [[" ".join(cell.split()) for cell in row] for row in page.rows]


def test_sections_stand_in_their_order(page: Document) -> None:
    """All thirteen sections, always in the same order, and every link leads to something on the page."""
    assert list(page.sections) == TITLES
    assert page.links and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    own = [name for name in page.ids if name.startswith(("section-", "check-"))]
    assert len(own) == len(set(own))


def test_every_finding_is_shown_once_with_all_that_is_known(planted: Audit, page: Document) -> None:
    """Severity word, count, share, definition, what to do and examples by file and line, in one section."""
    assert len(planted["findings"]) > 20
    for one in planted["findings"]:
        text = " ".join(page.sections[page.articles[one["check"]]].split())
        expected = f"{one['count']:,} of {one['n']:,} rows ({percent(one['share'])})"
        assert expected in text
        for part in (one["definition"], one["fix"]):
            assert "".join(part.replace("`", "").split()) in "".join(text.replace("`", "").split())
        word = {"error": "Error", "warning": "Warning", "info": "Note"}[one["severity"]]
        title = one["title"][:1].upper() + one["title"][1:]
        assert f"{word} {title} {expected}" in text
        for example in one["examples"][:5]:
            assert example["where"].rpartition("/")[2] in text
    assert (
        page.articles["duplicate_row"] == "Duplicates" and page.articles["identity"] == "Patterns"
    )


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
    levels = [
        sum(one["severity"] == level for one in planted["findings"])
        for level in ("error", "warning", "info")
    ]
    words = [
        f"{n} {word}{'s' * (n != 1)}"
        for n, word in zip(levels, ("error", "warning", "note"), strict=True)
    ]
    assert text.startswith(
        f"{planted['rows_in']} rows in the data {kept} rows left after cleaning {' '.join(words)}"
    )
    assert (
        planted["files"][0]["sha256"] in text
        and planted["settings"]["template_sha256"][:16] in text
    )
    assert f"It took {planted['seconds']} seconds." in text


def test_tables_show_the_numbers_of_the_json(planted: Audit, page: Document) -> None:
    """What cleaning drops, what each max_length costs, lengths, exact duplicates, and overlap with evaluation data."""
    rows = cells(page)
    counted = {one["check"]: one for one in (*planted["findings"], *planted["passed"])}
    for step in planted["waterfall"]:
        if step["reason"] in counted:
            any_reason = counted[step["reason"]]["count"]
            shown = f"−{step['rows']:,}" if step["rows"] else "0"
            title = counted[step["reason"]]["title"]
            assert [title[:1].upper() + title[1:], shown, "", f"{any_reason:,}"] in rows
    for one in planted["truncation"]:
        lost = f"{one['trained_tokens_lost']:,} ({percent(one['share'])})"
        dropped = f"{one['trained_tokens_dropped']:,} ({percent(one['share_dropped'])})"
        assert [
            f"{one['max_length']:,}",
            f"{one['rows_cut']:,}",
            f"{one['answers_lost']:,}",
            lost,
            dropped,
        ] in rows
    for name in (
        "prompt_words",
        "response_words",
        "prompt_tokens",
        "response_tokens",
        "total_tokens",
    ):
        numbers = planted["lengths"][name]
        shown = [f"{numbers[key]:,.0f}" for key in ("min", "median", "mean", "p90", "p99", "max")]
        assert any(row[1:] == shown for row in rows), name
    for number in planted["duplicates"]["exact"].values():
        assert any(
            row[1:3] == [f"{number:,}", percent(number / planted["duplicates"]["rows"])]
            for row in rows
        )
    kept = planted["rows_in"] - sum(step["rows"] for step in planted["waterfall"])
    assert f"width:{100 * kept / planted['rows_in']:.2f}%" in page.styles
    (test,) = planted["contamination"]
    hit = f"{test['rows_hit']:,} ({percent(test['share'])})"
    rules = [f"{number:,}" for number in test["rows_hit_by_rule"].values()]
    assert [test["name"], f"{test['rows']:,}", hit, f"{test['train_rows']:,}", *rules] in rows


def test_patterns_and_diversity_show_the_numbers_of_the_json(
    planted: Audit, page: Document
) -> None:
    """Openers with count and share, unique shares with their rows, distinct n-grams beside the reference."""
    rows = cells(page)
    for kind in ("instruction_openers", "response_openers"):
        assert planted["patterns"][kind]["top"]
        for one in planted["patterns"][kind]["top"]:
            assert [one["text"], f"{one['rows']:,}", percent(one["share"]), ""] in rows
    for value in planted["diversity"]["unique"].values():
        assert any(row[1:3] == [f"{planted['rows_read']:,} rows", f"{value:.3f}"] for row in rows)
    for name in ("instruction", "response"):
        versions = [planted["diversity"][name][key] for key in ("value", "twenty_rows")]
        for size in ("distinct_1", "distinct_2", "distinct_3"):
            shown = [
                "too few words" if one[size] is None else f"{one[size]:.3f}" for one in versions
            ]
            assert any(row[2:] == shown for row in rows if len(row) == 4)


def test_scripts_and_private_data_show_the_numbers_of_the_json(
    planted: Audit, page: Document
) -> None:
    """Each pair of scripts with count and share, each kind of private data with its count."""
    rows = cells(page)
    for prompt, answers in planted["scripts"].items():
        name = {"und": "fewer than 20 letters"}.get(prompt, prompt)
        shown = [
            f"{number:,} ({percent(number / planted['rows_read'])})" for number in answers.values()
        ]
        assert any(row[0] == name and set(shown) <= set(row[1:]) for row in rows if row)
    assert planted["private_data"]
    for kind, number in planted["private_data"].items():
        assert [kind.replace("_", " "), f"{number:,}"] in rows


def test_group_sizes_add_up(planted: Audit) -> None:
    """Every near-duplicate group is counted in one range of sizes, the largest included."""
    changed = copy.deepcopy(planted)
    changed["duplicates"]["near"] |= {
        "rows": 9,
        "clusters_by_size": {"2": 4, "5": 3, "10": 2, "11": 1, "7000": 1},
    }
    rows = cells(Document(render(changed)))
    groups = [
        row
        for row in rows
        if row and row[0].endswith("rows") and row[0][:1].isdigit() and len(row) == 4
    ]
    assert [row[:2] for row in groups] == [
        ["2 rows", "4"],
        ["4 to 5 rows", "3"],
        ["6 to 10 rows", "2"],
        ["11 to 20 rows", "1"],
        ["51 or more rows", "1"],
    ]


def test_trained_text_is_marked_as_it_is(planted: Audit, page: Document) -> None:
    """The marked pieces of the sample rows are the trained ones, white space included."""
    samples = [one for name in ("kept", "dropped") for one in planted["samples"][name]]
    trained = [text for one in samples for text, is_trained in one["text"][:12] if is_trained]
    short = [text for text in trained if len(text) <= 800 and text.isprintable()]
    assert len(short) > 10 and set(short) <= set(page.trained)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_one_row_without_findings(make_audit: MakeAudit, tokenizer: bool) -> None:
    """A single good row makes a whole page that says what was looked for, and what a tokenizer or test data adds."""
    audit = make_audit([ROW], tokenizer=tokenizer, limit=None)
    page = Document(render(audit))
    assert (
        audit["findings"] == [] and list(page.sections) == TITLES and page.articles.keys() <= {""}
    )
    assert f"None of the {len(audit['passed'])} checks found anything." in page.sections["Verdict"]
    shown = " ".join(page.sections.values()).lower()
    assert all(one["title"].lower() in shown for one in audit["passed"])
    needed = [title for title in TITLES if "--tokenizer" in page.sections[title]]
    assert needed == (
        [] if tokenizer else [TITLES[0], TITLES[2], TITLES[3], TITLES[10], TITLES[11]]
    )
    assert "--eval_data FILE" in page.sections["Overlap with evaluation data"]
    assert [tag for tag, _ in page.tags].count("svg") == (4 if tokenizer else 3)


def replaced(value: Any, text: str, key: str = "") -> Any:
    """The audit with every text that comes from outside set to `text`; the second text of a pair is another one."""
    ours = ("check", "severity", "reason", "reasons", "seconds", "schema_version", "drop", "unit")
    if isinstance(value, dict):
        foreign = key in ("scripts", "private_data", "versions") or (key and value is None)
        items = list(value.items())
        names = (
            [text + str(at) for at in range(len(items))] if foreign else [name for name, _ in items]
        )
        return {
            name: item if own in ours else replaced(item, text, own)
            for name, (own, item) in zip(names, items, strict=True)
        }
    if isinstance(value, list):
        return (
            [text, f"{text}other"]
            if key == "texts"
            else [replaced(item, text, key) for item in value]
        )
    return text if isinstance(value, str) else value


def test_text_makes_no_element_and_no_attribute(planted: Audit) -> None:
    """With hostile text in every place the page has the elements of a harmless one; hidden characters are spelled."""
    assert planted["duplicates"]["near"]["just_above"] and planted["contamination"][0]["hits"]
    hostile, harmless = (render(replaced(planted, text)) for text in (HOSTILE, HARMLESS))
    assert Document(hostile).tags == Document(harmless).tags
    assert (
        "\u202e" not in hostile and HOSTILE.count("\u202e") == 1 and "\u27e8U+202E\u27e9" in hostile
    )
    assert "<script" not in hostile and "{{ 7 * 7 }}" in hostile


def test_long_texts_are_cut_with_their_length(planted: Audit) -> None:
    """Texts of a megabyte leave a page of some kilobytes that says how much is missing; short ones stay whole."""
    changed, long = copy.deepcopy(planted), "ab " * 300_000
    changed["samples"]["kept"][0]["text"] = [
        ["<start>" + long + "<end>", False],
        ["b" * 750, True],
        ["c" * 2_000, True],
    ]
    changed["samples"]["kept"][1]["text"] = [["turn", False]] * 40
    changed["findings"][0]["examples"][0]["detail"] = long
    changed["findings"][0]["examples"][0]["related"] = ["rows.jsonl:1"] * 50_000
    changed["lengths"]["longest"][0]["prompt"] = long
    changed["patterns"]["response_openers"]["top"][0]["text"] = long
    html = render(changed)
    assert len(html) < len(render(planted)) + 10_000
    for note in (
        "899,214 characters not shown",
        "1,202 characters not shown",
        "28 more parts of this row",
        "and 49,997 more",
    ):
        assert note in html
    assert "&lt;start&gt;ab" in html and "&lt;end&gt;" in html and "b" * 750 in html


def test_the_report_is_written_beside_its_json(
    planted: Audit, page: Document, tmp_path: Path
) -> None:
    """The file holds what `render` returns, the same bytes each time, and asks for nothing outside itself."""
    (tmp_path / "audit.json").write_text(json.dumps(planted), encoding="utf-8")
    path = write_audit_report(tmp_path)
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html" and html == render(planted)
    assert not {name for _, names in page.tags for name in names} & {
        "src",
        "srcset",
        "action",
        "onclick",
        "onload",
    }


def test_without_matplotlib_the_numbers_stay(
    planted: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures give way to a note with the fix, and the tables stay."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Document(render(planted))
    assert page.sections["Lengths"].count("pip install") == 3 and "svg" not in {
        tag for tag, _ in page.tags
    }
    assert list(page.sections) == TITLES


@pytest.mark.parametrize(
    ("one", "other", "marked"),
    [
        ("the red car", "the blue car", (["red"], ["blue"])),
        ("same", "same", ([], [])),
        ("", "only here", ([], ["only here"])),
        ("a  b\nc", "a b\nc!", (["  "], [" ", "!"])),
    ],
)
def test_compare_marks_what_only_one_text_has(
    one: str, other: str, marked: tuple[list[str], list[str]]
) -> None:
    """The pieces make up both texts, those of both are equal, and the others are the differences."""
    left, right = compare(one, other)
    assert ("".join(text for text, _ in left), "".join(text for text, _ in right)) == (one, other)
    assert [text for text, both in left if both] == [text for text, both in right if both]
    assert tuple([text for text, both in side if not both] for side in (left, right)) == marked


def test_overlaps_show_both_texts_and_mark_what_they_share(make_audit: MakeAudit) -> None:
    """Evaluation and training text stand side by side with the words around the overlap, which alone is marked."""
    shared = (
        "a merchant from the coast sends three carts of salt to the market behind the mountains"
    )
    rows = [
        {"prompt": f"{start} {shared} {end}", "completion": "Yes."}
        for start, end in (("Now", "?"), ("So", "!"))
    ]
    html = render(make_audit(rows[:1], held_out=rows[1:]))
    assert f"Now<mark> {shared} </mark>?" in html and f"So<mark> {shared} </mark>!" in html


def test_samples_without_a_tokenizer_say_who_speaks(make_audit: MakeAudit) -> None:
    """The role stands before each turn, and only the assistant's words are marked."""
    page = Document(render(make_audit([ROW], tokenizer=False)))
    assert "user: What is the capital of France?\nassistant: Paris." in page.sections["Sample rows"]
    assert [text for text in page.trained if text] == ["Paris."]
