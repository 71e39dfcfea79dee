"""The HTML shell of every report: one file without network, light and dark, readable on paper and on a phone.

Data enters only through jinja2 with autoescape on, and only as text: `visible` shows what would otherwise hide or
reorder it. A content security policy forbids the page to load anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from sft_recipes.errors import InputError, Problem

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}

# Colours that figures draw with; the page's own take their place, so that figures follow light and dark.
INK, ACCENT, MUTED = "#010203", "#040506", "#070809"
_PAGE_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}

_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

_TABLE = """
<div class="scroll"><table>
<thead><tr>{% for cell in headers %}<th class="{{ kinds[loop.index0] }}">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td class="{{ kinds[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1b1f24; --paper: #fff; --soft: #f4f5f7; --line: #d5d9de; --muted: #626a73; --accent: #1f5fbf;
  --bad: #a3282c; --good: #1a6e3c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #15181c; --soft: #1f242a; --line: #3a414a; --muted: #9aa4af; --accent: #7db0f5;
    --bad: #f0868a; --good: #6fcf97; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .75rem; }
.muted, small { color: var(--muted); }
small { display: block; font-size: .82rem; line-height: 1.35; }
.note { border-left: 3px solid var(--accent); background: var(--soft); padding: .5rem .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--line); }
th { font-size: .82rem; color: var(--muted); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
td:first-child { min-width: 11rem; max-width: 34rem; overflow-wrap: break-word; }
td.text + td.text { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
figure { margin: .5rem 0; }
figure svg { display: block; max-width: 100%; min-width: 30rem; height: auto; }
figure svg text { fill: currentColor; }
figcaption { color: var(--muted); font-size: .82rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .5rem 0 1rem; }
select { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 4px;
  padding: .15rem .3rem; max-width: 14rem; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 1rem; overflow: hidden; }
.sample > header { display: flex; flex-wrap: wrap; gap: .15rem .9rem; padding: .35rem .75rem; background: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere; }
.sample > div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
.sample section { padding: .5rem .75rem; min-width: 0; }
.sample h3 { margin: 0 0 .2rem; font-size: .78rem; font-weight: 600; color: var(--muted); }
.bad { color: var(--bad); } .good { color: var(--good); }
[hidden] { display: none !important; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; }
  th, td { padding-right: .9rem; }
  td:first-child { min-width: 9rem; }
  figure svg { min-width: 26rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav, .filters { display: none; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; }
  .sample, tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style>
</head>
<body>
<header><h1>{{ title }}</h1><p class="muted">{{ summary }}</p>
<nav>{% for section in sections %}<a href="#section-{{ loop.index }}">{{ section.title }}</a>{% endfor %}</nav></header>
<main>
{% for section in sections %}
<section id="section-{{ loop.index }}"><h2>{{ section.title }}</h2>
{{ section.body }}
</section>
{% endfor %}
</main>
{% if script %}
<script>{{ script }}</script>
{% endif %}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a page with an entry in its table of contents."""

    title: str
    body: Markup


def render_page(title: str, summary: str, sections: Sequence[Section], script: Markup | None = None) -> str:
    """A whole HTML document. `script` is our own code, never data."""
    content = {"title": visible(title), "summary": visible(summary), "sections": sections, "script": script}
    return _ENVIRONMENT.from_string(_PAGE).render(content)


def fill(template: str, **values: Any) -> Markup:
    """A piece of HTML from a jinja2 template; every value that is not Markup is escaped."""
    return Markup(_ENVIRONMENT.from_string(template).render(values))


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[int] = ()) -> Markup:
    """A table that scrolls where it is too wide. `numeric`: columns set flush right, counted from 0."""
    cells = [[cell if isinstance(cell, Markup) else visible(str(cell)) for cell in row] for row in rows]
    kinds = ["number" if index in numeric else "text" for index in range(len(headers))]
    return fill(_TABLE, headers=headers, rows=cells, kinds=kinds)


def visible(text: str) -> str:
    """The text with control, format, bidirectional and zero-width characters spelled out; newline and tab stay."""
    return re.sub(r"[^\x20-\x7e\n\t]", _spell_out, text)


def _spell_out(match: re.Match[str]) -> str:
    character = match.group()
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"\u27e8U+{ord(character):04X}\u27e9"


def format_number(value: float | None) -> str:
    """Three decimals below 10, fewer above; a dash-free word where there is no value."""
    if value is None:
        return "none"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def format_interval(low: float | None, high: float | None, sign: str = "") -> str:
    """`[0.81, 0.93]`, or nothing where there is no interval."""
    if low is None or high is None:
        return ""
    return (
        f"[{low:{sign}.2f}, {high:{sign}.2f}]"
        if max(abs(low), abs(high)) < 10
        else f"[{low:{sign}.1f}, {high:{sign}.1f}]"
    )


def format_estimate(estimate: Mapping[str, Any]) -> str:
    """`0.875 [0.81, 0.93]`."""
    return f"{format_number(estimate['value'])} {format_interval(estimate['ci_low'], estimate['ci_high'])}".rstrip()


def format_difference(difference: Mapping[str, Any]) -> str:
    """`+0.125 [+0.02, +0.23]`."""
    if difference["value"] is None:
        return "none"
    return f"{difference['value']:+.3f} {format_interval(difference['ci_low'], difference['ci_high'], '+')}".rstrip()


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its one axes, in inches. Raises InputError if matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        what = "matplotlib, which draws the figures, is not installed"
        raise InputError(Problem("report", "", what, "pip install 'sft-recipes[report]'")) from error
    with rc_context(_figure_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_svg(figure: Any, label: str) -> Markup:
    """The figure as inline SVG in the page's colours, the same bytes each time. `label` describes it in words."""
    import io

    from matplotlib import rc_context

    buffer = io.StringIO()
    # Ids are hashed with the label, so that those of two figures in one page do not meet.
    with rc_context({**_figure_style(), "svg.fonttype": "none", "svg.hashsalt": label}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    template = '<figure><div class="scroll" role="img" aria-label="{{ label }}">{{ svg }}</div>'
    return fill(template + "<figcaption>{{ label }}</figcaption></figure>", label=label, svg=Markup(svg))


def figure_or_note(draw: Callable[[], Markup]) -> Markup:
    """What `draw` returns; where figures cannot be drawn, the reason stands in their place."""
    try:
        return draw()
    except InputError as error:
        return fill('<p class="note">No figure here. {{ reason }}</p>', reason=str(error))


def _figure_style() -> Any:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(inked, INK), "font.size": 10, "font.family": "sans-serif", "text.parse_math": False}
