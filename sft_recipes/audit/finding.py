"""One thing an audit found: what it is, where, how often, and what to do about it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.audit.rows import AuditRow
from sft_recipes.response_patterns import mask

SEVERITIES = ("error", "warning", "info")
CHECKS: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("checks.yaml").read_text(encoding="utf-8"))


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

    `severity` is one of `SEVERITIES`, `definition` the rule in one sentence with its limits; `fix` says what to do.
    """

    check: str
    severity: str
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
        content = dataclasses.asdict(dataclasses.replace(self, rows=self.rows[:examples]))
        content["examples"] = content.pop("rows")
        return {**content, "count": len({row.index for row in self.rows}), "share": self.share}


def make_finding(check: str, rows: Sequence[FlaggedRow], n: int, **fills: Any) -> Finding:
    """The finding of a check of `checks.yaml`; `fills` go into its texts."""
    texts = {key: text.format(**fills) for key, text in CHECKS[check].items()}
    return Finding(check=check, rows=rows, n=n, **texts)


def flag(row: AuditRow, detail: str, others: Sequence[AuditRow] = ()) -> FlaggedRow:
    """The row under a check, with the rows it is compared with."""
    return FlaggedRow(row.index, row.where, detail, [other.where for other in others])


def excerpt(text: str, characters: int = 120) -> str:
    """A text for people without its middle, beyond some `characters`; private data is masked before it is cut."""
    masked = mask(text)
    left_out, end = len(masked) - characters, characters // 3
    if left_out <= characters // 4:
        return masked
    return f"{masked[: characters - end]} [... {left_out:,} characters ...] {masked[-end:]}"
