"""The rows of a source that are no examples, and its columns that nobody reads."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.reading.json_reader import RowProblem, append_json_lines
from sft_recipes.errors import SHOWN_PROBLEMS, InputError, Problem
from sft_recipes.messages import place
from sft_recipes.recipe import DataSettings

# From so many bad rows on, the ways to go on without them stand before the rows themselves.
_MANY = 4


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that is no example: its file and place in it, what is wrong, and the row as it stands.

    `row` counts from 0, `line` from 1 where the file has lines.
    """

    file: str
    row: int
    line: int | None
    error: RowProblem
    raw: str

    @property
    def where(self) -> str:
        """`FILE:LINE`, or what stands for it."""
        return place(self.file, self.row, self.line)

    @property
    def problem(self) -> Problem:
        """What is wrong, where, and what to do about it."""
        return self.error.at(self.where)

    @property
    def reason(self) -> str:
        """What is wrong, without a place."""
        if not self.error.field:
            return self.error.what
        return f"{self.error.field}: {self.error.what}"

    def as_json(self) -> dict[str, Any]:
        """The row as `rejects.jsonl` holds it."""
        return {
            "source": self.file,
            "line": self.line,
            "row": self.row,
            "reason": self.reason,
            "raw": self.raw,
        }


class RejectLog:
    """Counts rejected rows and unused columns, and says whether a source is acceptable.

    `on_bad_rows: error` raises InputError with the first 20 problems and the total of the whole
    pass. `skip` writes every rejected row to `path` (JSON Lines, an older file is replaced) and
    raises where more than `max_rejected` of the rows are rejected, or all of them.

    `rows`: of all sources the rejected rows that stand in no file; under `error` of each source the
    first 20, for a caller that stops before the last row.

    By source, of the last pass: `rejected` (reason -> rows), `unused_columns`,
    `evaluation_columns` (of no use in training, and not asked for in this pass), `formats`,
    `recognised` ({column: its name in the rows} where a column was recognised under another name
    unasked), `nulls_removed` (rows of a table that lost a null inside tool calls or tools, see
    `tables.py`).
    """

    def __init__(self, settings: DataSettings, path: Path | None = None) -> None:
        self._settings = settings
        self._path = path
        self._problems: list[Problem] = []
        self.rejected: dict[str, Counter[str]] = {}
        self.unused_columns: dict[str, list[str]] = {}
        self.evaluation_columns: dict[str, list[str]] = {}
        self.formats: dict[str, str] = {}
        self.recognised: dict[str, Mapping[str, str]] = {}
        self.nulls_removed: dict[str, int] = {}
        self.rows: list[RejectedRow] = []
        if path is not None:
            path.unlink(missing_ok=True)

    def begin(self, source: str) -> None:
        """Start to count the rows of a source."""
        self._problems = []
        self.rejected[source] = Counter()
        self.unused_columns[source] = []
        self.evaluation_columns[source] = []
        self.recognised[source] = {}
        self.nulls_removed[source] = 0

    def add(
        self, source: str, file: str, row: int, line: int | None, error: RowProblem, raw: str
    ) -> None:
        """Count a row that is no example."""
        rejected = RejectedRow(file, row, line, error, raw)
        self.rejected[source][re.sub(r"\d+", "N", rejected.reason)] += 1
        is_shown = len(self._problems) < SHOWN_PROBLEMS
        if is_shown:
            self._problems.append(rejected.problem)
        skips = self._settings.on_bad_rows == "skip"
        if skips and self._path is not None:
            append_json_lines(self._path, [rejected.as_json()])
        elif skips or is_shown:
            self.rows.append(rejected)

    @property
    def total(self) -> int:
        """How many rows of all sources are rejected so far."""
        return sum(reasons.total() for reasons in self.rejected.values())

    def finish(self, source: str, total: int) -> None:
        """Raise InputError for a source without rows, or with too many rejected ones."""
        reasons = self.rejected[source]
        limit = self._settings.max_rejected
        rejected = reasons.total()
        if not total:
            raise InputError(Problem(source, "", "no rows", "write at least one row"))
        if rejected and self._settings.on_bad_rows == "error":
            if rejected >= _MANY and rejected < total:
                what = f"{rejected} of {total} rows cannot be trained"
                fix = self._ways_out(source, rejected / total)
                first = Problem(source, "on_bad_rows", what, fix)
                raise InputError([first, *self._problems], total=rejected + 1)
            raise InputError(self._problems, total=rejected)
        if rejected / total > limit or rejected == total:
            what = f"{rejected} of {total} rows are rejected, the limit is {limit:.4g} of them:"
            for reason, count in reasons.most_common(SHOWN_PROBLEMS):
                what += f"\n{count:8} x {reason}"
            fix = "repair the rows"
            if rejected < total:
                fix = self._ways_out(source, rejected / total)
            raise InputError(Problem(source, "max_rejected", what, fix))

    def lines(self) -> list[str]:
        """What a user should know of how the columns of each source were read, a line each."""
        lines: list[str] = []
        for source in self.recognised:
            lines += [f"{source}: {note}" for note in self.notes(source)]
        return lines

    def notes(self, source: str) -> list[str]:
        """The same of one source."""
        notes: list[str] = []
        mapping = self.recognised[source]
        if mapping:
            pairs = ", ".join(f"{name} -> {column}" for column, name in mapping.items())
            notes.append(f"columns read as ours: {pairs}")
        if self.evaluation_columns[source]:
            used = ", ".join(self.evaluation_columns[source])
            notes.append(f"columns for evaluation, which training does not need: {used}")
        if self.unused_columns[source]:
            notes.append(f"columns not used: {', '.join(self.unused_columns[source])}")
        if self.nulls_removed[source]:
            what = "had nulls inside tool calls or tools, which the table adds; removed"
            notes.append(f"{self.nulls_removed[source]:,} rows {what}")
        return notes

    def _ways_out(self, source: str, share: float) -> str:
        """How to train the other rows, in words that work when copied."""
        keys: list[str] = []
        if self._settings.on_bad_rows == "error":
            keys.append("`on_bad_rows: skip`")
        if share > self._settings.max_rejected:
            keys.append(f"`max_rejected: {_rounded_up(share)}`")
        leave_out = f"set {' and '.join(keys)} to leave them out"
        clean = f"`sft-recipes audit {shlex.quote(source)} --clean OUT`"
        return f"{leave_out}, write the others to a file with {clean}, or repair them"


def _rounded_up(share: float) -> float:
    """The share in hundredths that is not below it."""
    hundredths = int(share * 100)
    if hundredths < share * 100:
        hundredths += 1
    return hundredths / 100
