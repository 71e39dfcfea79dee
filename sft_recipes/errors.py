"""Every error this project raises on purpose, and the exit code each one stands for.

    SFTRecipesError
    ├── InputError       2   wrong input: recipe, data, template, arguments
    ├── CheckFailed      1   a check said no
    ├── TrainingFault    3   training went wrong: non-finite loss, broken checkpoint
    ├── HubUnavailable   3   the Hub did not answer
    └── Preempted       75   stopped by a signal (130 by Ctrl-C); the same command resumes

Anything else is a fault of this program: 70 (`crash.py`). 4 is a gate that decided nothing.

Messages read `FILE:LINE: field: what is wrong. Fix: how.`
"""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

SHOWN_PROBLEMS = 20


class SFTRecipesError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it.

    `where` is `FILE:LINE`, `SOURCE:row N (counted from 0)` or the name of a recipe; `field` may be
    empty.
    """

    where: str
    field: str
    what: str
    fix: str

    def __str__(self) -> str:
        parts = (self.where, self.field, self.what.rstrip("."))
        message = ": ".join(part for part in parts if part)
        if not self.fix:
            return f"{message}."
        # A fix that asks, "did you mean X?", is not a sentence to be ended.
        fix = self.fix if self.fix.endswith("?") else self.fix.rstrip(".") + "."
        return f"{message}. Fix: {fix}"


def suggest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A fix for a name that is not known: the nearest one that is, else `otherwise`, else all."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"use one of {', '.join(names)}"


class InputError(SFTRecipesError):
    """Wrong input. Carries all problems of one pass; the text shows the first 20 and the total."""

    exit_code = 2

    def __init__(self, problems: Problem | Sequence[Problem], total: int | None = None) -> None:
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        self.total = len(self.problems) if total is None else total
        lines = [str(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        if self.total > len(lines):
            lines.append(f"... {len(lines)} of {self.total} problems shown.")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[list[Problem], int]]:
        # Workers that prepare rows raise it in another process.
        return InputError, (self.problems, self.total)


class CheckFailed(SFTRecipesError):
    """A check ran and said no."""

    exit_code = 1


class TrainingFault(SFTRecipesError):
    """Training went wrong in a way that must not reach a saved file."""

    exit_code = 3


class HubUnavailable(SFTRecipesError):
    """The Hub, or the way to it, did not answer: the same command may do later."""

    exit_code = 3


class Preempted(SFTRecipesError):
    """A signal ended the run; what it had trained is in a checkpoint. `number`: the signal."""

    exit_code = 75

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        if number == signal.SIGINT:
            self.exit_code = 130
