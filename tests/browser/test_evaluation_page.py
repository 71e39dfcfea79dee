"""The evaluation report in a real browser: search, filters and keys, nothing hostile runs, it reads without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.messages import visible
from sft_recipes.report.evaluation_report import render_evaluation_report
from tests.browser.chromium import PROGRAM, Browser, launched
from tests.report.test_evaluation_report import DIFFERENCE, full, metrics, sample

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        PROGRAM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"
    ),
]

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\u200b"
WATCHED = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
SHOWN = "[...document.querySelectorAll('.answer:not([hidden]) header strong')].map((e) => e.textContent)"
FOCUSED = "document.activeElement.querySelector('header strong')?.textContent"
ROWS = 45


def answer(row: int, exact: bool, word: str) -> dict[str, Any]:
    """A row with a line; every fifth loops, every fourth asks for a count."""
    asked = sample(row, exact, response=f"{word} {row} {HOSTILE}", prompt=f"q{row} {HOSTILE}")
    return asked | {
        "line": row + 1,
        "task_type": "count" if row % 4 == 0 else HOSTILE,
        "flags": ["loop"] if row % 5 == 0 else [],
    }


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report of 45 answers: those of even rows are right, in the base those of rows divisible by three."""
    tuned = [answer(row, row % 2 == 0, "tuned") for row in range(ROWS)]
    base = [answer(row, row % 3 == 0, "base") for row in range(ROWS)]
    content = metrics(**full(HOSTILE, HOSTILE), differences={"exact_match": DIFFERENCE})
    content |= {"n": ROWS, "rows": ROWS}
    of_base = metrics(0.3, task_types=content["task_types"])
    path = tmp_path / "report.html"
    path.write_text(render_evaluation_report(content, tuned, of_base, base), encoding="utf-8")
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser."""
    with launched(tmp_path / "profile", tmp_path) as started:
        yield started


def choose(browser: Browser, name: str, value: str) -> list[str]:
    """The places shown after a filter was set."""
    browser.run(
        f"{{ const f = document.querySelector('select[data-filter={name}]'); f.value = {json.dumps(value)};"
        " f.dispatchEvent(new Event('change')); }"
    )
    return browser.run(SHOWN)


def lines(*rows: int) -> set[str]:
    return {f"test.jsonl:{row + 1}" for row in rows}


def test_filters_and_search_show_what_fits(page: Path, browser: Browser) -> None:
    """By what changed, right or wrong, task type, flag, and words; together they narrow; the count follows."""
    browser.open(page)
    assert len(browser.run(SHOWN)) == 20
    lost = [row for row in range(ROWS) if row % 3 == 0 and row % 2]
    assert set(choose(browser, "change", "lost")) == lines(*lost)
    assert browser.run("document.getElementById('shown').textContent") == str(len(lost))
    assert set(choose(browser, "flag", "loop")) == lines(15) and 15 in lost
    browser.run("document.getElementById('clear').click()")
    assert set(choose(browser, "task", "count")) == lines(*range(0, ROWS, 4))
    browser.run("document.getElementById('clear').click()")
    both = choose(browser, "right", "right")
    assert len(both) == 20 and not browser.run("document.getElementById('more').hidden")
    browser.run("document.getElementById('more').click()")
    assert set(browser.run(SHOWN)) == lines(*range(0, ROWS, 2))
    browser.press("Escape", "/", *"q44 tuned")
    assert browser.run(SHOWN) == ["test.jsonl:45"]
    assert browser.run("document.getElementById('search').value") == "q44 tuned"


def test_a_task_type_of_the_table_chooses_its_answers(page: Path, browser: Browser) -> None:
    """Its link sets the filter, whatever the type is called."""
    browser.open(page)
    browser.run("document.querySelector('a[data-choose]').click()")
    assert browser.run("document.querySelector('select[data-filter=task]').value") == visible(
        HOSTILE
    )


def test_the_keyboard_goes_through_the_answers(page: Path, browser: Browser) -> None:
    """`j` and `k` move, beyond the first twenty, too; in the search field they are letters; Escape clears."""
    browser.open(page)
    order = browser.run(SHOWN)
    browser.press("j", "j", "k")
    assert browser.run(FOCUSED) == order[0]
    browser.press(*"j" * 20)
    assert len(browser.run(SHOWN)) == 40
    assert browser.run(FOCUSED) == browser.run(SHOWN)[20]
    browser.press("/", *"jk")
    assert browser.run("document.activeElement.id") == "search"
    assert browser.run(SHOWN) == []
    browser.press("Escape")
    assert len(browser.run(SHOWN)) == 20
    browser.press("Tab")
    assert browser.run("document.activeElement !== document.body")


def test_nothing_hostile_runs_and_nothing_is_loaded(page: Path, browser: Browser) -> None:
    """Text of models and data makes no element, opens no dialog, requests nothing; it is shown letter by letter."""
    browser.open(page)
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img').length") == 0
    shown = browser.run("document.querySelector('.answer .tuned pre').textContent")
    assert shown.endswith(visible(HOSTILE))
    assert not [event for event in browser.events if event["method"] in WATCHED]
    loaded = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"].endswith("WillBeSent")
    ]
    assert {url.partition(":")[0] for url in loaded} <= {"file", "about"}


def test_without_scripts_every_answer_is_readable(page: Path, browser: Browser) -> None:
    """All answers are shown, and no control that would do nothing."""
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    visible_ones = "[...document.querySelectorAll('.answer')].filter((e) => e.offsetParent).length"
    assert browser.run(visible_ones) == ROWS
    assert browser.run("document.querySelector('.filters').offsetParent === null")
    assert browser.run("document.getElementById('more').offsetParent === null")


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (420, 800)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits(
    page: Path, browser: Browser, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    """Wide and narrow nothing sticks out to the side; dark is dark, light is light."""
    browser.open(page)
    browser.screenshot(tmp_path / "page.png", width, height, dark)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
