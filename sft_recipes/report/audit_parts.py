"""What several sections of the data quality report show: bars, marked texts, findings, places."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from sft_recipes.report.number_texts import (
    Shortened,
    counted,
    percent,
    shortened,
    spaced,
    thousands,
)

Audit = Mapping[str, Any]
View = dict[str, Any]
_EXAMPLES = 5
_RELATED = 3
_DETAIL_CHARACTERS = 240
_LABEL_CHARACTERS = 160
# Single words that happen to stand in two texts are no overlap worth a mark.
_SHARED_CHARACTERS = 12


class Bar(NamedTuple):
    """A row of a table with bars: `width` in percent of the track, "" for no bar."""

    label: Shortened
    number: str
    share: str
    width: str


class Span(NamedTuple):
    """A part of a text, and whether it is marked."""

    text: str
    is_marked: bool


class Passage(NamedTuple):
    """A part of one of two texts, and whether the other has it, too."""

    text: str
    is_shared: bool


def bars(counts: Sequence[tuple[str, int]], whole: int, longest: int) -> list[Bar]:
    """Labels with counts: `whole` is what shares are of, `longest` the count of a full bar."""
    rows = []
    for label, count in counts:
        row = Bar(
            label=shortened(label, _LABEL_CHARACTERS),
            number=thousands(count),
            share=percent(count / whole),
            width=bar_width(count, longest) if count else "",
        )
        rows.append(row)
    return rows


def bar_width(count: float, whole: float) -> str:
    """In percent of the track."""
    return f"{100 * count / (whole or 1):.2f}"


def compare(left: str, right: str) -> tuple[list[Passage], list[Passage]]:
    """Both texts in passages, word by word; the passages of a text make up the text."""
    left_words = _units(left)
    right_words = _units(right)
    left_passages = []
    right_passages = []
    matcher = SequenceMatcher(None, left_words, right_words, autojunk=False)
    for kind, left_start, left_stop, right_start, right_stop in matcher.get_opcodes():
        is_shared = kind == "equal"
        if left_start < left_stop:
            text = "".join(left_words[left_start:left_stop])
            left_passages.append(Passage(text, is_shared))
        if right_start < right_stop:
            text = "".join(right_words[right_start:right_stop])
            right_passages.append(Passage(text, is_shared))
    return left_passages, right_passages


def _units(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def mark_differences(passages: Sequence[Passage]) -> list[Span]:
    """What only one text has is marked."""
    return [Span(passage.text, not passage.is_shared) for passage in passages]


def mark_shared(passages: Sequence[Passage]) -> list[Span]:
    """Longer passages that both texts have are marked."""
    spans = []
    for passage in passages:
        is_long = len(passage.text) > _SHARED_CHARACTERS or len(passages) == 1
        spans.append(Span(passage.text, passage.is_shared and is_long))
    return spans


def place(audit: Audit, where: str) -> str:
    """`FILE:LINE` without the folder, where all files share it."""
    folders = {"".join(file["path"].rpartition("/")[:2]) for file in audit["files"]}
    if len(folders) == 1:
        return where.removeprefix(folders.pop())
    return where


def finding(audit: Audit, content: Mapping[str, Any]) -> View:
    """A finding with its first examples."""
    examples = []
    for row in content["examples"][:_EXAMPLES]:
        examples.append(_example(audit, content["check"], row))
    return {
        "check": content["check"],
        "severity": content["severity"],
        "title": content["title"],
        "definition": content["definition"],
        "fix": content["fix"],
        "is_open": content["severity"] != "info",
        "amount": _amount(content),
        "shown": len(examples),
        "count": content["count"],
        "has_related": any(row["related"] for row in content["examples"]),
        "examples": examples,
    }


def _amount(content: Mapping[str, Any]) -> str:
    of = counted(content["n"], "row")
    return f"{thousands(content['count'])} of {of} ({percent(content['share'])})"


def _example(audit: Audit, check: str, row: Mapping[str, Any]) -> View:
    detail = row["detail"]
    speaker = ""
    # The token itself is marked.
    if check == "control_tokens":
        speaker, _, detail = detail.partition(": ")
    # What is seen there is masked; the kind of it is shown.
    if check in ("secret", "personal_data"):
        detail = spaced(detail)
    related = [place(audit, where) for where in row["related"][:_RELATED]]
    more = len(row["related"]) - len(related)
    return {
        "where": place(audit, row["where"]),
        "speaker": speaker,
        "detail": shortened(detail, _DETAIL_CHARACTERS),
        "related": ", ".join(related),
        "more_related": thousands(more) if more else "",
    }


def checks_by_name(audit: Audit) -> dict[str, Mapping[str, Any]]:
    """All findings, empty ones included."""
    checks = {}
    for content in (*audit["findings"], *audit["passed"]):
        checks[content["check"]] = content
    return checks
