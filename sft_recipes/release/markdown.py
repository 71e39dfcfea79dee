"""How data enters a model card: as text that means nothing to a Markdown renderer.

A card is read where others trust it, and what stands in it comes from data, settings and folders
that anyone may have named. `inline` is the one way in: the card's environment passes the value of
every expression through it. A longer text stands in a block that it cannot leave.
"""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sft_recipes.messages import visible

NOT_RECORDED = "not recorded"
EMPTY = "(empty)"
# Words and numbers that no renderer reads anything into: no punctuation of Markdown, nothing that
# looks like an address (`a.b`, `a@b`, `www.`), nothing that begins a list.
_WORD = r"[^\W_]+(?:_[^\W_]+)*"
_BETWEEN = r"(?:[ ,;%+=/()'-]|[.:](?= )|(?<=\d)[.:](?=\d))+"
_PLAIN = re.compile(rf"(?!\d+[.)] )[(+-]?{_WORD}(?:{_BETWEEN}{_WORD})*[.%)]*")
_INTERVAL = re.compile(r" \[[+-]?[\d.]+, [+-]?[\d.]+\]$")


def inline(value: object) -> Markup:
    """A value inside a line, a heading or a cell of a table: plain words stay, all else is code."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup(NOT_RECORDED)
    text = _one_line(value) or EMPTY
    if _PLAIN.fullmatch(_INTERVAL.sub("", text)):
        return Markup(text)
    return code(text)


def code(value: object) -> Markup:
    """A value as code inside a line: neither Markdown nor HTML nor addresses are read in it."""
    # A `|` ends a cell of a table even in code, so it stands between two pieces of code.
    pieces = []
    for piece in _one_line(value).split("|"):
        pieces.append(_code_span(piece))
    return Markup("&#124;".join(pieces))


def code_block(text: str) -> Markup:
    """A text in an indented block: nothing gets out of one, whatever it holds."""
    shown = visible(text)
    lines = shown.split("\n") if shown.strip() else [EMPTY]
    return Markup("\n".join(f"    {line}" for line in lines))


def fenced(text: str, language: str) -> Markup:
    """A text in a fenced block, with a fence that is longer than any in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    body = visible(text).rstrip("\n")
    return Markup(f"{fence}{language}\n{body}\n{fence}")


def _one_line(value: object) -> str:
    return visible(" ".join(str(value).split()))


def _code_span(text: str) -> str:
    if not text:
        return ""
    fence = "`" * (_longest_run(text) + 1)
    # A parser takes one space from both ends, where text has them on both.
    touches_fence = text.startswith("`") or text.endswith("`")
    would_be_cut = text.startswith(" ") and text.endswith(" ") and text.strip()
    if touches_fence or would_be_cut:
        text = f" {text} "
    return f"{fence}{text}{fence}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def environment(**settings: Any) -> jinja2.Environment:
    """The templates beside this module."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )


# With autoescape macros give Markup, which is known to have passed already.
CARDS = environment(autoescape=True, finalize=inline)
CARDS.filters |= {"code": code, "code_block": code_block, "fenced": fenced}
# What a terminal shows: nothing in it acts on the terminal.
TERMINAL = environment(finalize=lambda value: visible(str(value)))


def three_digits(value: float | None) -> str:
    """A figure of a table, or that there is none."""
    return "no value" if value is None else f"{value:.3f}"
