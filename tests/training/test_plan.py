"""The plan says beforehand what the run then shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe
from tests.training.tiny import trainer_for


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_memory_is_what_one_step_allocates(keys: dict[str, Any], write_recipe: Callable[..., Path]) -> None:
    """Parameters, trained parameters, and bytes of weights, gradients and optimizer equal those after one step."""
    path = write_recipe(max_steps=1, **keys)
    planned = check_recipe(load_recipe(path), progress=False).plan
    trainer = trainer_for(path)
    trainer.train()
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    states = [
        value
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if name != "step"  # a counter, not a tensor the size of the weights
    ]
    assert planned["parameters"] == sum(parameter.numel() for parameter in parameters)
    assert planned["trained parameters"] == sum(parameter.numel() for parameter in trained)
    assert sum(planned["trained by layer"].values()) == planned["trained parameters"]
    sizes = planned["bytes a device"]
    assert sizes["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert sizes["gradients"] == sum(parameter.nbytes for parameter in trained)
    assert sizes["optimizer"] == sum(value.nbytes for value in states)
    assert sizes["activations"] > 0


def test_packs_are_counted_as_they_are_trained(write_recipe: Callable[..., Path]) -> None:
    """With packing the planned steps are those that TRL's packing of the same rows gives."""
    path = write_recipe(packing=True, max_length=64, num_train_epochs=1, per_device_train_batch_size=2)
    planned = check_recipe(load_recipe(path), progress=False).plan
    packs = len(trainer_for(path).train_dataset)
    assert planned["steps"] == -(-packs // 2)
    assert 0 < planned["share of each pack filled"] <= 1
