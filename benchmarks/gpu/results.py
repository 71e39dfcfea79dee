"""What was measured: an item's numbers and all results, as JSON and as a table. No torch here."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_recipes.run_folder import write_text

FILE = "gpu.json"

PASSED = "passed"
FAILED = "failed"
TIMEOUT = "timeout"
SKIPPED = "skipped"
NOT_RUN = "not run"

# Texts of more characters get lines of their own in the table.
LONG_TEXT = 52


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number or a text, with its unit.

    `goal` in words; `met` is None where there is none, or it is not judged on this machine.
    """

    name: str
    value: float | str
    unit: str = ""
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What the numbers were measured on. `dry_run`: tiny shapes, whose speeds say nothing."""

    device: str
    versions: Mapping[str, str]
    date: str
    dry_run: bool


@dataclass(slots=True)
class ItemResult:
    """What became of an item, in how many seconds.

    `wrong`: what is not as it must be; `error`: why it ended early, or was not run.
    """

    name: str
    state: str
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    error: str = ""


class ItemReport:
    """Where an item puts its numbers; each is in its file at once, so that a kill loses none."""

    def __init__(self, path: Path, judge: bool) -> None:
        """`judge`: whether goals of speed are judged; not in a dry run."""
        self.path = path
        self.judge = judge
        self.measurements: list[Measurement] = []
        self.wrong: list[str] = []
        self.skipped = ""

    def number(self, name: str, value: float, unit: str = "") -> None:
        """A number without a goal."""
        self._add(Measurement(name, value, unit))

    def note(self, name: str, text: str) -> None:
        """Words instead of a number: how it was counted, or why there is no number."""
        self._add(Measurement(name, text))

    def goal(self, name: str, value: float, unit: str, at_least: float) -> None:
        """A number that is wanted to reach `at_least`. Missing it is no failure."""
        # As it is printed: 0.9996 reads 1.00, and is as good.
        met = round(value, 2) >= at_least if self.judge else None
        self._add(Measurement(name, value, unit, f">= {at_least:,.2f}", met))

    def near(self, name: str, value: float, reference: float, share: float) -> None:
        """A number as a multiple of `reference`, which is wanted to be within `share` of one."""
        ratio = value / reference
        met = abs(ratio - 1) <= share if self.judge else None
        goal = f"{1 - share:.2f} to {1 + share:.2f}"
        self._add(Measurement(name, ratio, "x", goal, met))

    def equal(self, name: str, holds: bool) -> None:
        """Whether two things are the same, which is wanted, and judged on any machine."""
        self._add(Measurement(name, "equal" if holds else "different", "", "equal", holds))

    def require(self, holds: bool, what: str) -> None:
        """Note as a failure `what` is wrong, unless it holds."""
        if not holds:
            self.wrong.append(what)
            self._write()

    def skip(self, why: str) -> None:
        """Say that the item cannot run here."""
        self.skipped = why
        self._write()

    def _add(self, measurement: Measurement) -> None:
        value = measurement.value
        if not isinstance(value, str) and not math.isfinite(value):
            # JSON has no number for it.
            measurement = replace(measurement, value=str(value))
            self.wrong.append(f"{measurement.name} is {value}")
        self.measurements.append(measurement)
        self._write()

    def _write(self) -> None:
        content = {
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "wrong": self.wrong,
            "skipped": self.skipped,
        }
        write_text(self.path, json.dumps(content))


def read_item(name: str, path: Path, error: str, timed_out: bool, seconds: float) -> ItemResult:
    """The result of an item that ended, from what it left at `path`.

    `error` is empty if it ended well.
    """
    content: dict[str, Any] = {"measurements": [], "wrong": [], "skipped": ""}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    state = PASSED
    if timed_out:
        state = TIMEOUT
    elif error or content["wrong"]:
        state = FAILED
    elif content["skipped"]:
        state = SKIPPED
    elif not content["measurements"]:
        state, error = FAILED, "it measured nothing"
    measurements = [Measurement(**values) for values in content["measurements"]]
    error = error or content["skipped"]
    return ItemResult(name, state, seconds, measurements, content["wrong"], error)


def write_results(folder: Path, head: Head, results: Sequence[ItemResult]) -> None:
    """Rewrite `gpu.json` as a whole."""
    content = {"head": asdict(head), "items": [asdict(result) for result in results]}
    write_text(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def exit_code(results: Sequence[ItemResult]) -> int:
    """0 if every item passed, or was skipped because something it needs is not installed."""
    good = {PASSED, SKIPPED}
    return 0 if all(result.state in good for result in results) else 1


def table(head: Head, results: Sequence[ItemResult]) -> str:
    """Head and results as text of fixed width."""
    versions = ", ".join(f"{name} {version}" for name, version in head.versions.items())
    lines = [f"{head.device}; {versions}; {head.date}"]
    if head.dry_run:
        lines.append("Dry run: tiny shapes, whose speeds say nothing.")
    for result in results:
        lines += _item_lines(result)
    return "\n".join(lines)


def _item_lines(result: ItemResult) -> list[str]:
    why = " ".join(result.error.split())[-160:]
    lines = [f"\n{result.name:16} {result.state:8} {result.seconds:6.1f} s  {why}".rstrip()]
    for measurement in result.measurements:
        lines += _measurement_lines(measurement)
    lines += [f"  WRONG: {finding}" for finding in result.wrong]
    return lines


def _measurement_lines(measurement: Measurement) -> list[str]:
    value = measurement.value
    if isinstance(value, str) and len(value) > LONG_TEXT:
        return [
            f"  {measurement.name}:",
            *textwrap.indent(textwrap.fill(value, 92), 4 * " ").splitlines(),
        ]
    shown = value if isinstance(value, str) else _number(value)
    line = f"  {measurement.name:44} {shown:>12} {measurement.unit:10}"
    return [f"{line} {_goal(measurement)}".rstrip()]


def _goal(measurement: Measurement) -> str:
    if not measurement.goal:
        return ""
    if measurement.met is None:
        return f"goal {measurement.goal}: not judged here"
    return f"goal {measurement.goal}: {'met' if measurement.met else 'not met'}"


def _number(value: float) -> str:
    """Whole above a hundred, two places above a hundredth, else with an exponent."""
    size = abs(value)
    if size >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    if size >= 0.01:
        return f"{value:,.2f}"
    return f"{value:.1e}"
