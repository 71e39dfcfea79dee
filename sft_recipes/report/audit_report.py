"""The data quality report of an audit, made from its `audit.json`."""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sft_recipes import run_folder
from sft_recipes.report import page

Audit = Mapping[str, Any]


def write_audit_report(folder: Path) -> Path:
    """Write `report.html` beside the `audit.json` of the folder and return its path."""
    path = folder / "report.html"
    path.write_text(render(run_folder.read_json(folder / "audit.json")), encoding="utf-8")
    return path


def render(audit: Audit) -> str:
    """The report as one HTML document; long texts are cut with their length stated, so its size is bounded."""
    parts = page.macros("audit.html")
    placed = {check for _, checks in parts.sections.values() for check in checks}
    folders = {"".join(file["path"].rpartition("/")[:2]) for file in audit["files"]}
    content = {
        **audit,
        # A folder that all files share is not repeated with each row.
        "folder": folders.pop() if len(folders) == 1 else "",
        "kept": audit["rows_in"] - sum(step["rows"] for step in audit["waterfall"]),
        "checks": {one["check"]: one for one in (*audit["findings"], *audit["passed"])},
    }
    sections = {}
    for name, (title, checks) in parts.sections.items():
        names = {*content["checks"]} - placed if name == "rows" else checks
        found, passed = (
            [one for one in audit[kind] if one["check"] in names] for kind in ("findings", "passed")
        )
        figures = [page.figure_or_note(partial(draw, audit)) for draw in _FIGURES.get(name, ())]
        sections[title] = getattr(parts, name)(content, found, passed, figures, compare)
    summary = (
        f"What is in {audit['source']}, what is wrong with which rows, and what to do about it."
    )
    return page.render_page("Data quality", summary, sections)


def compare(one: str, other: str) -> list[list[tuple[str, bool]]]:
    """Both texts in pieces `(text, whether both have it)`, word by word; the pieces of a text make up the text."""
    left, right = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (one, other))
    steps = SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    return [
        [("".join(left[a:b]), kind == "equal") for kind, a, b, _, _ in steps if a < b],
        [("".join(right[c:d]), kind == "equal") for kind, _, _, c, d in steps if c < d],
    ]


def _reach(audit: Audit) -> Markup:
    if not audit["truncation"]:
        return Markup()
    figure, axes = page.new_figure(7.2, 2.8)
    lines = {
        "total_tokens": ("whole rows", page.ACCENT, "-"),
        "prompt_tokens": ("prompts alone", page.MUTED, "--"),
    }
    lengths = []
    for name, (label, colour, style) in lines.items():
        edges, counts = (audit["lengths"][name]["histogram"][key] for key in ("edges", "counts"))
        shares = [part / sum(counts) for part in accumulate(counts, initial=0)]
        axes.plot(edges, shares, label=label, color=colour, linestyle=style, linewidth=2)
        lengths += edges
    if limit := audit["settings"]["max_length"]:
        axes.axvline(limit, color=page.INK, linestyle=":", label=f"max_length {limit:,}")
        lengths.append(limit)
    _count_axis(axes, "x", lengths, "tokens")
    axes.set(ylabel="rows up to this length")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    return page.figure_svg(
        figure, "Share of rows up to each length: where the line is high, most rows fit."
    )


def _histogram(
    size: tuple[float, float], histogram: Mapping[str, Sequence[float]], y_label: str
) -> tuple[Any, Any]:
    figure, axes = page.new_figure(*size)
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=page.ACCENT)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylabel=y_label)
    return figure, axes


def _lengths(part: str, name: str, audit: Audit) -> Markup:
    unit = audit["lengths"]["unit"]
    numbers = audit["lengths"][f"{part}_{unit}"]
    figure, axes = _histogram((5.6, 2.3), numbers["histogram"], "rows")
    _count_axis(axes, "x", numbers["histogram"]["edges"], f"{unit} in the {name}")
    label = f"{unit.capitalize()} in the {name}: half of the rows have at most {numbers['median']:,.0f}."
    return page.figure_svg(figure, label)


def _shapes(audit: Audit) -> Markup:
    figure, axes = page.new_figure(5.6, 3.2)
    columns = list(zip(*audit["lengths"]["points"], strict=True))
    size = 4 if len(columns[0]) > 100 else 9  # a few points have to be seen, too
    axes.plot(*columns, ".", color=page.ACCENT, markersize=size, alpha=0.5, markeredgewidth=0)
    for name, values, part in zip("xy", columns, ("prompt", "answer"), strict=True):
        _count_axis(axes, name, values, f"{audit['lengths']['unit']} in the {part}")
    label = f"How long prompt and answer are together, a point for each of {len(columns[0]):,} rows drawn at random."
    return page.figure_svg(figure, label)


def _alike(audit: Audit) -> Markup:
    near = audit["duplicates"]["near"]
    if not any(near["histogram"]["counts"]):
        return Markup()
    figure, axes = _histogram((7.2, 2.3), near["histogram"], "pairs of rows")
    axes.axvline(
        near["threshold"], color=page.INK, linestyle=":", label=f"threshold {near['threshold']:.0%}"
    )
    axes.set(xlabel="three-word runs that two rows share, of all that they have")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    return page.figure_svg(
        figure, "How alike similar rows are: pairs to the right of the line are near-duplicates."
    )


def _count_axis(axes: Any, name: str, values: Sequence[float], label: str) -> None:
    """A logarithmic axis, "x" or "y", (0 stands left of 1) with few ticks that are plain numbers."""
    low, high = max(min(values), 1), max(*values, 2)
    steps = (1,) if high > 1000 * low else (1, 2, 5)
    ticks = [
        digit * 10**power
        for power in range(9)
        for digit in steps
        if low <= digit * 10**power <= high
    ]
    getattr(axes, f"set_{name}scale")("symlog", linthresh=1)
    limits, shown = (min(values) / 1.1, high * 1.1), ticks if len(ticks) > 1 else [low, high]
    axes.set(
        **{f"{name}lim": limits, f"{name}ticks": shown, f"{name}label": f"{label} (logarithmic)"}
    )
    axes.minorticks_off()
    getattr(axes, f"{name}axis").set_major_formatter("{x:,.0f}")


_FIGURES: Mapping[str, Sequence[Callable[[Audit], Markup]]] = {
    "truncation": (_reach,),
    "lengths": (
        partial(_lengths, "prompt", "prompt"),
        partial(_lengths, "response", "answer"),
        _shapes,
    ),
    "duplicates": (_alike,),
}
