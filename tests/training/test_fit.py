"""What is advised where memory or time is short works as it stands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe import Recipe, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import check
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.check import check_recipe
from sft_recipes.training.fit import smallest_change, time_advice, train_command


def recipe_of(command: str) -> Recipe:
    """The recipe that a command line trains."""
    program, verb, path, *overrides = shlex.split(command)
    assert (program, verb) == ("sft-recipes", "train")
    return load_recipe(path, parse_overrides(overrides))


@pytest.mark.parametrize(
    "keys",
    [{"global_batch_size": 16}, {"gradient_accumulation_steps": 2}, {}],
    ids=["global", "accumulation", "neither"],
)
def test_what_is_advised_fits_and_trains_the_same_rows_a_step(
    keys: dict[str, Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a little less memory than a run needs, the command that is advised needs less than there is, and takes as
    many rows a step as before.
    """
    path = write_recipe(**keys)
    before = check_recipe(load_recipe(path), progress=False)
    assert before["advice"] == {}
    needed = before["plan"]["bytes at peak, estimated"]
    monkeypatch.setattr(check, "free_bytes", lambda config: needed - 1)
    advice = check_recipe(load_recipe(path), progress=False)["advice"]["memory"]
    assert advice.startswith("it fits with ")
    command = advice.partition(": ")[2]
    after = check_recipe(recipe_of(command), progress=False)["plan"]
    assert after["bytes at peak, estimated"] < needed
    assert after["rows a step"] == before["plan"]["rows a step"]


def test_what_fits_nothing_says_so(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no setting is small enough, the smallest of all is named, and that it does not fit."""
    monkeypatch.setattr(check, "free_bytes", lambda config: 1)
    advice = check_recipe(load_recipe(write_recipe()), progress=False)["advice"]["memory"]
    assert advice.startswith("a smaller model, or more memory; it still takes ")
    changed = recipe_of(advice.rpartition(": ")[2])
    assert changed.training["per_device_train_batch_size"] == 1
    assert changed.training["activation_checkpointing"] is True
    assert changed.model["use_peft"] is True


def test_the_first_change_that_is_enough_is_taken(write_recipe: Callable[..., Path]) -> None:
    """Batches are halved before activations are computed twice, and that before all weights become LoRA."""
    recipe = load_recipe(write_recipe(per_device_train_batch_size=4))

    def peak_of(changed: Recipe) -> int:
        return 10 * int(changed.training["per_device_train_batch_size"])

    def settings(free: int) -> list[str]:
        smaller = smallest_change(recipe, sft_config(recipe), 10**6, free, peak_of)
        assert smaller is not None
        return list(smaller.settings)

    batch = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    assert settings(20) == settings(10) == batch
    assert settings(9) == [*batch, "activation_checkpointing", "use_peft", "learning_rate"]


def test_only_a_long_run_is_shortened(write_recipe: Callable[..., Path]) -> None:
    """Up to an hour nothing is said; beyond it as many steps as take 20 minutes, in a folder of their own; where
    those are a handful, that this is no machine for it.
    """
    recipe = load_recipe(write_recipe())
    assert time_advice(recipe, steps=3600, seconds_a_step=1) is None
    changed = recipe_of(str(time_advice(recipe, steps=3601, seconds_a_step=1)).partition(": ")[2])
    assert changed.training["max_steps"] == 1200
    assert changed.output_dir.resolve() == recipe.output_dir.with_name("run-short").resolve()
    assert "a machine with a GPU" in str(time_advice(recipe, steps=100, seconds_a_step=200))


def test_the_command_trains_the_recipe_as_it_was_given(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overrides of every kind, a path with a space among them, come back from the command that is printed."""
    overrides = {
        "learning_rate": 5e-4,
        "packing": False,
        "output_dir": "./my run",
        "chat_template_kwargs": {"day": "Mon"},
    }
    path = write_recipe()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    recipe = load_recipe(path, overrides)
    again = recipe_of(train_command(recipe, None))
    assert again.values.keys() == recipe.values.keys()
    assert (again.training, again.template) == (recipe.training, recipe.template)


def test_the_command_keeps_the_launch(write_recipe: Callable[..., Path]) -> None:
    """What was planned for a launch is trained by that launch, with as many processes."""
    command = train_command(load_recipe(write_recipe()), "zero3", processes=4)
    assert command.endswith("--launch zero3 --num_processes 4")
