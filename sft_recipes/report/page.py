"""The HTML shell of every report: one file without network, light and dark, readable on paper and on a phone.

Data enters only through jinja2 with autoescape on, and only as text: `visible` shows what would otherwise hide or
reorder it. A content security policy forbids the page to load anything.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import visible

# Colours that figures draw with; the page's own take their place, so that figures follow light and dark.
INK, ACCENT, MUTED = "#010203", "#040506", "#070809"
_PAGE_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE: Any = {
    **dict.fromkeys(_INKED, INK),
    "font.size": 10,
    "font.family": "sans-serif",
    "text.parse_math": False,
}


def render_page(
    title: str, summary: str, sections: Mapping[str, Markup], script: Markup | None = None
) -> str:
    """A whole HTML document from the bodies of its sections by title; an empty one is left out.

    `script` is our own code, never data.
    """
    sections = {name: body for name, body in sections.items() if body.strip()}
    content = {"title": title, "summary": summary, "sections": sections, "script": script}
    return _ENVIRONMENT.get_template("page.html").render(content)


def macros(file: str) -> Any:
    """The macros of a template beside this module, as functions that return Markup."""
    return _ENVIRONMENT.get_template(file).module


def format_estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    """`0.875 [0.81, 0.93]`, one decimal from 10 on; without an interval the value alone, without a value a word.

    With "+" as `sign`, as for differences, `+0.125 [+0.02, +0.23]`.
    """
    value, low, high = estimate["value"], estimate["ci_low"], estimate["ci_high"]
    if value is None:
        return "none"
    number = f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"
    if low is None or high is None:
        return number
    digits = 2 if max(abs(low), abs(high)) < 10 else 1
    return f"{number} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its one axes, in inches. Raises InputError if matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        what = "matplotlib, which draws the figures, is not installed"
        raise InputError(
            Problem("report", "", what, "pip install 'sft-recipes[report]'")
        ) from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_svg(figure: Any, label: str) -> Markup:
    """The figure as inline SVG in the page's colours, the same bytes each time. `label` describes it in words."""
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
    return macros("parts.html").figure(label, Markup(visible(svg)))  # labels in it are data, too


def figure_or_note(draw: Callable[[], Markup]) -> Markup:
    """What `draw` returns; where figures cannot be drawn, the reason stands in their place."""
    try:
        return draw()
    except InputError as error:
        return macros("parts.html").note(error)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    # Text is made visible where it enters a page, so that no caller can forget it.
    finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
)
_ENVIRONMENT.filters |= {"visible": visible, "estimate": format_estimate}
