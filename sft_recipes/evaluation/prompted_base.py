"""The base at its best: plain and behind training rows, as it came and by its first answer.

Whether tuning beat a prompt is decided against the best of these. Which is the best is read off the
same rows, which is in favour of the base.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.answering import Answered, joined
from sft_recipes.evaluation.comparison import System
from sft_recipes.evaluation.evaluator import Evaluation, compare, evaluation_from_rows
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.evaluation.questions import DATA, Asking, Question
from sft_recipes.evaluation.training_rows import TrainingRows
from sft_recipes.messages import Example

# Folders below `base`.
SHOTS = "shots"
FIRST_ANSWER = "first_answer"
AUTO = "auto"
# Numbers of training rows that `--shots auto` tries.
CHOICES = (2, 4, 8)
# What tells whether an answer is right, the strictest first; a number that no system moves tells
# nothing, so the next is taken.
_TASK_METRICS = ("exact_match", "tool_call_exact", "token_f1")


def shot_counts(shots: str) -> tuple[int, ...]:
    """The numbers of training rows that `--shots` asks for; none for 0. Raises InputError."""
    if shots == AUTO:
        return CHOICES
    if shots.isdecimal():
        return (int(shots),) if int(shots) else ()
    fix = "add --shots 4, or --shots auto"
    raise InputError(Problem("command line", "--shots", f"{shots!r} is no number of rows", fix))


@dataclass(frozen=True)
class Shots:
    """The data behind training rows, by number of rows, and training rows asked the same ways.

    `probes`: to choose among several numbers, 0 among them; empty where there is nothing to choose.
    """

    questions: Mapping[int, Question] = field(default_factory=dict)
    probes: Mapping[int, Question] = field(default_factory=dict)


def plan_shots(
    shots: str, plain: Question, training: TrainingRows, asking: Asking, model: Any
) -> Shots:
    """The ways of asking with shots. Those of `auto` that do not fit into the model are left out.

    Raises InputError where a number that was asked for does not fit.
    """
    questions = {}
    probes = {0: Question(plain.renderer, training.probes)}
    for count in shot_counts(shots):
        asked = _behind_shots(plain.renderer, plain.examples, training, count)
        tried = _behind_shots(plain.renderer, training.probes, training, count)
        try:
            asking.check_lengths(model, [asked, tried])
        except InputError:
            if shots != AUTO:
                raise
            print(f"--shots auto: {count} shots do not fit into the model", file=sys.stderr)
            continue
        questions[count] = asked
        probes[count] = tried
    if shots != AUTO or not training.probes:
        return Shots(questions)
    return Shots(questions, probes)


def _behind_shots(
    renderer: Any, examples: Sequence[Example], training: TrainingRows, count: int
) -> Question:
    shown = [training.shown_to(example, count) for example in examples]
    return Question(renderer, shown)


class ShotsChoice(NamedTuple):
    """How many shots were taken, and what each number of them was worth on training rows."""

    shots: int
    tried: Mapping[int, Mapping[str, float]]
    rows: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for `metrics.json`."""
        tried = [{"shots": count, **scores} for count, scores in self.tried.items()]
        return {"shots": self.shots, "rows": self.rows, "tried": tried}


def _choose(asking: Asking, base: Any, shots: Shots) -> ShotsChoice | None:
    """The number of shots behind which the base answers training rows best, the fewest of equals.

    None without any; a number that was asked for is not tried.
    """
    if not shots.questions:
        return None
    if not shots.probes:
        return ShotsChoice(next(iter(shots.questions)), {}, 0)
    tried = {}
    for count, question in shots.probes.items():
        rows = _ask_by_beginning(asking, base, question).first_rows()
        metrics = evaluation_from_rows(rows).metrics
        tried[count] = {name: metrics[name].value or 0.0 for name in _TASK_METRICS}
    best = max(tried, key=lambda count: tuple(tried[count].values()))
    return ShotsChoice(best, tried, len(shots.probes[0].examples))


