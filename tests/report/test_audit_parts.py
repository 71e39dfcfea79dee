"""Two texts in passages: what both have and what only one has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft_recipes.report.audit_parts import Passage, compare


@pytest.mark.parametrize(
    ("left", "right", "differences"),
    [
        ("the red car", "the blue car", (["red"], ["blue"])),
        ("same", "same", ([], [])),
        ("", "only here", ([], ["only here"])),
        ("a  b\nc", "a b\nc!", (["  "], [" ", "!"])),
    ],
)
def test_compare_marks_what_only_one_text_has(
    left: str, right: str, differences: tuple[list[str], list[str]]
) -> None:
    """The passages make up both texts, those of both are equal, the others are the differences."""
    left_passages, right_passages = compare(left, right)
    assert "".join(passage.text for passage in left_passages) == left
    assert "".join(passage.text for passage in right_passages) == right
    assert shared(left_passages) == shared(right_passages)
    assert (not_shared(left_passages), not_shared(right_passages)) == differences


def shared(passages: Sequence[Passage]) -> list[str]:
    return [passage.text for passage in passages if passage.is_shared]


def not_shared(passages: Sequence[Passage]) -> list[str]:
    return [passage.text for passage in passages if not passage.is_shared]
