"""The rows without what the policy drops: every input row is kept as it was, or dropped with its reasons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.audit.finding import Finding
from sft_recipes.data.json_reader import RowProblem
from sft_recipes.data.loading import open_rows
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import place
from sft_recipes.recipe import DatasetSource, read_yaml

DEFAULT_POLICY = Path(__file__).with_name("cleaning_policy.yaml")
KEPT, DROPPED = "kept.jsonl", "dropped.jsonl"


def read_policy(path: Path | None, checks: Sequence[str]) -> list[str]:
    """The checks that drop rows, in order. Raises InputError for a name that is no check and for any other key."""
    values, lines = read_yaml(path := path or DEFAULT_POLICY)
    names, where = values.get("drop"), f"{path}:{next(iter(lines.values()), 1)}"
    if set(values) != {"drop"} or not isinstance(names, list):
        raise InputError(Problem(where, "drop", "expected this key alone, with a list", "write `drop: [malformed]`"))
    for name in names:
        if name not in checks:
            raise InputError(Problem(where, "drop", f"{name!r} is no check", suggest(str(name), checks)))
    return names


def reasons_by_row(findings: Sequence[Finding], policy: Sequence[str]) -> dict[int, list[str]]:
    """Row index -> the policy's checks that flag it, in the policy's order."""
    reasons: dict[int, list[str]] = {}
    dropping = sorted((one for one in findings if one.check in policy), key=lambda one: policy.index(one.check))
    for finding in dropping:
        for index in {row.index for row in finding.rows}:
            reasons.setdefault(index, []).append(finding.check)
    return reasons


def write_cleaned(source: DatasetSource, reasons: Mapping[int, Sequence[str]], folder: Path) -> dict[str, int]:
    """Write `kept.jsonl` (rows as they were) and `dropped.jsonl` into a new folder; returns how many rows are in each.

    Reads the source once more. Raises InputError if it has changed since.
    """
    folder.mkdir(parents=True)
    total = kept = 0
    with (folder / KEPT).open("x", encoding="utf-8") as good, (folder / DROPPED).open("x", encoding="utf-8") as bad:
        for file, rows in open_rows(source, source.split):
            for number, (line, row, text) in enumerate(rows):
                why, where = reasons.get(total), place(file, number, line)
                kept, total = kept + (why is None), total + 1
                kind = text if isinstance(row, RowProblem) else row
                (bad if why else good).write(_line({"where": where, "reasons": why, "row": kind} if why else row))
    if kept + len(reasons) != total:
        raise InputError(Problem(source.path, "", "the file has changed since it was audited", "run the audit again"))
    return {"kept": kept, "dropped": total - kept}


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"
