"""The account of the rows, as people read it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sft_recipes.data.ledger import SourceLedger, ledger_lines
from sft_recipes.errors import InputError

NO_LOSS = SourceLedger(
    "a.jsonl",
    "train",
    rows_in=2,
    rows_kept=2,
    training_rows=2,
    tokens_kept=8,
    trained_tokens_kept=2,
)


def test_a_source_without_losses_is_one_line() -> None:
    """Only numbers above 0 get a line of their own; a source without tokens divides by nothing."""
    assert ledger_lines(
        {"sources": [NO_LOSS.as_json(), SourceLedger("b.jsonl", "test").as_json()]}
    ) == [
        "a.jsonl [train]: 2 rows in, 2 kept as 2 training rows, 0 dropped, 0 rejected; 2 of 8 tokens trained (25.0%)",
        "b.jsonl [test]: 0 rows in, 0 kept as 0 training rows, 0 dropped, 0 rejected; 0 of 0 tokens trained (0.0%)",
    ]


def test_every_loss_has_a_line() -> None:
    """Each kind of loss is said with its number; dropped rows by reason with their first two places."""
    losses: dict[str, Any] = {
        "rows_cut": 1000,
        "rows_neutralized": 2,
        "turns_masked": 3,
        "trained_tokens_lost": 4,
    }
    places = {"overlength": ["a:1 (long)", "a:2 (long)", "a:3 (long)"]}
    lost = losses | {
        "dropped": {"overlength": 3},
        "places": places,
        "notes": ["columns not used: id, kind"],
    }
    assert ledger_lines({"sources": [NO_LOSS.as_json() | lost]})[1:] == [
        "  1,000 rows lost whole trailing turns to max_length",
        "  2 rows spell control tokens; the text stays text",
        "  3 turns left untrained (history: mask)",
        "  4 trained tokens lost",
        "  dropped, overlength: 3 (first: a:1 (long); a:2 (long))",
        "  columns not used: id, kind",
    ]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (
            {"rows_kept": 295, "rows_dropped": 1, "dropped": {"overlength": 1}},
            "1 of 296 rows holds 74.0% of the trained tokens, which would be lost",
        ),
        (
            {"rows_kept": 299, "rows_cut": 2, "rows_dropped": 1, "dropped": {"overlength": 1}},
            "3 of 300 rows hold 74.0% of the trained tokens, which would be lost",
        ),
        (
            {"rows_kept": 1, "rows_dropped": 3, "dropped": {"overlength": 0, "unverified": 3}},
            "3 of 4 rows (75.0%) would be dropped",
        ),
    ],
)
def test_a_refused_loss_says_how_many_rows_it_is(losses: dict[str, Any], words: str) -> None:
    """A share of tokens may be one long row: the rows stand beside it."""
    counts = {**losses, "dropped": Counter(losses["dropped"])}
    places = {reason: ["a:1 (why)"] for reason in losses["dropped"]}
    ledger = SourceLedger(
        "a.jsonl",
        "train",
        training_rows=1,
        trained_tokens_kept=26,
        trained_tokens_lost=74,
        places=places,
        **counts,
    )
    with pytest.raises(InputError) as refused:
        ledger.check(0.05)
    assert words in str(refused.value)
