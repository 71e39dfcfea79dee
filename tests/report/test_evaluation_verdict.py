"""The verdict: known sentences for known figures, and what comes next."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.report import evaluation_verdict as verdicts
from sft_recipes.report.evaluation_verdict import Verdict, next_step, verdict_of

SHORT = [{"reference": "yes"}]
LONG = [{"reference": "word " * 30}]


def share(value: float | None, n: int) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value, value)
    return {"value": value, "n": n, "ci_low": low, "ci_high": high}


def figures(right: int, n: int, ended: float = 1.0, words: float = 0.0, **more: Any) -> Any:
    """The content of an evaluation in which so many of `n` rows are right."""
    asked = more.pop("expected", n)
    exact = share(right / asked, asked) if asked else share(None, 0)
    metrics = {
        "exact_match": exact,
        "tool_call_exact": more.pop("calls", share(None, 0)),
        "token_f1": share(words, n),
        "completion_rate": share(ended, n),
        "eos_rate": share(ended, n),
        "format_adherence": share(ended, n),
    }
    return {"n": n, "rows": n, "metrics": metrics, **more}


def difference(value: float, low: float, high: float, n: int = 165) -> dict[str, Any]:
    return {"value": value, "n": n, "ci_low": low, "ci_high": high}


def prompted(verdict: str, best: dict[str, Any], way: str, **gap: float) -> dict[str, Any]:
    """What a comparison with a base behind training rows adds to the content."""
    return {
        "prompting": {
            "ways": ["base", way],
            "best": way,
            "metric": "exact_match",
            "difference": difference(**gap),
            "verdict": verdict,
            "shots": {},
        },
        "comparisons": [{"name": way, "metrics": best["metrics"]}],
    }


def said(content: Any, base: Any = None, samples: Any = SHORT) -> str:
    return verdict_of(content, base, samples).sentence


def test_nothing_right_says_what_was_learned_and_how_few_rows_there_were() -> None:
    """The form without the facts, on few training rows and few asked ones."""
    content = figures(0, 29, ended=0.9, words=0.3, training={"rows": 266, "model": "m"})
    assert said(content, figures(0, 29, ended=0.1)) == (
        "The tuned model answers 0 of 29 rows as expected, the base 0: it learned the form, not the facts; "
        "266 training rows are few for this; 29 rows are few to judge by."
    )
    content = figures(0, 200, ended=0.1, training={"rows": 5000, "model": "m"})
    assert said(content, figures(0, 200, ended=0.1)).endswith(
        "it learned neither the form nor the facts."
    )
    unknown = said(figures(0, 60, ended=0.1))
    assert unknown == "The model answers 0 of 60 rows as expected.", "nobody knows what it learned"


def test_the_base_is_compared_at_its_best() -> None:
    """The way of asking it that does best is named, with its own share."""
    best = figures(30, 165)
    way = prompted("better", best, "base, 8 shots", value=0.285, low=0.19, high=0.37)
    content = figures(77, 165, training={"rows": 960, "model": "m"}, **way)
    assert said(content, figures(0, 165)) == (
        "The tuned model answers 77 of 165 rows as expected (47 %), the base at its best (8 shots) 30 (18 %): "
        "tuning beat a prompt."
    )
    way = prompted("worse", figures(90, 165), "base, 8 shots", value=-0.1, low=-0.2, high=-0.01)
    assert said(figures(77, 165, **way), figures(0, 165)).endswith(": a prompt beat tuning.")


def test_what_is_not_decided_says_how_many_rows_would_decide_it() -> None:
    """Half the interval over the difference, squared, times the rows: 100 rows, 0.05 and 0.1 make 400."""
    gap = {"exact_match": difference(0.05, -0.05, 0.15, n=100)}
    verdict = verdict_of(figures(55, 100, differences=gap), figures(50, 100), SHORT)
    assert verdict.outcome == verdicts.UNDECIDED and verdict.rows_needed == 400
    assert verdict.sentence == (
        "The tuned model answers 55 of 100 rows as expected (55 %), the base 50 (50 %): "
        "which of the two is better is not decided; about 400 rows would decide it, if the difference stays."
    )
    gap = {"exact_match": difference(0.0, -0.1, 0.1, n=100)}
    assert verdict_of(figures(5, 100, differences=gap), figures(5, 100), SHORT).rows_needed == 0


def test_without_a_base_and_without_expected_answers() -> None:
    """Neither is passed over: what tuning did is not known, nor what is right."""
    content = figures(88, 165, training={"rows": 960, "model": "me/base"})
    assert said(content) == (
        "The tuned model answers 88 of 165 rows as expected (53 %); without a base to compare with it is not known "
        "what tuning did."
    )
    assert said(figures(0, 50, expected=0, ended=0.9)) == (
        "No row has an expected answer, so right and wrong are not known; 90 % of 50 rows end by themselves, "
        "90 % are well formed."
    )
    assert said(figures(0, 0)) == "No rows were answered, so nothing can be said."


def test_long_answers_are_compared_by_the_words_they_share() -> None:
    """No long answer is equal to what was expected, which says nothing against it."""
    gap = {"token_f1": difference(0.2, 0.1, 0.3)}
    sentence = said(figures(0, 165, words=0.41, differences=gap), figures(0, 165, words=0.2), LONG)
    assert sentence == (
        "The tuned model answers 0 of 165 rows as expected, the base 0: better than the base, by words shared with "
        "the long expected answers (41 %, the base 20 %)."
    )


def test_rows_that_were_trained_on_and_prompts_asked_twice_are_named() -> None:
    """The first flatter the model; of the second, a prompt counts once."""
    content = figures(30, 40, training_rows={"rows": 3, "by_rule": {"exact prompt": 3}}, rows=80)
    assert said(content) == (
        "The model answers 30 of 40 prompts as expected (75 %); 3 of them trained on, which flatters it."
    )


def test_tool_calls_are_counted_where_no_text_is_expected() -> None:
    """The strictest metric that moves is what is told."""
    content = figures(0, 50, calls=share(0.4, 50))
    assert said(content) == "The model makes the expected tool calls in 20 of 50 rows (40 %)."


@pytest.mark.parametrize(
    ("outcome", "few", "more", "step"),
    [
        (verdicts.BETTER, False, {}, "sft-recipes chat RUN --base B"),
        (verdicts.BETTER, True, {}, "ask more rows"),
        (verdicts.UNDECIDED, False, {}, "ask about 400 rows"),
        (verdicts.ALONE, False, {"training": {"rows": 9, "model": "M"}}, "RUN --base M"),
        (verdicts.NOTHING_RIGHT, False, {"training": {"rows": 9}}, "train on more rows or longer"),
        (verdicts.BETTER, False, {"gate": {"verdict": "insufficient_n"}}, "hold out"),
        (verdicts.BETTER, False, {"gate": {"verdict": "fail"}}, "train again"),
    ],
)
def test_the_next_step_is_what_helps_most(outcome: str, few: bool, more: Any, step: str) -> None:
    """A chat only where something is decided; else what would decide it."""
    needed = 400 if outcome == verdicts.UNDECIDED else 0
    verdict = Verdict("", outcome, needed, few)
    text = next_step(verdict, more, "RUN", "B")
    assert step in text
    assert ("chat" in text) == (step.startswith("sft-recipes chat"))