@dataclass(frozen=True)
class PromptedBase:
    """The base's answers to the data in each way, by folder, and how its shots were chosen."""

    answers: Mapping[str, Evaluation]
    choice: ShotsChoice | None

    def systems(self) -> list[System]:
        """Each way as a system that answered the data."""
        names = {DATA: "base", FIRST_ANSWER: "base, first answer"}
        if self.choice is not None:
            names[SHOTS] = f"base, {self.choice.shots} shots"
            names[f"{SHOTS}/{FIRST_ANSWER}"] = f"{names[SHOTS]}, first answer"
        return [System(names[folder], answers) for folder, answers in self.answers.items()]


def ask_prompted(asking: Asking, base: Any, plain: Question, shots: Shots) -> PromptedBase:
    """Ask the base the data in each way. What no section of its own cut is no way of its own."""
    answers = _both_ways(asking.answer(base, plain), DATA, plain.examples)
    choice = _choose(asking, base, shots)
    if choice is not None and choice.shots:
        answered = _ask_by_beginning(asking, base, shots.questions[choice.shots])
        answers |= _both_ways(answered, SHOTS, plain.examples)
    return PromptedBase(answers, choice)


def _ask_by_beginning(asking: Asking, base: Any, question: Question) -> Answered:
    """The answers to a question, asked in groups that are shown the same training rows.

    Rows of a group begin alike, which is computed once (`shared_prefix.py`).
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(question.examples):
        groups.setdefault(repr(example.messages[:-2]), []).append(index)
    if len(groups) == 1:
        return asking.answer(base, question)
    parts = []
    for indices in groups.values():
        own = [question.examples[index] for index in indices]
        parts.append(asking.answer(base, question._replace(examples=own)))
    return joined(parts, list(groups.values()))


def _both_ways(
    answered: Answered, folder: str, examples: Sequence[Example]
) -> dict[str, Evaluation]:
    """As it came and by its first answer, as answers to the conversations behind any shots."""
    came = _as_asked(answered.rows(), examples)
    first = _as_asked(answered.first_rows(), examples)
    both = {folder: evaluation_from_rows(came)}
    if first != came:
        name = f"{folder}/{FIRST_ANSWER}" if folder else FIRST_ANSWER
        both[name] = evaluation_from_rows(first)
    return both


def _as_asked(
    rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    own = []
    for row, example in zip(rows, examples, strict=True):
        own.append({**row, "messages": list(map(dict, example.messages))})
    return own


def against_prompting(tuned: Evaluation, prompted: PromptedBase) -> dict[str, Any]:
    """The tuned model against the best way of asking its base: `better`, `worse` or `undecided`.

    Best by exact match, or by the next metric that any system moves. Without a metric of right and
    wrong there is no verdict.
    """
    systems = prompted.systems()
    content: dict[str, Any] = {"ways": [system.name for system in systems]}
    if prompted.choice is not None:
        content["shots"] = prompted.choice.as_json()
    metric = _telling_metric([tuned, *prompted.answers.values()])
    if metric is None:
        return content
    best = max(systems, key=lambda system: system.evaluation.metrics[metric].value or 0.0)
    difference = compare(best.evaluation, tuned)[metric]
    verdict = "undecided"
    if difference.ci_low is not None and difference.ci_low > 0:
        verdict = "better"
    elif difference.ci_high is not None and difference.ci_high < 0:
        verdict = "worse"
    return {
        **content,
        "best": best.name,
        "metric": metric,
        "label": METRICS[metric].label,
        "difference": difference.as_json(),
        "verdict": verdict,
    }


def _telling_metric(evaluations: Sequence[Evaluation]) -> str | None:
    for name in _TASK_METRICS:
        if any(evaluation.metrics[name].value for evaluation in evaluations):
            return name
    return None
