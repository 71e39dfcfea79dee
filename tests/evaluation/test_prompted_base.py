"""The base at its best: how many shots, which way of asking, and whether tuning beat it."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import prompted_base
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.prompted_base import (
    PromptedBase,
    Shots,
    ShotsChoice,
    against_prompting,
    ask_prompted,
    plan_shots,
    shot_counts,
)
from sft_recipes.evaluation.questions import Question
from sft_recipes.evaluation.training_rows import TrainingRows
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_tables import prompting_sentences

TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]


def scored(right: str) -> list[dict[str, Any]]:
    """One scored row for each letter: `r` is right, `w` wrong."""
    rows = []
    for index, letter in enumerate(right):
        response = "yes" if letter == "r" else "no"
        scores = score_row(Answer("?", "yes", response, "eos"))
        place = {"row": index, "messages": TURNS, "task_type": None, "prompt": f"{index}?"}
        rows.append({**place, **scores})
    return rows


def answered(right: str) -> Evaluation:
    return evaluation_from_rows(scored(right))


class Written:
    """Stands in for what a model wrote: rows as they came, and by their first answers."""

    def __init__(self, came: str, first: str) -> None:
        self.came, self.first = came, first

    def rows(self) -> list[dict[str, Any]]:
        return scored(self.came)

    def first_rows(self) -> list[dict[str, Any]]:
        return scored(self.first)


class Asked:
    """Stands in for asking: every question is its own answer; prompts fit up to `most` turns."""

    def __init__(self, most: int = 99) -> None:
        self.most = most

    def answer(self, model: Any, question: Any) -> Any:
        return question.renderer

    def check_lengths(self, model: Any, questions: Any) -> None:
        for question in questions:
            for example in question.examples:
                if len(example.messages) > self.most:
                    raise InputError(Problem("x", "prompt", "too long", "shorten it"))


def question(came: str, first: str) -> Any:
    return Question(
        Written(came, first), [Example(TURNS, "x", index) for index in range(len(came))]
    )


def test_the_best_number_of_shots_is_chosen_on_training_rows() -> None:
    """By first answers; of equals the fewest; none may be the best, and is then no way of its own."""
    shots = Shots(
        {2: question("ww", "ww"), 4: question("rw", "rr"), 8: question("ww", "ww")},
        {0: question("www", "wrw"), 2: question("www", "www"), 4: question("www", "rrw"),
         8: question("rrr", "rrw")},
    )  # fmt: skip
    prompted = ask_prompted(Asked(), None, question("ww", "rw"), shots)
    assert [system.name for system in prompted.systems()] == [
        "base",
        "base, first answer",
        "base, 4 shots",
        "base, 4 shots, first answer",
    ]
    assert prompted.choice is not None and prompted.choice.rows == 3
    tried = {entry["shots"]: entry["exact_match"] for entry in prompted.choice.as_json()["tried"]}
    assert tried == {
        0: pytest.approx(1 / 3),
        2: 0,
        4: pytest.approx(2 / 3),
        8: pytest.approx(2 / 3),
    }
    nothing_helps = Shots(shots.questions, {0: question("r", "r"), 2: question("r", "r")})
    prompted = ask_prompted(Asked(), None, question("ww", "ww"), nothing_helps)
    assert [system.name for system in prompted.systems()] == ["base"]


def test_tuning_is_compared_with_the_best_way_of_asking() -> None:
    """Better than the plain base and worse than its best prompt is worse; the interval decides."""
    base = PromptedBase(
        {"": answered("w" * 40), "shots": answered("w" * 40),
         "shots/first_answer": answered("r" * 30 + "w" * 10)},
        ShotsChoice(4, {}, 0),
    )  # fmt: skip
    worse = against_prompting(answered("r" * 5 + "w" * 35), base)
    assert (worse["best"], worse["verdict"]) == ("base, 4 shots, first answer", "worse")
    assert worse["difference"]["value"] == pytest.approx(-25 / 40)
    assert against_prompting(answered("r" * 40), base)["verdict"] == "better"
    undecided = against_prompting(answered("r" * 31 + "w" * 9), base)
    assert undecided["verdict"] == "undecided"
    assert prompting_sentences(undecided)[0].startswith(
        "whether tuning beat a prompt is not decided"
    )
    plain = PromptedBase({"": answered("www")}, None)
    assert "verdict" not in against_prompting(answered("www"), plain)


def test_a_number_of_shots() -> None:
    """0, a number, or auto; anything else is refused by the option's name."""
    assert shot_counts("0") == ()
    assert shot_counts("3") == (3,)
    assert shot_counts("auto") == prompted_base.CHOICES
    for wrong in ("-1", "two", "1.5", ""):
        with pytest.raises(InputError, match=r"--shots: .* Fix: add --shots 4"):
            shot_counts(wrong)


def test_shots_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that was asked for is refused; `auto` says so and leaves it out."""
    training = TrainingRows({}, {"": [TURNS] * 8}, [Example(TURNS, "train", 0)])
    plain = question("w", "w")
    with pytest.raises(InputError, match="too long"):
        plan_shots("8", plain, training, Asked(most=10), None)  # type: ignore[arg-type]
    shots = plan_shots("auto", plain, training, Asked(most=10), None)  # type: ignore[arg-type]
    assert list(shots.questions) == [2, 4] and list(shots.probes) == [0, 2, 4]
    assert len(shots.questions[4].examples[0].messages) == 10
    assert "8 shots do not fit" in capsys.readouterr().err
