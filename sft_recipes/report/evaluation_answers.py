"""The answers that an evaluation report shows, and what they can be filtered by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_recipes.messages import visible
from sft_recipes.report import plain_words
from sft_recipes.report.evaluation_parts import CHANGES, LOST, Row, RowPair, order_rows, question
from sft_recipes.report.word_difference import WordDifference, word_difference

# Samples beyond this many stay in samples.jsonl: a page has to open on a phone.
SHOWN_SAMPLES = 200
RIGHT = "right"
WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer beside what was expected and the base's, and what the page's filters know of it."""

    pair: RowPair
    difference: WordDifference
    base_difference: WordDifference | None

    @property
    def row(self) -> Row:
        """The row of `samples.jsonl`."""
        return self.pair.row

    @property
    def base(self) -> Row | None:
        """The base's row on the same prompt."""
        return self.pair.base

    @property
    def question(self) -> str:
        """What was asked, without the template."""
        return question(self.row)

    @property
    def outcome(self) -> str:
        """Right or wrong, in words."""
        return self.pair.outcome or "nothing was expected"

    @property
    def style(self) -> str:
        """How that is coloured."""
        if self.pair.change == LOST:
            return "bad"
        return "good" if self.row["exact_match"] else "muted"

    @property
    def task(self) -> list[str]:
        """Its task type, if it has one."""
        task = self.row["task_type"]
        return [] if task is None else [str(task)]

    @property
    def filters(self) -> dict[str, Sequence[str]]:
        """The values by which it can be chosen."""
        return {
            "task": [visible(task) for task in self.task],
            "flag": self.row["flags"],
            "change": [self.pair.change],
            "right": [RIGHT if self.row["exact_match"] else WRONG],
        }


def shown_answers(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> list[ShownAnswer]:
    """Those that the page shows: lost ones first."""
    answers = []
    for pair in order_rows(samples, base_samples)[:SHOWN_SAMPLES]:
        expected = pair.row["reference"]
        difference = word_difference(expected, pair.row["response"])
        of_base = None
        if pair.base is not None:
            of_base = word_difference(expected, pair.base["response"])
        answers.append(ShownAnswer(pair, difference, of_base))
    return answers


class Option(NamedTuple):
    """What a filter can be set to."""

    value: str
    label: str


class Choice(NamedTuple):
    """A filter of the page."""

    name: str
    label: str
    options: Sequence[Option]


def task_types_of(answers: Sequence[ShownAnswer]) -> list[str]:
    """All that one of them has."""
    tasks: set[str] = set()
    for answer in answers:
        tasks.update(answer.task)
    return sorted(tasks)


def filters_of(answers: Sequence[ShownAnswer], has_base: bool) -> list[Choice]:
    """What each filter of the page offers."""
    flags: set[str] = set()
    for answer in answers:
        flags.update(answer.row["flags"])
    changes = CHANGES if has_base else {}
    return [
        Choice("right", "Answer", [Option(RIGHT, "right"), Option(WRONG, "wrong")]),
        Choice("change", "Beside the base", [Option(*change) for change in changes.items()]),
        Choice("task", "Task type", [Option(task, task) for task in task_types_of(answers)]),
        Choice("flag", "Fault", [Option(flag, plain_words.flag(flag)) for flag in sorted(flags)]),
    ]
