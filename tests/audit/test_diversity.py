"""Known answers for unique shares, distinct n-grams, openers, repeated lines and scripts."""

from __future__ import annotations

import pytest

from sft_recipes.audit.diversity import (
    distinct_ngrams,
    find_patterns,
    main_script,
    measure_diversity,
    openers,
    repeated_lines,
)
from sft_recipes.audit.finding import audit_rows
from tests.audit.planted import example, plant


def test_unique_ratios_ignore_case_and_spaces() -> None:
    """Three rows with one prompt, two answers: shares of 1/3, 2/3 and 2/3."""
    rows = audit_rows([example("Say it", "a"), example("say  IT", "b"), example("Say it ", "A")])
    unique = measure_diversity(rows)["unique"]
    assert unique == {
        "instruction": pytest.approx(1 / 3),
        "response": pytest.approx(2 / 3),
        "row": pytest.approx(2 / 3),
    }


def test_distinct_ngrams_have_a_fixed_budget() -> None:
    """Below 10,000 words there is no value; above, more rows of the same kind do not change it by much."""
    few, many = (
        [f"{row.prompt} {row.response}" for row in audit_rows(plant(clean=count, each=0).examples)]
        for count in (200, 2000)
    )
    assert distinct_ngrams(few[:50])["distinct_2"] is None
    assert distinct_ngrams(["a b"] * 5000) == {
        "distinct_1": 2 / 10_000,
        "distinct_2": 2 / 9_999,
        "distinct_3": 2 / 9_998,
    }
    assert distinct_ngrams(few)["distinct_2"] == pytest.approx(
        distinct_ngrams(many)["distinct_2"], abs=0.02
    )


def test_the_reference_is_less_varied() -> None:
    """Twenty rows over and over are less varied than the rows."""
    measured = measure_diversity(audit_rows(plant(clean=400, each=0).examples))["response"]
    for n in (1, 2, 3):
        assert measured["value"][f"distinct_{n}"] > 2 * measured["twenty_rows"][f"distinct_{n}"] > 0


def test_openers_count_longer_turns_only() -> None:
    """Four words that more follow are an opener; the same four alone are a short answer. Case does not matter."""
    turns = [(at, "Sure, here is the answer") for at in range(4)] + [
        (4, "sure, here is THE list"),
        (5, "Sure, here is the"),
    ]
    summary, frequent = openers([*turns, (6, "Something else that is long")])
    assert summary["n"] == 6 and summary["top"][0] == {
        "text": "sure, here is the",
        "rows": 5,
        "share": 5 / 6,
    }
    assert sum(one["share"] for one in summary["top"]) == 1
    assert frequent == {}
    assert openers([*turns, (6, "Sure, here is the end")])[1] == {
        "sure, here is the": [0, 1, 2, 3, 4, 6]
    }
    assert openers([(at, "x y z a b") for at in range(9)])[0]["entropy_ratio"] == 0
    assert openers([(at, f"{at} y z a b") for at in range(9)])[0]["entropy_ratio"] == pytest.approx(
        1
    )
    assert openers([])[0] == {"n": 0, "top": [], "entropy_ratio": None}


def test_repeated_lines_stand_beside_other_text() -> None:
    """A line in more than 20 longer answers is boilerplate; as the whole answer, or short, or in 20, it is not."""
    line = "If you have any other question, ask."
    longer = [(at, f"Answer {at}.\n{line}\nOk.") for at in range(21)]
    assert repeated_lines(longer) == {line: list(range(21))}
    assert repeated_lines(longer[:20]) == {} == repeated_lines([(at, line) for at in range(50)])


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
    """The script of most letters; kana and Chinese characters count together, few letters are undecided."""
    assert main_script(text) == script


def test_scripts_that_differ_are_flagged() -> None:
    """Only rows with enough letters on both sides and different scripts are flagged."""
    pairs = [
        ("Translate this into Russian please", "Быстрая коричневая лиса прыгает"),
        ("Translate: yes", "да"),
    ]
    findings, content = find_patterns(
        audit_rows([example(*pair, at) for at, pair in enumerate(pairs)])
    )
    (finding,) = [one for one in findings if one.check == "script_mismatch"]
    assert [(row.index, row.detail) for row in finding.rows] == [(0, "Latin -> Cyrillic")]
    assert content["scripts"] == {"Latin": {"Cyrillic": 1}, "und": {"und": 1}}
