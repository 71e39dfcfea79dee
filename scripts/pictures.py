"""Pictures of what a run shows: its evaluation report, its audit report, its model card as the Hub renders it.

    python scripts/pictures.py RUN [--output docs/images] [--dark] [--narrow] [--height 1400]

Each page is drawn by a headless Chromium, wide and light, and with `--narrow` and `--dark` on a phone
and at night as well. A page that the run does not have yet is named with the command that makes it.
Folders of this machine are taken out of the pages before they are drawn.
"""

import argparse
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from PIL import Image

# The driver of the browser is that of the tests, which stand beside this folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem, SFTRecipesError
from sft_recipes.release.local_paths import LOCAL_PATH
from sft_recipes.release.model_card import render_card
from tests.browser.chromium import PROGRAM, launched

WIDE = 1200
NARROW = 390  # a phone
COLOURS = 128  # of a picture: a page has few, and its file is a third as large
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
# The Hub's measures: 16 pixels, a column of text, grey lines around cells, code on grey.
_CARD_STYLE = """
:root { --ink: #1f2328; --paper: #fff; --soft: #f6f8fa; --line: #d1d9e0; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --paper: #0d1117; --soft: #151b23; --line: #3d444d; }
}
body { max-width: 48rem; margin: 0 auto; padding: 2rem 1.5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Noto Sans", Helvetica, Arial, sans-serif; }
h1, h2 { padding-bottom: .3em; border-bottom: 1px solid var(--line); }
table { display: block; max-width: 100%; overflow: auto; border-collapse: collapse; }
th, td { padding: 6px 13px; border: 1px solid var(--line); }
tr:nth-child(2n) { background: var(--soft); }
code { padding: .2em .4em; border-radius: 6px; background: var(--soft); font-size: 85%;
  white-space: break-spaces; overflow-wrap: anywhere; }
pre { padding: 16px; border-radius: 6px; background: var(--soft); overflow: auto; }
pre code { padding: 0; white-space: pre; }
"""


class Page(NamedTuple):
    """A page to draw, and what its picture is called."""

    name: str
    html: str


class Look(NamedTuple):
    """How a page is looked at; `suffix` tells its picture from the others."""

    suffix: str
    width: int
    is_dark: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pages of a run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--narrow", action="store_true", help="on a phone as well")
    parser.add_argument("--dark", action="store_true", help="with the dark colours as well")
    parser.add_argument("--height", type=int, default=1400, help="of a picture at most, in pixels")
    given = parser.parse_args(arguments)
    try:
        draw(list(pages(given.run)), looks(given.narrow, given.dark), given.output, given.height)
    except SFTRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def pages(run: Path) -> Iterator[Page]:
    """The three pages of a run. Raises InputError for one that nobody has made yet."""
    evaluations = sorted(
        (run / run_folder.EVALUATIONS).glob("*/report.html"), key=lambda path: path.stat().st_mtime
    )
    if not evaluations:
        fix = f"sft-recipes evaluate {run}"
        raise InputError(Problem(str(run), "", "it has no evaluation report", fix))
    audit = run / run_folder.AUDIT / "report.html"
    if not audit.is_file():
        fix = f"sft-recipes audit {run / run_folder.RECIPE} --output {audit.parent}"
        raise InputError(Problem(str(run), "", "it has no audit report", fix))
    yield Page("evaluation", evaluations[-1].read_text(encoding="utf-8"))
    yield Page("audit", audit.read_text(encoding="utf-8"))
    yield Page("model-card", card_page(render_card(run)))


def card_page(markdown: str) -> str:
    """A model card as a page that looks as the Hub shows it; its metadata is no part of the text."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table")
    # A comment is the one piece of HTML in a card; the Hub shows none.
    text = re.sub(r"<!--.*?-->", "", _FRONT_MATTER.sub("", markdown))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"<!doctype html>{head}<style>{_CARD_STYLE}</style>{body.render(text)}"


def looks(narrow: bool, dark: bool) -> list[Look]:
    """Wide and light, and what is asked for beside it."""
    widths = {"": WIDE}
    if narrow:
        widths["-narrow"] = NARROW
    asked = []
    for suffix, width in widths.items():
        asked.append(Look(suffix, width, is_dark=False))
        if dark:
            asked.append(Look(f"{suffix}-dark", width, is_dark=True))
    return asked


def without_local_paths(html: str) -> str:
    """The page with the last name alone of every path of this machine."""
    html = html.replace(f"{Path.cwd()}/", "")
    return LOCAL_PATH.sub(lambda path: re.split(r"[/\\]", path.group().rstrip("/\\"))[-1], html)


def draw(drawn: Sequence[Page], asked: Sequence[Look], output: Path, height: int) -> None:
    """A picture of each page in each look. Raises InputError where there is no browser."""
    if PROGRAM is None:
        what = "no Chromium is on PATH, and pictures are drawn by one"
        fix = "apt-get install chromium"
        raise InputError(Problem("pictures", "", what, fix))
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    try:
        with launched(folder / "profile", folder / "downloads") as browser:
            browser.send("Emulation.setScrollbarsHidden", hidden=True)
            for page in drawn:
                file = folder / f"{page.name}.html"
                file.write_text(without_local_paths(page.html), encoding="utf-8")
                for look in asked:
                    browser.open(file)
                    picture = output / f"{page.name}{look.suffix}.png"
                    # Drawn once to be laid out at this width, then as high as it is.
                    browser.screenshot(picture, look.width, height, look.is_dark)
                    whole = int(browser.run("document.documentElement.scrollHeight"))
                    browser.screenshot(picture, look.width, min(whole, height), look.is_dark)
                    _shrink(picture)
                    print(picture)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shrink(picture: Path) -> None:
    image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    image.quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
