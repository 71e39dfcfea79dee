"""A chat template tried out before it is trusted, and the row blamed on which it does not end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sft_recipes.data.guarded import GIBIBYTE, Limits, Note, Outcome, run_guarded
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example

if TYPE_CHECKING:
    from sft_recipes.data.chat_templates import ChatRenderer
    from sft_recipes.data.labels import Labeller

# All probes of a template take 4 to 110 ms and a few MB (measured on the 69 that TRL ships).
TRIAL = Limits(seconds=5, growth=GIBIBYTE)
# One row, however it was cut from its batch; a row of a megabyte takes 0.4 s (measured).
ROW = Limits(seconds=10, growth=2 * GIBIBYTE)


def try_template(renderer: "ChatRenderer", probe: Callable[["ChatRenderer"], Any]) -> None:
    """Run `probe`, all that is asked of a template before its first row, within limits.

    Raises InputError, at the template's file and line where they are known, for one that cannot be
    compiled, that fails, or that would take time or memory without end.
    """
    outcome = run_guarded(partial(_probe, renderer, probe), TRIAL)
    if outcome.kind == "done":
        return
    where = renderer.template_place
    if outcome.line is not None:
        where = f"{where}:{outcome.line}"
    fix = "correct the template, or choose another chat_template"
    raise InputError(Problem(where, "chat_template", _what_happened(outcome, TRIAL), fix))


def _probe(renderer: "ChatRenderer", probe: Callable[["ChatRenderer"], Any], _: Note) -> None:
    probe(renderer)


def _what_happened(outcome: Outcome, limits: Limits) -> str:
    if outcome.kind == "time":
        return f"the template does not end: it ran for {limits.seconds:.0f} s"
    if outcome.kind == "memory":
        return f"the template takes more than {limits.growth / GIBIBYTE:.0f} GiB of memory"
    if outcome.kind == "killed":
        return "the template ended its process, perhaps for memory"
    if outcome.is_syntax:
        return f"syntax error: {outcome.error}"
    return f"the template cannot render a question and its answer ({outcome.error})"


@dataclass(frozen=True, slots=True)
class RowBlame:
    """Finds the row of a batch on which the labeller does not end."""

    labeller: "Labeller"

    def __call__(self, examples: Sequence[Example]) -> InputError | None:
        """The error that names the row; None where each row by itself can be labelled."""
        outcome = run_guarded(partial(_label_one_by_one, self.labeller, examples), ROW)
        if outcome.kind in ("done", "error") or outcome.noted is None:
            return None
        example = examples[outcome.noted]
        template = self.labeller.renderer.template_place
        what = f"{_what_happened(outcome, ROW)} on this row ({template})"
        fix = "remove the row, correct the template, or choose another chat_template"
        return InputError(Problem(example.where, "chat_template", what, fix))


def _label_one_by_one(labeller: "Labeller", examples: Sequence[Example], note: Note) -> None:
    for index, example in enumerate(examples):
        note(index)
        labeller.label([example])
