"""The HTML shell of every report: one file without network, light and dark, for paper and phone.

Data enters only through jinja2 with autoescape on, and only as text: `visible` shows what would
otherwise hide or reorder it. A `.txt` is for a terminal, where nothing is markup. A content
security policy forbids the page to load anything. Templates hold words and markup; what they say of
numbers is worked out in the modules beside them.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import visible
from sft_recipes.report import plain_words
from sft_recipes.report.number_texts import FILTERS

# Colours that figures draw with; the page's own take their place, so that figures follow light and
# dark.
INK = "#010203"
ACCENT = "#040506"
MUTED = "#070809"
_PAGE_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
_STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "font.family": "sans-serif",
    "text.parse_math": False,
}


def render_page(
    title: str,
    summary: str,
    sections: Mapping[str, Markup],
    script: Markup | None = None,
    style: Markup | str = "",
    kind: str = "",
) -> str:
    """A whole HTML document from the bodies of its sections by title; an empty one is left out.

    `script` and `style`, what the sections need beside the page's own, are our code, never data;
    `kind` is a class of the style sheet.
    """
    filled = {name: body for name, body in sections.items() if body.strip()}
    return _ENVIRONMENT.get_template("page.html").render(
        title=title,
        summary=summary,
        sections=filled,
        script=script,
        style=style,
        kind=kind,
    )


def macros(file: str) -> Any:
    """The macros of a template beside this module, as functions that return Markup, of a `.txt` text."""
    return _ENVIRONMENT.get_template(file).module


class Drawing(NamedTuple):
    """A matplotlib figure and its one axes."""

    figure: Any
    axes: Any


def new_figure(width: float, height: float) -> Drawing:
    """A figure of so many inches. Raises InputError if matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        what = "matplotlib, which draws the figures, is not installed"
        fix = "pip install 'sft-recipes[report]'"
        raise InputError(Problem("report", "", what, fix)) from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return Drawing(figure, axes)


def figure_svg(figure: Any, label: str) -> Markup:
    """The figure as inline SVG in the page's colours, the same bytes each time.

    `label` describes it in words.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Ids are hashed with the label, so that those of two figures in one page do not meet.
    with rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": label}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    # Labels in it are data, too.
    return Markup(macros("parts.html").figure(label, Markup(visible(svg))))


def figure_or_note(draw: Callable[[], Markup]) -> Markup:
    """What `draw` returns; where figures cannot be drawn, the reason stands in their place."""
    try:
        return draw()
    except InputError as error:
        return Markup(macros("parts.html").note(error))


def _is_html(template: str | None) -> bool:
    """Whether what enters a template is escaped: by the ending, so that no template can forget."""
    return template is None or not template.endswith(".txt")


def _shown(value: object) -> Markup | str:
    """What enters a page: text is made visible there, so that no caller can forget it."""
    return value if isinstance(value, Markup) else visible(str(value))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=_is_html,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_shown,
)
_ENVIRONMENT.filters |= {"visible": visible, **FILTERS, **plain_words.FILTERS}
