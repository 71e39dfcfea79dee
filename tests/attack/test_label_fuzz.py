"""Hostile conversations over every template, by a seed that may be changed: none is trained wrongly."""

from __future__ import annotations

import os

import pytest

from tests.data.test_hostile import (
    NAMES,
    Tally,
    conversations_for,
    labeller_for,
    pristine,
    tally,
)

pytestmark = pytest.mark.slow
FIRST_SEED = 1_000_000 * int(os.environ.get("SFT_ATTACK_SEED", "16"))
CONVERSATIONS = 42


def test_no_hostile_row_is_trained_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 42 conversations for each template every turn is labelled as it is served, or dropped for a good reason."""
    total = Tally()
    for name in NAMES:
        tokenizer = pristine(name)
        seeds = range(FIRST_SEED, FIRST_SEED + CONVERSATIONS)
        tally(tokenizer, labeller_for(name), conversations_for(name, tokenizer, seeds), name, total)
    with capsys.disabled():
        print(f"\nlabel fuzz over {len(NAMES)} templates: {total}")
    assert (total.wrong, total.needless) == ([], [])
    assert total.turns > 1000
