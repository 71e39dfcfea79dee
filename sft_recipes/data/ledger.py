"""The account of every input row: trained, or listed with source, line and reason."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jinja2

from sft_recipes.data.labels import LabelledBatch, LabelledRow
from sft_recipes.data.reading.rejects import RejectLog
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example

SHOWN_PLACES = 5
SHOWN_REASONS = 5


@dataclass(slots=True)
class SourceLedger:
    """Counts of one source.

    Rows are input rows; training rows can be more (turns that became rows of their own).

    `rows_in = rows_rejected + rows_kept + rows_dropped`, always. Tokens of rows that could not be
    verified are not known; they count as rows in `dropped`.
    """

    source: str
    split: str
    rows_in: int = 0
    rows_rejected: int = 0
    rows_kept: int = 0
    rows_dropped: int = 0
    rows_cut: int = 0
    rows_neutralized: int = 0
    rows_stripped: int = 0
    rows_joined: int = 0
    training_rows: int = 0
    turns_masked: int = 0
    tokens_kept: int = 0
    trained_tokens_kept: int = 0
    trained_tokens_lost: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: Mapping[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    unused_columns: Sequence[str] = ()
    notes: Sequence[str] = ()

    def add(self, examples: Sequence[Example], batch: LabelledBatch) -> None:
        """Account for a labelled batch."""
        labelled = _input_rows(batch.rows)
        self.rows_in += len(examples)
        self.rows_kept += len(labelled)
        self.rows_dropped += len(examples) - len(labelled)
        self.rows_stripped += len(batch.stripped & labelled)
        self.rows_cut += len(_input_rows(row for row in batch.rows if row.lost_tokens))
        self.rows_neutralized += len(_input_rows(row for row in batch.rows if row.neutralized))
        self.rows_joined += len(_input_rows(row for row in batch.rows if row.joined))
        self.turns_masked += batch.masked_turns
        self.training_rows += len(batch.rows)
        for row in batch.rows:
            self.tokens_kept += len(row.ids)
            self.trained_tokens_kept += row.trained_tokens
            self.trained_tokens_lost += row.lost_tokens
        for lost in batch.dropped:
            self.trained_tokens_lost += lost.trained_tokens
            self.dropped[lost.reason] += 1
            place = f"{examples[lost.example].where} ({lost.detail})"
            self._show_places(lost.reason, [place])

    def merge(self, part: "SourceLedger") -> None:
        """Account for rows that another process has counted."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.dropped.update(part.dropped)
        for reason, places in part.places.items():
            self._show_places(reason, places)

    def _show_places(self, reason: str, places: Sequence[str]) -> None:
        """Remember where rows were dropped, as far as there is room for it."""
        shown = self.places.setdefault(reason, [])
        shown += places[: SHOWN_PLACES - len(shown)]

    def add_rejected(self, rejects: RejectLog, source: str) -> None:
        """Account for the rows that were no examples, and for what the columns were read as."""
        rows = rejects.rejected[source].total()
        self.rows_in += rows
        self.rows_rejected = rows
        self.rejected = dict(rejects.rejected[source].most_common(SHOWN_REASONS))
        self.unused_columns = rejects.unused_columns[source]
        self.notes = rejects.notes(source)

    @property
    def lost_share(self) -> float:
        """The larger of two shares that are lost.

        Of trained tokens where they could be counted, of rows where not.
        """
        by_rows = self._unverified_rows / max(self.rows_kept + self.rows_dropped, 1)
        return max(self._lost_tokens, by_rows)

    @property
    def _lost_tokens(self) -> float:
        """The share of trained tokens that are lost, as far as they could be counted."""
        tokens = self.trained_tokens_kept + self.trained_tokens_lost
        return self.trained_tokens_lost / max(tokens, 1)

    @property
    def _unverified_rows(self) -> int:
        """The dropped rows whose tokens are not known."""
        return self.dropped.total() - self.dropped["overlength"]

    def check(self, max_lost: float) -> None:
        """Raise InputError if nothing is left or more than `max_lost` is lost, with the reasons."""
        if self.training_rows and self.lost_share <= max_lost:
            return
        lines: list[str] = []
        for reason, count in self.dropped.most_common():
            lines.append(f"{reason}: {count} rows, first {self.places[reason][0]}")
        reasons = "; ".join(lines)
        if not self.training_rows:
            what = f"no row is left to train ({reasons or 'no rows'})"
            fix = "look at rows with `sft-recipes inspect`; raise max_length if they are too long"
            raise InputError(Problem(self.source, "", what, fix))
        what = f"{self._loss()}, max_lost is {max_lost:.1%} ({reasons})"
        fix = (
            "raise max_length, change overlength or the rows named, "
            "or raise max_lost if this is intended"
        )
        raise InputError(Problem(self.source, "", what, fix))

    def _loss(self) -> str:
        """What of the data would be lost, and by how many rows."""
        rows = self.rows_kept + self.rows_dropped
        if self.lost_share > self._lost_tokens:
            unverified = self._unverified_rows
            return f"{unverified:,} of {rows:,} rows ({self.lost_share:.1%}) would be dropped"
        too_long = self.dropped["overlength"] + self.rows_cut
        verb = "holds" if too_long == 1 else "hold"
        share = f"{verb} {self.lost_share:.1%} of the trained tokens, which would be lost"
        return f"{too_long:,} of {rows:,} rows {share}"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `data.json`."""
        content = {name: getattr(self, name) for name in self.__slots__}
        del content["dropped"]  # stands last, the most frequent reason first
        return content | {"dropped": dict(self.dropped.most_common())}


# The counts of a ledger that add up over parts of a source.
COUNTS = tuple(count.name for count in fields(SourceLedger) if count.type is int)


def _input_rows(rows: Iterable[LabelledRow]) -> set[int]:
    """The positions of the examples that these training rows are made of."""
    return {row.example for row in rows}


def ledger_lines(summary: Mapping[str, Any]) -> list[str]:
    """The ledger of `data.json` for the terminal.

    A line per source, one per reason that lost rows, and one per data set of a mixture.
    """
    text = Path(__file__).with_name("ledger.txt.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    mixture = summary.get("mixture", {})
    return template.render(ledgers=summary["sources"], mixture=mixture).splitlines()


def dropped_entries(examples: Sequence[Example], batch: LabelledBatch) -> Iterator[dict[str, Any]]:
    """Lines of `dropped.jsonl`: each dropped row of a batch with source, line and reason."""
    for lost in batch.dropped:
        example = examples[lost.example]
        yield {
            "source": example.source,
            "line": example.line,
            "row": example.row,
            "reason": lost.reason,
            "detail": lost.detail,
            "trained_tokens": lost.trained_tokens,
        }
