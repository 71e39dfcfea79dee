"""Every constraint on both sides of its line, and every `expected_format` that cannot be
verified."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation.constraints import VERIFIERS, broken_constraints, check_expected_format

JSON = {"type": "json"}
BULLETS = {"type": "bullets", "n": 2}

CASES = [
    (
        JSON,
        ['{"a": [1]}', " 3 ", '"text"', "[]"],
        ["", '{"a": 1} done', "{'a': 1}", "```json\n{}\n```"],
    ),
    ({"json": True}, ["{}"], ["no"]),
    (BULLETS, ["- a\n* b", "Two:\n \u2022 a\n \u2022 b"], ["- a", "- a\n- b\n- c", "-a\n-b", ""]),
    ({"bullets": 2}, ["- a\n- b"], ["- a"]),
    ({"bullets": 0}, ["none"], ["- a"]),
    ({"min_words": 3}, ["a b c", "a-b c d"], ["a b", ""]),
    ({"max_words": 3}, ["a b c", ""], ["a b c d"]),
    ({"paragraphs": 2}, ["a\nb\n\nc", "a\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    ({"keywords": ["Paris", "C++"]}, ["c++ in PARIS."], ["Paris", "C++ for Parisians"]),
    ({"forbidden": ["cat", "New York"]}, ["a category", "York"], ["the Cat.", "in new york"]),
    ({"choices": ["yes", "no"]}, ["yes", " no\n"], ["Yes", "yes.", "yes no", ""]),
    ({"regex": r"^\d+$"}, ["42"], ["42a", ""]),
    ({"starts_with": "Dear"}, ["Dear Ann", "\nDear"], ["dear Ann", ""]),
    ({"ends_with": "end."}, ["the end. "], ["the end"]),
    ({"lower_case": True}, ["all low 1", ""], ["Not"]),
    ({"upper_case": True}, ["ALL UP 1"], ["NOt"]),
    ({"no_commas": True}, ["one and two"], ["one, two"]),
]


@pytest.mark.parametrize(("expected", "kept", "broken"), CASES)
def test_constraints(expected: dict, kept: list[str], broken: list[str]) -> None:
    """Known answers of each verifier, outer whitespace aside."""
    check_expected_format(expected, "a.jsonl:3")
    for text in kept:
        assert broken_constraints(text, expected) == []
    for text in broken:
        assert len(broken_constraints(text, expected)) == 1


def test_every_verifier_is_covered() -> None:
    """The cases above have each constraint at least once."""
    assert {name for expected, _, _ in CASES for name in expected} - {"type", "n"} == set(VERIFIERS)


def test_several_constraints_fail_in_part() -> None:
    """Those that are broken are named, each once; bullets with their number are one."""
    expected = {"type": "bullets", "n": 2, "max_words": 5, "keywords": ["owl"], "forbidden": None}
    assert broken_constraints("- an owl\n- a tit", expected) == ["max_words"]
    assert set(broken_constraints("a tit", expected)) == {"bullets", "keywords"}
    assert broken_constraints("anything", None) == []


@pytest.mark.parametrize(
    "expected", [None, JSON, BULLETS, {"type": "json", "n": None}, {"max_words": 5, "regex": None}]
)
def test_known_formats_pass(expected: Any) -> None:
    """Also with the null members that files with columns add."""
    check_expected_format(expected, "a.jsonl:3")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"type": "yaml"}, "no constraint is called 'yaml'"),
        ({"max_word": 3}, "no constraint is called 'max_word'. Fix: did you mean 'max_words'"),
        ({"n": 2}, "no constraint is called 'n'"),
        ({"type": "json", "n": 2}, "no constraint is called 'n'"),
        ({"type": ["json"]}, "no constraint is called"),
        ({"type": "bullets"}, "bullets is a whole number, not None"),
        ({"type": "bullets", "n": True}, "bullets is a whole number, not True"),
        ({"max_words": -1}, "max_words is a whole number, not -1"),
        ({"max_words": 3.0}, "max_words is a whole number, not 3.0"),
        ({"no_commas": 1}, "no_commas is true or false, not 1"),
        ({"keywords": "owl"}, "keywords is a list of texts, not 'owl'"),
        ({"keywords": []}, "keywords is a list of texts, not []"),
        ({"keywords": ["owl", 3]}, "keywords is a list of texts"),
        ({"starts_with": " "}, "starts_with is a text, not ' '"),
        ({"regex": "("}, "holds no regular expression"),
        ("json", "is no mapping of constraints"),
        ({}, "is no mapping of constraints"),
        ([1], "is no mapping of constraints"),
        ({"type": None}, "is no mapping of constraints"),
    ],
)
def test_what_cannot_be_verified_is_refused(expected: Any, message: str) -> None:
    """A format nobody can check is an error that names the row, never a pass."""
    with pytest.raises(InputError) as error:
        check_expected_format(expected, "a.jsonl:3")
    assert str(error.value).startswith("a.jsonl:3: expected_format: ")
    assert message in str(error.value) and "Fix: " in str(error.value)


def test_all_faults_of_a_row_are_listed() -> None:
    """Two bad members are two problems."""
    with pytest.raises(InputError) as error:
        check_expected_format({"max_words": "3", "kewords": ["a"]}, "a.jsonl:3")
    assert len(error.value.problems) == 2
