"""The comparison with llama.cpp: how near two tokens were where two answers part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gguf import gap_at_difference


class Counting:
    """A model whose logits of token n are n, less 10 at each position: it shows where it was asked."""

    asked: list[int]

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        self.asked = ids[0].tolist()
        logits = torch.arange(5.0) - 10 * ids.shape[1]
        return SimpleNamespace(logits=logits.expand(1, ids.shape[1], 5))


def test_the_gap_is_that_of_the_first_difference() -> None:
    """Tokens 4 and 1 after a prompt of two and one equal token: 3 of the largest logit, 30."""
    model = Counting()
    assert gap_at_difference(model, [7, 8], [2, 4, 0], [2, 1, 3]) == pytest.approx(3 / 30)
    assert model.asked == [7, 8, 2]


def test_an_answer_that_ends_early_is_no_near_tie() -> None:
    """Where one answer is the beginning of the other, no rounding is blamed."""
    assert gap_at_difference(Counting(), [7, 8], [2, 4], [2, 4, 1]) == 1.0
