"""What report and terminal say of an evaluation, worked out from its files: no words here."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Content = Mapping[str, Any]

SHOWN_OPENERS = 8
LOST = "lost"
GAINED = "gained"
SAME = "same"
# What each comes to in words.
CHANGES: Mapping[str, str] = {
    LOST: "lost: right in the base, wrong now",
    GAINED: "won: wrong in the base, right after tuning",
    SAME: "as right or wrong as the base",
}


class RowPair(NamedTuple):
    """A row of `samples.jsonl`, and the base's row on the same prompt where there is a base."""

    row: Row
    base: Row | None

    @property
    def change(self) -> str:
        """`lost` (right in the base, wrong now), `gained`, `same`; empty without a base."""
        if self.base is None:
            return ""
        before = bool(self.base["exact_match"])
        after = bool(self.row["exact_match"])
        if before == after:
            return SAME
        return GAINED if after else LOST

    @property
    def outcome(self) -> str:
        """Right or wrong, and beside the base; empty where nothing was expected."""
        is_right = self.row["exact_match"]
        if is_right is None:
            return ""
        if self.change in (LOST, GAINED):
            return CHANGES[self.change]
        text = "right" if is_right else "wrong"
        return text if self.base is None else f"both {text}"


def order_rows(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> list[RowPair]:
    """Rows with their base rows: those that became wrong first, the rest in data order."""
    bases = [None] * len(samples) if base_samples is None else base_samples
    pairs = [RowPair(row, base) for row, base in zip(samples, bases, strict=True)]
    return sorted(pairs, key=lambda pair: pair.change != LOST)


def question(row: Row) -> str:
    """The last thing that was asked, without the template around it, where that is recorded."""
    for turn in reversed(row.get("messages", ())):
        if turn.get("role") == "user" and isinstance(turn.get("content"), str):
            return str(turn["content"])
    return str(row["prompt"])


def metric_names(content: Content) -> dict[str, str]:
    """What each metric is called."""
    return {name: metric["label"] for name, metric in content["metrics"].items()}


@dataclass(frozen=True, slots=True)
class IntervalBar:
    """An interval, its value and a limit on one line, as percentages of what they span."""

    low: float
    high: float
    value: float
    limit: float


def interval_bar(line: Content) -> IntervalBar | None:
    """The bar of a line of the gate; None where it has no interval."""
    if line["ci_low"] is None:
        return None
    start = min(line["ci_low"], line["limit"])
    # Not 0 where interval and limit are one point.
    width = max(max(line["ci_high"], line["limit"]) - start, 1e-9)
    return IntervalBar(
        low=(line["ci_low"] - start) / width * 100,
        high=(line["ci_high"] - start) / width * 100,
        value=(line["value"] - start) / width * 100,
        limit=(line["limit"] - start) / width * 100,
    )


class DifferingKey(NamedTuple):
    """A key of recipe, data or way of asking that a compared system has another value of."""

    system: str
    part: str
    key: str
    there: Any
    here: Any


def differing_keys(systems: Sequence[Content]) -> Iterator[DifferingKey]:
    """Whatever else differs from each compared system."""
    for system in systems:
        for part, keys in system.get("changed", {}).items():
            for key, (there, here) in keys.items():
                yield DifferingKey(system["name"], part, key, there, here)


@dataclass(frozen=True, slots=True)
class Ending:
    """How many answers of one model ended for a reason, and their share."""

    reason: str
    count: int
    share: float

    @property
    def width(self) -> float:
        """The share of a bar in percent."""
        return 100 * self.share


def endings(content: Content, reasons: Sequence[str]) -> list[Ending]:
    """One for each reason, in this order; none where there are no answers."""
    ends = []
    answers = sum(content["stop_reasons"].values())
    for reason in reasons if answers else ():
        count = content["stop_reasons"].get(reason, 0)
        ends.append(Ending(reason, count, count / answers))
    return ends


@dataclass(frozen=True, slots=True)
class Opener:
    """How often answers of more than four words begin with these four."""

    text: str
    count: int
    share: float


def frequent_openers(samples: Sequence[Row]) -> list[Opener]:
    """The most frequent first four words."""
    openers = Counter(row["opener"] for row in samples if row.get("opener"))
    return [
        Opener(text, count, count / openers.total())
        for text, count in openers.most_common(SHOWN_OPENERS)
    ]


@dataclass(frozen=True, slots=True)
class FormatRefusals:
    """The shares of safe and of unsafe prompts that one model refused in one format."""

    model: str
    format: str
    safe: Content
    unsafe: Content


def refusals_by_format(safety: Content) -> list[FormatRefusals]:
    """The shares refused, both kinds of prompts side by side."""
    by_label: dict[tuple[str, str], dict[str, Content]] = {}
    for share in safety["refused"]:
        by_label.setdefault((share["model"], share["format"]), {})[share["label"]] = share
    refusals = []
    for (model, name), shares in by_label.items():
        refusals.append(FormatRefusals(model, name, shares["safe"], shares["unsafe"]))
    return refusals


def refused_count(share: Content) -> int:
    """How many prompts a share of them is."""
    return round((share["value"] or 0) * share["n"])


def too_few_prompts(safety: Content) -> bool:
    """Whether there are too few prompts of a kind to decide anything."""
    return min(share["n"] for share in safety["refused"]) < int(safety["n_min"])
