"""The rows of a source that are no examples, and its columns that nobody reads."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.data.reading.json_reader import RowProblem, append_json_lines
from sft_recipes.errors import SHOWN_PROBLEMS, InputError, Problem
from sft_recipes.messages import place
from sft_recipes.recipe import DataSettings

# From so many bad rows on, the ways to go on without them stand before the rows themselves.
_MANY = 4


class RejectLog:
    """Counts rejected rows and unused columns, and says whether a source is acceptable.

    `on_bad_rows: error` raises InputError with the first 20 problems and the total of the whole
    pass. `skip` writes every rejected row to `path` (JSON Lines: source, line, row, reason, raw; an
    older file is replaced), or without a path keeps it in `rows`, and raises where more than
    `max_rejected` of the rows are rejected, or all of them.

    By source, of the last pass: `rejected` (reason -> rows), `unused_columns`, `formats`,
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
        self.formats: dict[str, str] = {}
        self.recognised: dict[str, Mapping[str, str]] = {}
        self.nulls_removed: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        if path is not None:
            path.unlink(missing_ok=True)

    def begin(self, source: str) -> None:
        """Start to count the rows of a source."""
        self._problems = []
        self.rejected[source] = Counter()
        self.unused_columns[source] = []
        self.recognised[source] = {}
        self.nulls_removed[source] = 0

    def add(
        self, source: str, file: str, row: int, line: int | None, error: RowProblem, raw: str
    ) -> None:
        """Count a row that is no example."""
        reason = f"{error.field}: {error.what}" if error.field else error.what
        self.rejected[source][re.sub(r"\d+", "N", reason)] += 1
        if len(self._problems) < SHOWN_PROBLEMS:
            self._problems.append(error.at(place(file, row, line)))
        if self._settings.on_bad_rows == "error":
            return
        entry = {"source": file, "line": line, "row": row, "reason": reason, "raw": raw}
        if self._path is None:
            self.rows.append(entry)
        else:
            append_json_lines(self._path, [entry])

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
