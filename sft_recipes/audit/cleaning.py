"""The rows without what is asked to be dropped.

Every input row is kept as it was, or dropped with its reasons.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

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
KEPT = "kept.jsonl"
DROPPED = "dropped.jsonl"


def refuse_output(folder: Path, name: str, sources: Sequence[DatasetSource]) -> None:
    """Raise InputError for a folder that exists, and for several data sets.

    `name` is what is audited.
    """
    if folder.exists():
        problem = Problem(str(folder), "--clean", "exists already", "name a new folder")
        raise InputError(problem)
    if len(sources) > 1:
        what = "several data sets do not fit into one file"
        raise InputError(Problem(name, "--clean", what, "clean each by itself"))


def dropping(names: Sequence[str]) -> Sequence[str]:
    """The checks that drop rows, in this order; without names the usual ones.

    Raises InputError if one is no check.
    """
    for name in names:
        if name not in CHECKS:
            what = f"{name!r} is no check"
            raise InputError(Problem("command line", "--drop", what, suggest(name, CHECKS)))
    return names or DROPPED_CHECKS


def reasons_by_row(findings: Iterable[Finding], checks: Sequence[str]) -> dict[int, list[str]]:
    """Row index -> the dropping checks that flag it, in their order."""
    rows_of: dict[str, dict[int, None]] = {}
    for finding in findings:
        rows_of[finding.check] = dict.fromkeys(row.index for row in finding.rows)
    reasons: dict[int, list[str]] = {}
    for check in dict.fromkeys(checks):
        for index in rows_of.get(check, ()):
            reasons.setdefault(index, []).append(check)
    return reasons


def write_cleaned(
    source: DatasetSource, reasons: Mapping[int, Sequence[str]], folder: Path
) -> dict[str, int]:
    """Write `kept.jsonl` (rows as they were) and `dropped.jsonl` into a new folder.

    Returns how many rows are in each. Reads the source once more. Raises InputError if it has
    changed since.
    """
    folder.mkdir(parents=True)
    counts = {"kept": 0, "dropped": 0}
    with (
        (folder / KEPT).open("x", encoding="utf-8") as kept,
        (folder / DROPPED).open("x", encoding="utf-8") as dropped,
    ):
        index = 0
        for file, rows in open_rows(source, source.split):
            for number, (line, row, text) in enumerate(rows):
                if index in reasons:
                    entry = {
                        "where": place(file, number, line),
                        "reasons": reasons[index],
                        "row": text if isinstance(row, RowProblem) else row,
                    }
                    _write_line(dropped, entry)
                    counts["dropped"] += 1
                else:
                    _write_line(kept, row)
                    counts["kept"] += 1
                index += 1
    if counts["dropped"] != len(reasons):
        what = "the file has changed since it was audited"
        raise InputError(Problem(source.path, "", what, "run the audit again"))
    return counts


def _write_line(file: TextIO, entry: Any) -> None:
    file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
