"""Every key that a recipe takes, tried with values that no key should take in silence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import (
    DATA_KEYS,
    EVALUATION_KEYS,
    OWN_KEYS,
    SOURCE_KEYS,
    make_recipe,
    trl_keys,
)
from tests.attack.hostile_values import VALUES

MINIMAL = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
TRL_KEYS = {**trl_keys().model, **trl_keys().training}
BLOCKS = {
    "": {**DATA_KEYS, **OWN_KEYS, **TRL_KEYS},
    "datasets.": SOURCE_KEYS,
    "evaluation.": EVALUATION_KEYS,
}
ALL_KEYS = [(block, name) for block, keys in BLOCKS.items() for name in keys]
# What no key takes, whatever it means.
NEVER = [
    "beyond 63 bits",
    "5,000 digits",
    "infinite",
    "minus infinite",
    "not a number",
    "empty text",
    "blank text",
    "NUL",
    "half a surrogate",
    "empty list",
    "deep list",
    "mapping of numbers",
    "infinite inside",
]
# Keys under which two that belong together, or that stand for one another, are refused.
RELATED = {"hub_model_id", "dataset_name"}


def recipe_with(block: str, name: str, value: Any) -> dict[str, Any]:
    """The keys of a recipe in which one key has this value."""
    if block == "datasets.":
        entry = {"path": "d", name: value}
        return {**MINIMAL, "dataset_name": None, "datasets": [entry]}
    if block == "evaluation.":
        return {**MINIMAL, "evaluation": {name: value}}
    keys = {**MINIMAL, name: value}
    if name == "datasets":
        keys["dataset_name"] = None
    return keys


@pytest.mark.parametrize(("block", "name"), ALL_KEYS)
def test_hostile_values_are_refused_by_name_or_of_use(block: str, name: str) -> None:
    """A value is refused with the key's name, or it is one that the key's type and range take; what
    no key can use is always refused. Nothing else is raised.
    """
    for label, value in VALUES.items():
        try:
            make_recipe(recipe_with(block, name, value))
        except InputError as error:
            fields = {problem.field for problem in error.problems}
            named = any(name in field or field == block.removesuffix(".") for field in fields)
            assert named or fields & RELATED, f"{label}: {fields}"
            assert len(str(error)) < 20_000, f"{label}: the message has {len(str(error))} letters"
            continue
        assert label not in NEVER, f"{block}{name} takes {label}"
        if name != "data":  # a path or a block, which is read by its own keys
            assert BLOCKS[block][name].fits(value), f"{block}{name} takes {label}"
        if isinstance(value, float):
            assert math.isfinite(value)
