"""The review page in a real browser: keys are pressed, the page is reloaded, votes are downloaded and scored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_recipes.evaluation.review import build, score
from sft_recipes.messages import visible
from tests.browser.chromium import PATIENCE, PROGRAM, Browser, launched

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        PROGRAM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"
    ),
]

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\u200b"
WATCHED = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")


def write_folder(folder: Path, answers: list[str]) -> Path:
    """An evaluation folder; every prompt is hostile, too."""
    folder.mkdir()
    rows = []
    for index, answer in enumerate(answers):
        messages = [
            {"role": "user", "content": f"{index} {HOSTILE}"},
            {"role": "assistant", "content": "-"},
        ]
        rows.append(
            json.dumps(
                {"row": index, "source": "data.jsonl", "messages": messages, "response": answer}
            )
        )
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of ten items; every answer of the candidate starts with `good`, every one of the baseline with `bad`."""
    tuned = write_folder(tmp_path / "tuned", [f"good {index} {HOSTILE}" for index in range(10)])
    base = write_folder(tmp_path / "base", [f"bad {index} {HOSTILE}" for index in range(10)])
    return Path(build(tuned, base, tmp_path / "page.html")["output"])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser that downloads to `tmp_path / "downloads"`."""
    (tmp_path / "downloads").mkdir()
    with launched(tmp_path / "profile", tmp_path / "downloads") as started:
        yield started


def shown(browser: Browser) -> tuple[str, str, str]:
    """Prompt, left and right answer as the page shows them."""
    return tuple(
        browser.run(
            "['prompt', 'answer-0', 'answer-1'].map((id) => document.getElementById(id).innerText)"
        )
    )


def count(browser: Browser) -> str:
    """The page's own words for how far the rater is."""
    return browser.run("document.getElementById('count').textContent")


def rate(browser: Browser) -> tuple[str, str, str]:
    """Prefer the answer that starts with `good`, by keyboard, and go on."""
    seen = shown(browser)
    browser.press("2" if seen[1].startswith("good") else "4", "Enter")
    return seen


def downloaded(folder: Path) -> Path:
    """The one complete file in a folder, as soon as it is there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        files = list(folder.iterdir())
        if len(files) == 1 and files[0].suffix == ".json":
            return files[0]
        time.sleep(0.02)
    raise TimeoutError(f"nothing was downloaded to {folder}")


def test_a_whole_review_by_keyboard(page: Path, browser: Browser, tmp_path: Path) -> None:
    """Type a name, rate four items, reload, rate the rest, download, score: every vote arrives as it was cast."""
    browser.open(page)
    browser.press("A", "n", "n", "a", "Enter")
    browser.wait_for("location.hash === '#Anna' && document.getElementById('count')?.textContent")
    assert count(browser) == "1 of 11 · 0 rated"
    browser.press("Enter")
    assert count(browser) == "1 of 11 · 0 rated"  # nothing is skipped unrated
    first = shown(browser)
    browser.press("a", "l", "s", "w", "p", "p", "c", *"1 ok 5", "Escape")
    seen = [rate(browser)]
    browser.press("ArrowLeft")
    assert shown(browser) == first and count(browser) == "1 of 11 · 1 rated"
    browser.press("Enter")
    seen += [rate(browser) for _ in range(3)]
    browser.reload()
    assert count(browser) == "5 of 11 · 4 rated"
    seen += [rate(browser) for _ in range(7)]
    assert count(browser) == "11 rated" and "Thank you" in browser.run("document.body.innerText")
    browser.press("d")
    file = downloaded(tmp_path / "downloads")
    assert file.name == "votes-Anna.json"

    result = score(page.with_suffix(".key.json"), [file])
    assert (result["raters"], result["items"]["won"], result["win_rate"]["value"]) == (
        {"Anna": 10},
        10,
        1.0,
    )
    assert (result["self_consistency"]["value"], result["self_consistency"]["n"]) == (1.0, 1)
    assert (
        result["left_chosen"]["value"]
        == sum(left.startswith("good") for _, left, _ in seen[:10]) / 10
    )
    assert [one["comment"] for one in result["comments"]] == ["1 ok 5"]
    sides = ("candidate", "baseline") if first[1].startswith("good") else ("baseline", "candidate")
    assert (
        result["acceptable"][sides[0]]["value"] == 0.0
        and result["acceptable"][sides[1]]["value"] == 0.0
    )
    assert result["tags"] == {sides[0]: {"unsafe": 1}, sides[1]: {}}
    assert len({prompt for prompt, _, _ in seen[:10]}) == 10
    assert seen[10] == (first[0], first[2], first[1])  # the repeated item, sides swapped


def test_nothing_hostile_runs_and_nothing_is_loaded(page: Path, browser: Browser) -> None:
    """Model text is shown letter by letter, with hidden characters spelled; no dialog, no error, no request."""
    browser.open(page, "#eve")
    prompt, left, right = shown(browser)
    assert visible(HOSTILE) in prompt and "⟨U+202E⟩" in prompt
    assert sorted(text.split()[0] for text in (left, right)) == ["bad", "good"]
    assert all(text.endswith(visible(HOSTILE)) for text in (left, right))
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0
    blocked = "fetch('https://example.org').then(() => 'loaded', () => 'blocked')"
    assert browser.run(blocked) == "blocked"
    loaded = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"].endswith("WillBeSent")
    ]
    assert {url.partition(":")[0] for url in loaded} <= {"file", "about"}
    noted = [event for event in browser.events if event["method"] in WATCHED]
    assert all("https://example.org" in json.dumps(event) for event in noted)


def test_raters_see_other_sides_and_orders(page: Path, browser: Browser) -> None:
    """Order and sides are a rater's own, the same after a reload, and neither side is always the candidate's."""
    seen = {}
    for rater in ("ann", "ben", "eve"):
        browser.open(page, f"#{rater}")
        first = shown(browser)
        browser.reload()
        assert shown(browser) == first
        seen[rater] = [rate(browser) for _ in range(10)]
        left = sum(one.startswith("good") for _, one, _ in seen[rater])
        assert 1 <= left <= 9
    orders = {tuple(prompt for prompt, _, _ in items) for items in seen.values()}
    sides = {
        tuple(left.startswith("good") for _, left, _ in sorted(items)) for items in seen.values()
    }
    assert len(orders) == len(sides) == 3


def test_a_browser_that_keeps_nothing_says_so(page: Path, browser: Browser) -> None:
    """Where local storage fails the page warns at once; otherwise it does not."""
    warned = "!document.getElementById('unsaved').hidden"
    browser.open(page, "#ann")
    assert not browser.run(warned)
    broken = "Storage.prototype.setItem = () => { throw new Error('full'); };"
    browser.send("Page.addScriptToEvaluateOnNewDocument", source=broken)
    browser.reload()
    assert browser.run(warned)


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (400, 800)])
def test_page_fits(page: Path, browser: Browser, tmp_path: Path, width: int, height: int) -> None:
    """Wide and narrow: nothing sticks out to the side, and the choices can be reached without scrolling."""
    browser.open(page, "#ann")
    browser.screenshot(tmp_path / "page.png", width, height)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(
        "document.getElementById('bar').getBoundingClientRect().bottom <= innerHeight"
    )
    assert browser.run("document.querySelector('kbd').offsetParent !== null")
