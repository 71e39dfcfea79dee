"""What a number of a recipe may be, and how an error and the documentation say it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """What a number may be. Infinity and NaN are outside of every range.

    `at_least` and `at_most` are included, `above` and `below` are not. From `whole_from` on a
    number has to be whole (a share below 1, a count from there). `also`: one more number, -1 for
    "without limit".
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    whole_from: float | None = None
    also: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the number is one of those."""
        if not math.isfinite(value):
            return False
        if self.also is not None and value == self.also:
            return True
        if self.whole_from is not None and value >= self.whole_from and value != int(value):
            return False
        return self._is_low_enough(value) and self._is_high_enough(value)

    def _is_high_enough(self, value: float) -> bool:
        if self.above is not None:
            return value > self.above
        return self.at_least is None or value >= self.at_least

    def _is_low_enough(self, value: float) -> bool:
        if self.below is not None:
            return value < self.below
        return self.at_most is None or value <= self.at_most

    def __str__(self) -> str:
        text = self._bounds()
        if self.whole_from is not None:
            text += f", whole from {self.whole_from:,} on"
        if self.also is not None:
            text += f", or {self.also}"
        return text

    def _bounds(self) -> str:
        """The bounds in words."""
        both_included = self.at_least is not None and self.at_most is not None
        if both_included:
            return f"from {self.at_least:,} to {self.at_most:,}"
        low = f"at least {self.at_least:,}" if self.above is None else f"above {self.above:,}"
        if self.below is not None:
            return f"{low} and below {self.below:,}"
        if self.at_most is not None:
            return f"{low} and at most {self.at_most:,}"
        return low
