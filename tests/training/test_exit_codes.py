"""What a run under a launcher ends with: the ranks' own codes, and in the run's state what a first rank said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Preempted, Problem, TrainingFault
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import launch
from sft_recipes.training.record import record_failure, record_state

# the launcher's code, those of ranks, signals passed on -> what the command returns
ENDINGS: dict[str, tuple[int, dict[int, int], list[int], int]] = {
    "well": (0, {}, [], 0),
    "refused by rank 0": (1, {0: 2, 1: 3}, [], 2),
    "a check": (1, {0: 1, 1: 3}, [], 1),
    "a fault of rank 1": (1, {0: 75, 1: 70}, [], 70),
    "preempted": (1, {0: 75, 1: 75}, [15], 75),
    "Ctrl-C": (1, {0: 130, 1: 75}, [2], 130),
    "stopped before a rank was there": (-15, {}, [15], 75),
    "interrupted before a rank was there": (-2, {}, [2], 130),
    "a rank was killed": (1, {}, [], 3),
    "the launcher was killed": (-9, {}, [], 3),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_code_of_a_launch(ending: str) -> None:
    """A launcher's 1 is never passed on; who failed first counts, rank 0 before others, a fault before a stop."""
    launcher_code, codes, signals, expected = ENDINGS[ending]
    assert launch._Ending(launcher_code, codes, signals).code == expected


def test_ranks_leave_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks write is what the launcher reads; without a launcher nothing is written."""
    monkeypatch.delenv(launch.EXIT_CODES, raising=False)
    assert launch.leave_code(3) == 3
    monkeypatch.setenv(launch.EXIT_CODES, str(tmp_path))
    for rank, code in (("11", 75), ("2", 70), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        assert launch.leave_code(code) == code
    assert launch._codes_left(tmp_path) == {2: 70, 11: 75}


def test_the_state_says_what_came_first(write_recipe: Callable[..., Path]) -> None:
    """Any rank marks the run that its rank 0 began; another run's state and a first rank's word are left alone."""
    recipe = load_recipe(write_recipe())
    recipe.output_dir.mkdir()

    def state() -> dict[str, Any]:
        return run_folder.read_state(recipe.output_dir)

    record_state(recipe, "running", pid=7)
    record_failure(recipe, 8, TrainingFault("another run's"), "another run's")
    assert state()["state"] == "running"
    record_failure(recipe, 7, None, "internal error")
    assert (state()["state"], state()["exit_code"], state()["error"]) == (
        "failed",
        70,
        "internal error",
    )
    record_state(recipe, "running", pid=7)
    record_failure(recipe, 7, Preempted("stopped", 2), "stopped")
    refusal = InputError(Problem("f", "", "wrong", "mend it"))
    record_failure(recipe, 7, refusal, str(refusal))
    assert (state()["state"], state()["exit_code"]) == ("preempted", 130)
