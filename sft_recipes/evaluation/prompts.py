"""Rows with an equal prompt are one observation: values of rows become values of prompts here.

A hundred answers to two prompts say as much as two. So every estimate of an evaluation is one over
prompts: a prompt's value is the mean of its rows, and `n` counts prompts. Prompts are equal as they
are where the split is drawn (`data/prompt_groups.py`): NFKC, case and white space aside.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean
from typing import Any

from sft_recipes.shingles import folded
from sft_recipes.statistics import by_group

Row = Mapping[str, Any]


def prompts_of(rows: Sequence[Row]) -> list[Hashable]:
    """What each row asked; a row that asked nothing (a text scored by itself) is one of its own."""
    prompts: list[Hashable] = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        prompts.append(number if prompt is None else folded(prompt))
    return prompts


def values_of_prompts(
    rows: Sequence[Row], values: Sequence[Any], combine: Callable[[Sequence[Any]], Any] = fmean
) -> list[Any]:
    """One value for each prompt of the rows, in their order, None where it has none."""
    return by_group(values, prompts_of(rows), combine)


def count_prompts(rows: Sequence[Row]) -> int:
    """How many different prompts the rows ask."""
    return len(set(prompts_of(rows)))
