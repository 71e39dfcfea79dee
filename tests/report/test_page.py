"""The HTML shell: data stays text, nothing is loaded, figures follow the page."""

from __future__ import annotations

import inspect
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

import sft_recipes
from sft_recipes.data import ledger
from sft_recipes.errors import InputError
from sft_recipes.messages import visible
from sft_recipes.release import markdown
from sft_recipes.report import page as page_module
from sft_recipes.report.number_texts import format_estimate
from sft_recipes.report.page import (
    ACCENT,
    INK,
    figure_or_note,
    figure_svg,
    macros,
    new_figure,
    render_page,
)
from sft_recipes.training import announce

PACKAGE = Path(sft_recipes.__file__).parent
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


class Elements(HTMLParser):
    """Counts tags and collects attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(str(html))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page(text: str) -> str:
    parts = macros("parts.html")
    return render_page(text, text, {text: parts.figure(text, text) + parts.note(text)})


def test_data_creates_no_element_and_no_attribute() -> None:
    """A page full of hostile text has the elements and attribute names of a harmless one, and shows
    the text as is."""
    hostile, harmless = Elements(page(HOSTILE)), Elements(page("harmless"))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert hostile.text.count(HOSTILE) == harmless.text.count("harmless") == 8


def test_the_page_asks_nothing_of_the_network() -> None:
    """No element refers to another file, no style imports one, and the policy forbids what slipped
    through."""
    figure, axes = new_figure(3, 2)
    axes.plot([0, 1], [1, 0])
    html = render_page("t", "s", {"figure": figure_svg(figure, "a line")}, Markup("1;"))
    elements = Elements(html)
    for name, value in elements.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (value or "").startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext é 漢 🙂", "plain\n\ttext é 漢 🙂"),
        ("a\x00\x1b\r", "a\u27e8U+0000\u27e9\u27e8U+001B\u27e9\u27e8U+000D\u27e9"),
        ("\u202eevil\u2066", "\u27e8U+202E\u27e9evil\u27e8U+2066\u27e9"),
        (
            "\u200b\ufeff\u00ad\x7f\x85",
            "".join(f"\u27e8U+{code}\u27e9" for code in ("200B", "FEFF", "00AD", "007F", "0085")),
        ),
        ("\u2028\U000e0041\ud800", "\u27e8U+2028\u27e9\u27e8U+E0041\u27e9\u27e8U+D800\u27e9"),
    ],
)
def test_hidden_characters_are_spelled_out(text: str, shown: str) -> None:
    """Control, bidirectional, zero-width, tag characters and lone surrogates are visible; other
    text is untouched."""
    assert visible(text) == shown
    assert shown in Elements(macros("parts.html").note(text)).text


def test_figures_take_the_pages_colours_and_repeat_themselves() -> None:
    """The SVG holds no document header and none of the drawing colours, and is the same bytes each
    time."""

    def draw() -> Markup:
        figure, axes = new_figure(3, 2)
        axes.plot([0, 1], [1, 0], color=ACCENT)
        axes.set_xlabel("cost in $ and <more$>")
        return figure_svg(figure, "cost <of> things")

    svg = draw()
    assert svg == draw()
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert INK not in svg
    assert "<?xml" not in svg
    assert "metadata" not in svg
    assert "cost in $ and <more$>" in Elements(svg).text
    assert ("aria-label", "cost <of> things") in Elements(svg).attributes


def test_two_figures_share_no_id() -> None:
    """Ids in the two inline figures of one page do not meet, so that one does not borrow the
    other's clip path."""
    ids: list[Any] = []
    for label in ("first", "second"):
        figure, axes = new_figure(3, 2)
        axes.plot([0, 1], [1, 0])
        clip_paths = [
            value
            for name, value in Elements(figure_svg(figure, label)).attributes
            if name == "clip-path"
        ]
        ids += set(clip_paths)
    assert len(ids) == len(set(ids)) == 2


def test_missing_matplotlib_is_an_error_with_the_fix_and_a_note_in_the_page(monkeypatch) -> None:
    """Without the report extra, drawing says how to install it, and a page shows that in the
    figure's place."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'sft-recipes\[report\]'"):
        new_figure(3, 2)
    note = figure_or_note(lambda: figure_svg(new_figure(3, 2)[0], "never"))
    assert "pip install 'sft-recipes[report]'" in Elements(note).text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.875, 0.8149, 0.9251, "0.875 [0.81, 0.93]"),
        (None, None, None, "no value"),
        (2.0, None, None, "2.000"),
        (34.56, 12.3, 100.0, "34.6 [12.3, 100.0]"),
    ],
)
def test_estimates_read_as_value_and_interval(value, low, high, text) -> None:
    """Three decimals, the interval in brackets, a word where there is no value."""
    assert format_estimate({"value": value, "ci_low": low, "ci_high": high}) == text


def test_differences_carry_their_sign() -> None:
    """Plus and minus are written out in value and interval."""
    assert (
        format_estimate({"value": 0.125, "ci_low": -0.02, "ci_high": 0.23}, "+")
        == "+0.125 [-0.02, +0.23]"
    )
    assert format_estimate({"value": None, "ci_low": None, "ci_high": None}, "+") == "no value"


TEXT_TEMPLATES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.txt*")
    if "shipped" not in path.parts and path.suffix in (".txt", ".jinja")
)


@pytest.mark.parametrize("file", TEXT_TEMPLATES)
def test_templates_for_a_terminal_escape_nothing(file: str) -> None:
    """Every text template of the package is loaded where `<` stays `<`, and needs no switch for it."""
    room, name = file.split("/")
    environments = {
        "report": page_module._ENVIRONMENT,
        "release": markdown.TERMINAL,
        "training": announce.TEXTS,
        "data": None,  # made for each ledger
    }
    environment = environments[room]
    if environment is None:
        assert "autoescape" not in inspect.getsource(ledger)
    else:
        escapes = environment.autoescape
        assert not (escapes(name) if callable(escapes) else escapes)
    assert "autoescape" not in (PACKAGE / file).read_text(encoding="utf-8")


def test_pages_and_cards_escape() -> None:
    """Every HTML template of the reports is escaped, and so is whatever enters a model card."""
    templates = sorted(path.name for path in (PACKAGE / "report").glob("*.html"))
    assert "evaluation.html" in templates
    for name in templates:
        assert page_module._ENVIRONMENT.autoescape(name) is True
        assert "autoescape" not in (PACKAGE / "report" / name).read_text(encoding="utf-8")
    assert markdown.CARDS.autoescape is True
    card = markdown.CARDS.from_string("{{ value }}").render(value="<b>")
    assert card == "`<b>`"


def test_a_text_template_shows_what_a_page_escapes() -> None:
    """The same value stands as it is in a terminal and as an entity in a page."""
    view = dict.fromkeys(("rows", "errors", "warnings", "notes", "report"), "< 0.001")
    view |= {"rows_kept": 1, "findings": [], "cleaned": None, "dropped": {}}
    assert "< 0.001" in macros("audit.txt").verdict(view)
    assert "&lt; 0.001" in macros("parts.html").note("< 0.001")
