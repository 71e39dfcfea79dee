"""How numbers and places are written in reports: the filters of all templates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sft_recipes.messages import place

# Below it a share is said to be small, not rounded to 0.0 %.
SMALL_SHARE = 0.001
SMALL_P = 0.001
LEAST_PERCENT = 0.005
# Units of which a hundredth is a percent.
SHARES = ("proportion", "score 0 to 1")
# A value that is longer is cut, unless by a few characters.
VALUE_CHARACTERS = 24
LEEWAY = 5
ELLIPSIS = "..."
# What stands where nothing was measured.
NO_VALUE = "no value"


def format_estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    """`0.875 [0.81, 0.93]`, one decimal from 10 on; without an interval the value alone.

    Without a value a word. With "+" as `sign`, as for differences, `+0.125 [+0.02, +0.23]`.
    """
    value = estimate["value"]
    low = estimate["ci_low"]
    high = estimate["ci_high"]
    if value is None:
        return NO_VALUE
    digits = 3 if abs(value) < 10 else 1
    number = f"{value:{sign}.{digits}f}"
    if low is None or high is None:
        return number
    digits = 2 if max(abs(low), abs(high)) < 10 else 1
    return f"{number} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def decimals(value: float | None) -> str:
    """`0.125`, or a word where there is no value."""
    return NO_VALUE if value is None else f"{value:.3f}"


def p_value(value: float | None, unknown: str = "") -> str:
    """A p-value with three decimals; smaller ones are said to be."""
    if value is None:
        return unknown
    if value < SMALL_P:
        return f"< {SMALL_P}"
    return f"{value:.3f}"


def percent(share: float | None) -> str:
    """`12.3 %`; shares that would be rounded to nothing are said to be small."""
    if share is None:
        return NO_VALUE
    if 0 < share < SMALL_SHARE:
        return f"below {100 * SMALL_SHARE:.1f} %"
    return f"{100 * share:.1f} %"


def whole_percent(share: float | None) -> str:
    """`53 %`; what is not nothing is not called so, and what is not all is not called all."""
    if share is None:
        return NO_VALUE
    if 0 < share < LEAST_PERCENT:
        return "< 1 %"
    if 1 - LEAST_PERCENT < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def ends(estimate: Mapping[str, Any]) -> str:
    """`46 to 61 %`: the interval of a share alone."""
    if estimate["ci_low"] is None:
        return NO_VALUE
    return f"{100 * estimate['ci_low']:.0f} to {100 * estimate['ci_high']:.0f} %"


def in_percent(estimate: Mapping[str, Any]) -> str:
    """`53 % [46, 61]` of a share or of a score from 0 to 1; other units as `format_estimate`."""
    if estimate["unit"] not in SHARES or estimate["value"] is None:
        return format_estimate(estimate)
    text = whole_percent(estimate["value"])
    if estimate["ci_low"] is None:
        return text
    return f"{text} [{100 * estimate['ci_low']:.0f}, {100 * estimate['ci_high']:.0f}]"


def in_points(difference: Mapping[str, Any]) -> str:
    """`+53 [+45, +60]`: the same of a difference, in percentage points."""
    if difference["unit"] not in SHARES or difference["value"] is None:
        return format_estimate(difference, "+")
    text = f"{100 * difference['value']:+.0f}"
    if difference["ci_low"] is None:
        return text
    return f"{text} [{100 * difference['ci_low']:+.0f}, {100 * difference['ci_high']:+.0f}]"


def thousands(number: float) -> str:
    """`1,234,567`."""
    return f"{number:,}"


def rounded(number: float) -> str:
    """`1,235`."""
    return f"{number:,.0f}"


def counted(number: int, word: str) -> str:
    """`1 row`, `1,234 rows`."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {word}{plural}"


def sentence(text: str) -> str:
    """The text with a capital letter."""
    return text[:1].upper() + text[1:]


def spaced(name: str) -> str:
    """The name of a check or verdict as words."""
    return name.replace("_", " ")


def where(row: Mapping[str, Any]) -> str:
    """Where a row of `samples.jsonl` stands in its data."""
    return place(str(row["source"]), row["row"], row.get("line"))


def short(value: object) -> str:
    """The text of a value, cut between words where it is much longer than a cell."""
    text = str(value)
    if len(text) <= VALUE_CHARACTERS + LEEWAY:
        return text
    return text[: VALUE_CHARACTERS - len(ELLIPSIS)].rsplit(" ", 1)[0] + ELLIPSIS


class Shortened(NamedTuple):
    """A text whose middle may be missing: `hidden` characters between both ends."""

    head: str
    hidden: int
    tail: str


def shortened(text: str, limit: int) -> Shortened:
    """A text of at most `limit` characters, or a quarter more: a cut needs a note, too."""
    if len(text) <= limit * 5 // 4:
        return Shortened(text, 0, "")
    tail = limit // 3
    head = 2 * tail
    return Shortened(text[:head], len(text) - head - tail, text[len(text) - tail :])


class ProsePart(NamedTuple):
    """A part of a text; code stood between back quotes."""

    text: str
    is_code: bool


def prose(text: str) -> list[ProsePart]:
    """The parts of a text; one whose back quotes have no partner is left as it is."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return [ProsePart(text, False)]
    return [ProsePart(part, index % 2 == 1) for index, part in enumerate(parts)]


FILTERS = {
    "estimate": format_estimate,
    "decimals": decimals,
    "p_value": p_value,
    "percent": percent,
    "whole": whole_percent,
    "ends": ends,
    "thousands": thousands,
    "rounded": rounded,
    "counted": counted,
    "sentence": sentence,
    "spaced": spaced,
    "where": where,
    "short": short,
    "shortened": shortened,
    "prose": prose,
}
