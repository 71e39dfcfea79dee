"""Pictures of a run: of every page, in every look that is asked for, without folders of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from scripts import pictures
from sft_recipes.errors import InputError
from tests.browser.chromium import PROGRAM

LONG_CARD = "---\ntags: [a]\n---\n\n# name\n\n<!-- mark -->\n\n| A | B |\n|---|---|\n| `x` | y |\n"


def test_a_card_is_drawn_as_a_reader_sees_it() -> None:
    """No metadata and no comment, but headings, tables and code; HTML in a card stays text."""
    html = pictures.card_page(LONG_CARD + "\n<img src=x>\n")
    assert "tags" not in html
    assert "mark" not in html
    for element in ("<h1>name</h1>", "<table>", "<code>x</code>", "&lt;img src=x&gt;"):
        assert element in html


def test_no_path_of_this_machine_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a path its last name stays, wherever it stands; what is no path of a machine stays as it is."""
    monkeypatch.chdir(tmp_path)
    html = f"<td>{tmp_path}/train.jsonl</td><td>/home/me/models/small</td><p>and/or, a/b</p></body>"
    shown = pictures.without_local_paths(html)
    assert shown == "<td>train.jsonl</td><td>small</td><p>and/or, a/b</p></body>"


def test_a_page_that_is_not_there_is_named_with_its_command(tmp_path: Path) -> None:
    """First the evaluation, then the audit; each with what makes it."""
    with pytest.raises(InputError, match=f"Fix: sft-recipes evaluate {tmp_path}"):
        list(pictures.pages(tmp_path))
    report = tmp_path / "evaluations" / "test" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("a", encoding="utf-8")
    with pytest.raises(InputError, match=r"Fix: sft-recipes audit .*recipe.yaml --output .*audit"):
        list(pictures.pages(tmp_path))


def test_without_a_browser_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, with what to install."""
    monkeypatch.setattr(pictures, "PROGRAM", None)
    monkeypatch.setattr(pictures, "pages", lambda run: iter([pictures.Page("a", "a")]))
    assert pictures.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "Fix: apt-get install chromium" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH")
def test_every_look_has_its_picture(tmp_path: Path) -> None:
    """Wide and narrow have their widths, a page that is higher is cut, and dark is darker than light."""
    page = pictures.Page("card", pictures.card_page("# a\n\n" + "text\n\n" * 40))
    pictures.draw([page], pictures.looks(narrow=True, dark=True), tmp_path, height=600)
    brightness = {}
    for suffix, width in (("", 1200), ("-dark", 1200), ("-narrow", 390), ("-narrow-dark", 390)):
        picture = Image.open(tmp_path / f"card{suffix}.png").convert("L")
        assert picture.size == (width, 600)
        brightness[suffix] = picture.getpixel((2, 2))
    assert brightness[""] > 200 > 60 > brightness["-dark"]
    assert brightness["-narrow"] > 200 > 60 > brightness["-narrow-dark"]
    assert len(list(tmp_path.iterdir())) == 4
