"""Known answers for unique shares, openers, repeated lines and scripts."""

from __future__ import annotations

import pytest

from sft_recipes.audit.diversity import (
    SaidTurn,
    find_patterns,
    main_script,
    measure_diversity,
    openers,
    repeated_lines,
)
from sft_recipes.audit.finding import audit_rows
from tests.audit.planted import example


def said(*texts: str) -> list[SaidTurn]:
    """One turn a row."""
    return [SaidTurn(row, text) for row, text in enumerate(texts)]


def test_unique_ratios_ignore_case_and_spaces() -> None:
    """Three rows with one prompt, two answers: shares of 1/3, 2/3 and 2/3."""
    rows = audit_rows([example("Say it", "a"), example("say  IT", "b"), example("Say it ", "A")])
    assert measure_diversity(rows)["unique"] == {
        "instruction": pytest.approx(1 / 3),
        "response": pytest.approx(2 / 3),
        "row": pytest.approx(2 / 3),
    }


def test_openers_count_longer_turns_only() -> None:
    """Four words that more follow are an opener; the same four alone are a short answer.

    Case does not matter.
    """
    turns = said(
        *["Sure, here is the answer"] * 4,
        "sure, here is THE list",
        "Sure, here is the",
        "Something else that is long",
    )
    found = openers(turns)
    assert found.table["n"] == 6
    assert found.table["top"][0] == {"text": "sure, here is the", "rows": 5, "share": 5 / 6}
    assert sum(opener["share"] for opener in found.table["top"]) == 1
    assert found.frequent == {}


def test_frequent_openers_are_those_of_more_than_five_turns() -> None:
    """A sixth turn makes an opener of few turns frequent; the rows of all six are named."""
    turns = said(*["Sure, here is the answer"] * 5, "Yes", "sure, here is the end")
    assert openers(turns[:-1]).frequent == {}
    assert openers(turns).frequent == {"sure, here is the": [0, 1, 2, 3, 4, 6]}


def test_entropy_ratio_of_openers() -> None:
    """0 where all turns begin alike, 1 where all begin differently, none without turns."""
    alike = said(*["x y z a b"] * 9)
    different = said(*[f"{number} y z a b" for number in range(9)])
    assert openers(alike).table["entropy_ratio"] == 0
    assert openers(different).table["entropy_ratio"] == pytest.approx(1)
    assert openers([]).table == {"n": 0, "top": [], "entropy_ratio": None}


def test_repeated_lines_stand_beside_other_text() -> None:
    """A line in more than 20 longer answers is boilerplate.

    As the whole answer, or short, or in 20 answers, it is not.
    """
    line = "If you have any other question, ask."
    longer = said(*[f"Answer {number}.\n{line}\nOk." for number in range(21)])
    assert repeated_lines(longer) == {line: list(range(21))}
    assert repeated_lines(longer[:20]) == {}
    assert repeated_lines(said(*[line] * 50)) == {}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The quick brown fox jumps", "Latin"),
        ("Быстрая коричневая лиса прыгает", "Cyrillic"),
        ("مرحبا بالعالم كيف حالك اليوم يا صديقي", "Arabic"),
        ("今日は天気がいいので散歩に行きましょうか、ねえ", "East Asian"),
        ("素早い茶色の狐はのろまな犬を飛び越えました", "East Asian"),
        ("Yes", "und"),
        ("1234567890 " * 9, "und"),
    ],
)
def test_main_script(text: str, script: str) -> None:
    """The script of most letters; kana and Chinese characters count together, few are undecided."""
    assert main_script(text) == script


def test_scripts_that_differ_are_flagged() -> None:
    """Only rows with enough letters on both sides and different scripts are flagged."""
    rows = audit_rows(
        [
            example("Translate this into Russian please", "Быстрая коричневая лиса прыгает"),
            example("Translate: yes", "да"),
        ]
    )
    findings, _ = find_patterns(rows)
    mismatch = {finding.check: finding for finding in findings}["script_mismatch"]
    assert [(row.index, row.detail) for row in mismatch.rows] == [(0, "Latin -> Cyrillic")]
