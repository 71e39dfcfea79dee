"""The rows without what is asked to be dropped: every input row is kept as it was, or dropped with its reasons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_recipes.audit.finding import CHECKS, Finding
from sft_recipes.data.loading import open_rows
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import place
from sft_recipes.recipe import DatasetSource

# What is dropped if nothing else is asked for; what no list names is only reported.
DROPPED_CHECKS = (
    "malformed",
    "no_labels",
    "empty_answer",
    "duplicate_row",
    "split_leak",
    "contamination",
)
KEPT, DROPPED = "kept.jsonl", "dropped.jsonl"


def dropping(names: Sequence[str]) -> Sequence[str]:
    """The checks that drop rows, in this order; without names the usual ones. Raises InputError if one is no check."""
    for name in names:
        if name not in CHECKS:
            raise InputError(
                Problem("command line", "--drop", f"{name!r} is no check", suggest(name, CHECKS))
            )
    return names or DROPPED_CHECKS


def reasons_by_row(findings: Sequence[Finding], checks: Sequence[str]) -> dict[int, list[str]]:
    """Row index -> the dropping checks that flag it, in their order."""
    reasons: dict[int, list[str]] = {}
    dropping = sorted(
        (one for one in findings if one.check in checks), key=lambda one: checks.index(one.check)
    )
    for finding in dropping:
        for index in {row.index for row in finding.rows}:
            reasons.setdefault(index, []).append(finding.check)
    return reasons


def write_cleaned(
    source: DatasetSource, reasons: Mapping[int, Sequence[str]], folder: Path
) -> dict[str, int]:
    """Write `kept.jsonl` (rows as they were) and `dropped.jsonl` into a new folder; returns how many rows are in each.

    Reads the source once more. Raises InputError if it has changed since.
    """
    folder.mkdir(parents=True)
    total = kept = 0
    with (
        (folder / KEPT).open("x", encoding="utf-8") as good,
        (folder / DROPPED).open("x", encoding="utf-8") as bad,
    ):
        for file, rows in open_rows(source, source.split):
            for number, (line, row, text) in enumerate(rows):
                why, where = reasons.get(total), place(file, number, line)
                kept, total = kept + (why is None), total + 1
                kind = text if isinstance(row, RowProblem) else row
                entry = {"where": where, "reasons": why, "row": kind} if why else row
                (bad if why else good).write(
                    json.dumps(entry, ensure_ascii=False, default=str) + "\n"
                )
    if kept + len(reasons) != total:
        raise InputError(
            Problem(
                source.path, "", "the file has changed since it was audited", "run the audit again"
            )
        )
    return {"kept": kept, "dropped": total - kept}
