"""Generating answers inside training takes no more of a run than the recipe allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import trainer_for

STEPS, STEP_SECONDS, GENERATION_SECONDS = 40, 10.0, 7.0


def times_generated(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train with an evaluation after every step, on a clock that only steps and generation move."""
    clock = [0.0]
    trainer = trainer_for(path)
    # Not before: preparation waits for other processes, by a clock that moves.
    monkeypatch.setattr("sft_recipes.training.trainer.time.monotonic", lambda: clock[0])
    step = trainer.training_step

    def slow_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        clock[0] += STEP_SECONDS
        return loss

    def slow_metrics(model: Any) -> Mapping[str, float]:
        clock[0] += GENERATION_SECONDS
        return {"completion_rate": 1.0}

    monkeypatch.setattr(trainer, "training_step", slow_step)
    trainer.generation_metrics = slow_metrics
    trainer.train()
    assert sum(trainer.generation_seconds) == GENERATION_SECONDS * len(trainer.generation_seconds)
    return len(trainer.generation_seconds)


@pytest.fixture
def evaluates_every_step(write_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """A recipe of 40 steps, each followed by an evaluation."""

    def write(**keys: Any) -> Path:
        every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
        evaluation = {"max_new_tokens": 8, **keys.pop("evaluation", {})}
        fixed = {
            "eval_split": 4,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "evaluation": evaluation,
        }
        return write_recipe(**fixed, **(every_step | keys))

    return write


def test_generation_stays_within_its_share(
    evaluates_every_step: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default no more than 5 % of the run's time goes into generation, and that share is used."""
    seconds = GENERATION_SECONDS * times_generated(evaluates_every_step(), monkeypatch)
    share = seconds / (STEPS * STEP_SECONDS + seconds)
    assert 0.05 - GENERATION_SECONDS / (STEPS * STEP_SECONDS) < share <= 0.05


@pytest.mark.parametrize(
    "keys",
    [
        {"evaluation": {"max_share": None}},
        {"metric_for_best_model": "completion_rate", "save_strategy": "best"},
    ],
    ids=["no limit", "the best model depends on it"],
)
def test_generation_is_never_left_out_where_it_is_needed(
    keys: dict[str, Any], evaluates_every_step: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit, or where a generated metric picks the best checkpoint, every evaluation generates."""
    assert times_generated(evaluates_every_step(**keys), monkeypatch) == STEPS
