"""One thing an audit found: what it is, where, how often, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class FlaggedRow:
    """One row under one check. `index` counts input rows over all files of the audit from 0; `where` is `FILE:LINE`.

    `detail` says what was seen there (secrets masked), `related` names the other rows concerned (the kept duplicate,
    the eval row).
    """

    index: int
    where: str
    detail: str = ""
    related: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """All rows under one check. `share` is of the `n` rows that the check could look at, between 0 and 1.

    `definition` is the rule in one sentence with its limits; `fix` says what to do.
    """

    check: str
    severity: Severity
    title: str
    n: int
    rows: Sequence[FlaggedRow]
    definition: str
    fix: str

    @property
    def share(self) -> float | None:
        """Flagged rows over rows looked at; None over no rows."""
        return len({row.index for row in self.rows}) / self.n if self.n else None

    def as_json(self, examples: int = 10) -> dict[str, Any]:
        """Plain data for JSON with the first `examples` rows; all of them stand in the flagged-rows file."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}
        shown = [dataclasses.asdict(row) for row in self.rows[:examples]]
        return {**content, "count": len({row.index for row in self.rows}), "share": self.share, "examples": shown}
