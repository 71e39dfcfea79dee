"""The data quality report of an audit, made from its `audit.json`, and what the command prints."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from sft_recipes import run_folder
from sft_recipes.report import page
from sft_recipes.report.audit_figures import draw_figures
from sft_recipes.report.audit_parts import Audit, checks_by_name, finding
from sft_recipes.report.audit_view import VIEWS
from sft_recipes.report.number_texts import counted

__all__ = ["render", "verdict", "write_audit_report"]

_PRINTED_FINDINGS = 5
_PRINTED_PLACES = 3


class _Section(NamedTuple):
    """A section: its macro in `audit.html`, its heading, the checks whose findings stand in it."""

    name: str
    title: str
    checks: tuple[str, ...] = ()


# In the order of the page. The findings of checks that none of them names stand in `rows`.
_SECTIONS = (
    _Section("verdict", "Verdict"),
    _Section("rows", "Broken rows, and what cleaning drops"),
    _Section("truncation", "Rows that are too long", ("truncation",)),
    _Section("lengths", "Lengths"),
    _Section(
        "duplicates",
        "Duplicates",
        (
            "duplicate_row",
            "duplicate_messages",
            "near_duplicate",
            "duplicate_prompt",
            "near_duplicate_prompt",
            "template_variant",
        ),
    ),
    _Section("contamination", "Overlap with evaluation data", ("contamination", "split_leak")),
    _Section(
        "patterns",
        "Patterns",
        (
            "refusal",
            "identity",
            "cutoff",
            "repetition",
            "instruction_openers",
            "response_openers",
            "boilerplate",
            "script_mismatch",
        ),
    ),
    _Section("diversity", "Diversity"),
    _Section("private_data", "Private data", ("secret", "personal_data")),
    _Section("control_tokens", "Control tokens in the text", ("control_tokens",)),
    _Section("samples", "Sample rows"),
    _Section("definitions", "Definitions and settings"),
)


def write_audit_report(folder: Path) -> Path:
    """Write `report.html` beside the `audit.json` of the folder and return its path."""
    path = folder / "report.html"
    audit = run_folder.read_json(folder / "audit.json")
    path.write_text(render(audit), encoding="utf-8")
    return path


def render(audit: Audit) -> str:
    """The report as one HTML document; long texts are cut with their length stated."""
    summary = (
        f"What is in {audit['source']}, what is wrong with which rows, and what to do about it."
    )
    sections = {}
    for section in _SECTIONS:
        sections[section.title] = _render_section(section, audit)
    return page.render_page("Data quality", summary, sections, kind="column")


def _render_section(section: _Section, audit: Audit) -> Markup:
    checks = set(section.checks)
    if section.name == "rows":
        checks = _checks_without_section(audit)
    findings = []
    for content in audit["findings"]:
        if content["check"] in checks:
            findings.append(finding(audit, content))
    passed = []
    for content in audit["passed"]:
        if content["check"] in checks:
            passed.append(content["title"])
    macro = getattr(page.macros("audit.html"), section.name)
    body: Markup = macro(
        VIEWS[section.name](audit),
        findings,
        passed,
        draw_figures(section.name, audit),
    )
    return body


def _checks_without_section(audit: Audit) -> set[str]:
    checks = set(checks_by_name(audit))
    for section in _SECTIONS:
        checks -= set(section.checks)
    return checks


def verdict(audit: Audit, report: Path) -> str:
    """What the command prints: rows, findings, and the five that matter most with their places."""
    dropped = {step["reason"]: step["rows"] for step in audit["waterfall"] if step["rows"]}
    severities = Counter(content["severity"] for content in audit["findings"])
    printed = list(map(_printed, audit["findings"][:_PRINTED_FINDINGS]))
    view = {
        "rows": counted(audit["rows_in"], "row"),
        "rows_kept": audit["rows_in"] - sum(dropped.values()),
        "errors": counted(severities["error"], "error"),
        "warnings": counted(severities["warning"], "warning"),
        "notes": counted(severities["info"], "note"),
        "findings": printed,
        "report": report,
        "cleaned": audit.get("cleaned"),
        "dropped": dropped,
    }
    return str(page.macros("audit.txt").verdict(view))


def _printed(content: Mapping[str, Any]) -> dict[str, Any]:
    places = list(dict.fromkeys(row["where"] for row in content["examples"]))
    return {
        "severity": content["severity"],
        "check": content["check"],
        "title": content["title"],
        "rows": counted(content["count"], "row"),
        "share": f"{content['share']:.1%}",
        "places": ", ".join(places[:_PRINTED_PLACES]),
        "has_more": content["count"] > _PRINTED_PLACES,
    }
