"""Which rows of its sources a run trained, read from the rows that were prepared for it."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft_recipes.data.prepared import TRAIN, load_prepared, open_table
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.data.row_table import Integers, column
from sft_recipes.messages import Example
from sft_recipes.recipe import Recipe


@dataclass(frozen=True)
class TrainedRows:
    """The trained rows: by source and number and, where rows were held out, by prompt, too.

    Rows of several files of one source may have the same number; held-out prompts tell them apart.
    """

    places: Set[tuple[int, int]]
    groups: Set[int] | None
    seed: int

    def holds(self, source: int, example: Example) -> bool:
        """Whether an example of a source, as it was read, was trained."""
        if (source, example.row) not in self.places:
            return False
        if self.groups is None:
            return True
        return prompt_group(prompt_text(example), self.seed) in self.groups


def trained_indices(recipe: Recipe, folder: Path) -> Integers:
    """The rows of the table of a prepared folder that the recipe trains, rising.

    Raises InputError if the folder is not whole.
    """
    data = load_prepared(recipe, folder)
    table = open_table(folder, TRAIN)
    return np.flatnonzero(np.isin(column(table, "fingerprint"), data.fingerprints))


def trained_rows(recipe: Recipe, folder: Path) -> TrainedRows:
    """Where those rows stand in their sources. Raises as `trained_indices`."""
    trained = trained_indices(recipe, folder)
    table = open_table(folder, TRAIN)
    sources = column(table, "source")[trained].tolist()
    rows = column(table, "row")[trained].tolist()
    groups = None
    if recipe.data.eval_split or recipe.data.test_split:
        groups = set(column(table, "group")[trained].tolist())
    return TrainedRows(set(zip(sources, rows, strict=True)), groups, recipe.data.seed)
