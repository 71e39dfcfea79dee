"""Word-level differences: known answers, nothing lost of either text, and where nothing is marked."""

from __future__ import annotations

import itertools

import pytest

from sft_recipes.report.word_difference import MOST_WORDS, TextPart, word_difference


def test_extra_and_missing_words_are_the_parts_that_differ() -> None:
    """An answer that goes on has its surplus marked, and what it lacks is marked in what was expected."""
    difference = word_difference("4, 20", "4, 20, 20")
    assert difference.expected == [TextPart("4, 20", False)]
    assert difference.answer == [TextPart("4, 20", False), TextPart(", 20", True)]
    difference = word_difference("the big dog", "the dog")
    assert [part.text for part in difference.expected if part.differs] == ["big "]
    assert not any(part.differs for part in difference.answer)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("a b c d", "a x c d"),
        ("- Mary\n- Jimmy", "- Mary\n- Tom"),
        ("漢字 ok", "漢字 nok"),
        ("", "text"),
        ("text", ""),
        ("wholly other words here", "nothing of it stands there"),
        ("w " * (MOST_WORDS + 1), "w"),
    ],
)
def test_the_parts_make_the_texts(expected: str, answer: str) -> None:
    """Joined, the parts are both texts, whatever is marked; parts that follow one another differ in being marked."""
    difference = word_difference(expected, answer)
    for parts, text in ((difference.expected, expected), (difference.answer, answer)):
        assert "".join(part.text for part in parts).strip() == text.strip()
        marks = [part.differs for part in parts]
        assert all(one != other for one, other in itertools.pairwise(marks))


def test_where_most_would_be_marked_nothing_is() -> None:
    """Texts with little in common, ones without an expected answer, and very long ones are left as they are."""
    for expected, answer in (
        ("4, 20", "The two have twenty pencils together, said the teacher."),
        (None, "yes"),
        ("w " * (MOST_WORDS + 1), "w " * MOST_WORDS),
    ):
        difference = word_difference(expected, answer)
        assert not any(part.differs for part in [*difference.expected, *difference.answer])
