"""The table of this project's keys: whole, in agreement with the settings, and enforced."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.number_range import Range
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    EvaluationSettings,
    LabelSettings,
    TemplateSettings,
)
from sft_recipes.recipe_checks import TABLES, Key
from sft_recipes.recipe_keys import (
    DATA_KEYS,
    EVALUATION_KEYS,
    OWN_KEYS,
    SOURCE_KEYS,
    make_data_recipe,
    make_recipe,
    trl_keys,
)

MINIMAL = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
# By the block they stand in.
BLOCKS: Mapping[str, Mapping[str, Key]] = {
    "": {**DATA_KEYS, **OWN_KEYS},
    "datasets.": SOURCE_KEYS,
    "evaluation.": EVALUATION_KEYS,
}
ALL_KEYS = [(block, name) for block, keys in BLOCKS.items() for name in keys]
RANGED = [(block, name) for block, name in ALL_KEYS if BLOCKS[block][name].range]


def recipe_with(block: str, name: str, value: Any) -> dict[str, Any]:
    """The keys of a recipe in which one key has this value."""
    if block == "datasets.":
        entry = {"path": "d", name: value}
        return {**MINIMAL, "dataset_name": None, "datasets": [entry]}
    if block == "evaluation.":
        return {**MINIMAL, "evaluation": {name: value}}
    return {**MINIMAL, name: value}


@pytest.mark.parametrize(("block", "name"), ALL_KEYS)
def test_every_key_is_explained(block: str, name: str) -> None:
    """Each key has a meaning that is one sentence, and a default that it would take itself."""
    key = BLOCKS[block][name]
    assert key.meaning.endswith(".") and len(key.meaning) < 200
    assert key.meaning[0].isupper()
    assert key.expected
    plain = list(key.default) if isinstance(key.default, tuple) else key.default
    assert plain is None or key.fits(plain)


@pytest.mark.parametrize(
    ("settings", "elsewhere"),
    [
        (DatasetSource, set()),
        (DataSettings, {"datasets", "seed"}),
        (LabelSettings, {"max_length"}),
        (TemplateSettings, set()),
        (EvaluationSettings, set()),
    ],
)
def test_no_field_of_the_settings_is_missing(settings: type, elsewhere: set[str]) -> None:
    """Every field is a key of the table, but for those that other keys or TRL's fill."""
    fields = {field.name for field in dataclasses.fields(settings)} - elsewhere
    known = {*OWN_KEYS, *SOURCE_KEYS, *EVALUATION_KEYS, "test_split"}
    assert fields <= known


@pytest.mark.parametrize(("block", "name"), RANGED)
def test_numbers_outside_of_their_range_are_refused(block: str, name: str) -> None:
    """Both bounds are taken, what lies beyond is refused with the range, and so are NaN and infinity."""
    key = BLOCKS[block][name]
    assert key.range is not None
    for value in taken_by(key.range):
        make_recipe(recipe_with(block, name, value))
    for value in refused_by(key.range):
        with pytest.raises(InputError) as refused:
            make_recipe(recipe_with(block, name, value))
        (problem,) = refused.value.problems
        assert problem.field == block + name
        assert problem.what == f"expected {key.expected}, got {value!r}"


def taken_by(bounds: Range) -> list[float]:
    """Numbers at the ends of a range."""
    return [end for end in (bounds.at_least, bounds.at_most, bounds.also) if end is not None]


def refused_by(bounds: Range) -> list[float]:
    """Numbers just outside of a range, and those outside of any."""
    outside = [float("nan"), float("inf"), float("-inf")]
    outside += [end for end in (bounds.above, bounds.below) if end is not None]
    if bounds.at_least is not None:
        outside.append(bounds.at_least - 1)
    if bounds.at_most is not None:
        outside.append(bounds.at_most + 1)
    if bounds.whole_from is not None:
        outside.append(bounds.whole_from + 0.5)
    return [value for value in outside if value != bounds.also]


def test_ranges_hold_for_data_without_a_recipe() -> None:
    """The options of a command are read by the same table."""
    with pytest.raises(InputError, match="max_rejected: expected float from 0 to 1, got 2"):
        make_data_recipe("d", {"max_rejected": 2})


@pytest.mark.parametrize(
    ("bounds", "value", "holds"),
    [
        (Range(0), 0, True),
        (Range(0), 1e300, True),
        (Range(0), -1e-9, False),
        (Range(0, 1), 1, True),
        (Range(0, 1), 1.0001, False),
        (Range(0), float("inf"), False),
        (Range(0, 1), float("nan"), False),
        (Range(above=0), 0, False),
        (Range(above=0), 1e-300, True),
        (Range(above=0, at_most=1), 1, True),
        (Range(0, below=1), 1, False),
        (Range(0, below=1), 0.999, True),
        (Range(above=0, whole_from=1), 0.3, True),
        (Range(above=0, whole_from=1), 1.5, False),
        (Range(above=0, whole_from=1), 2.0, True),
        (Range(1, also=-1), -1, True),
        (Range(1, also=-1), 0, False),
    ],
)
def test_range(bounds: Range, value: float, holds: bool) -> None:
    """Bounds are included; what is not finite is in no range."""
    assert bounds.holds(value) is holds


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Range(0), "at least 0"),
        (Range(0, 1), "from 0 to 1"),
        (Range(above=0), "above 0"),
        (Range(above=0, at_most=9), "above 0 and at most 9"),
        (Range(0, below=1), "at least 0 and below 1"),
        (Range(1, 1000, also=-1), "from 1 to 1,000, or -1"),
        (Range(above=0, at_most=5, whole_from=1), "above 0 and at most 5, whole from 1 on"),
    ],
)
def test_range_in_words(bounds: Range, words: str) -> None:
    """An error and the documentation say the bounds in the same words."""
    assert str(bounds) == words


def test_every_number_of_trl_has_a_range() -> None:
    """A number that TRL takes and the table does not bound would let nonsense through; and the table
    names no key that TRL does not have.
    """
    keys = {**trl_keys().model, **trl_keys().training}
    assert TABLES["trl"].keys() <= keys.keys()
    for name, key in keys.items():
        numbers = {int, float} & {key.kind, *typing.get_args(key.kind)}
        assert not numbers or key.range is not None, f"add {name} to trl: in recipe_keys.yaml"


def test_booleans_and_null_are_no_numbers() -> None:
    """true is not 1; null is nothing that a range could refuse."""
    key = Key(int | None, None, Range(1), "A count.")
    assert not key.fits(True)
    assert key.fits(None)
    assert key.expected == "int at least 1"


def test_an_unset_limit_of_the_share_is_a_choice() -> None:
    """null in `evaluation: max_share` is no limit, although the key has a range."""
    recipe = make_recipe({**MINIMAL, "evaluation": {"max_share": None}})
    assert recipe.evaluation.max_share is None
