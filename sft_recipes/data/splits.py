"""Which rows are held out: a seeded draw that never divides a group of one prompt.

A preparation keeps `SplitCandidates`, without knowing yet how many rows are held out; the split
itself is drawn when prepared rows are loaded, so that another size needs no new preparation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from sft_recipes.data.kept_examples import GroupedExample
from sft_recipes.data.prompt_groups import joined_groups
from sft_recipes.data.row_table import Integers, column
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, place
from sft_recipes.recipe import Recipe

# Held-out examples kept as messages for generation; evaluating more of them is the `evaluate`
# command's work.
KEPT_EVAL_EXAMPLES = 1000
# Above every group: they have 63 bits.
LARGEST_GROUP = 1 << 63
# Overlapping rows that an error names.
_NAMED_ROWS = 20


@dataclass(slots=True)
class SplitCandidates:
    """What a preparation keeps of the examples that pass it, for a split that is drawn later.

    Those with the smallest groups, in this order, which `split_eval` holds out first.
    """

    examples: list[GroupedExample] = field(default_factory=list)

    def add(self, groups: Sequence[int], examples: Sequence[Example]) -> None:
        """Keep those of the examples, of these groups, that a split would hold out first."""
        limit = LARGEST_GROUP
        if len(self.examples) == KEPT_EVAL_EXAMPLES:
            limit = self.examples[-1].group
        new: list[GroupedExample] = []
        for group, example in zip(groups, examples, strict=True):
            if group < limit:
                new.append(GroupedExample(group, example))
        by_group = sorted([*self.examples, *new], key=attrgetter("group"))
        self.examples = by_group[:KEPT_EVAL_EXAMPLES]


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows are trained, and which of `table` are held out.

    `groups` are those of the latter.
    """

    trained: Integers
    table: Dataset
    held_out: Integers
    groups: Integers


def draw_split(recipe: Recipe, rows: Dataset, test_rows: Dataset | None, joined: Integers) -> Split:
    """The split that the recipe asks for: a test split as it is, or a seeded draw, or none.

    `joined`: which groups join which (`prompt_groups.join_near_duplicates`). Raises InputError
    where a training row has the prompt of a row of the test split, and where no row would be left
    to train.
    """
    groups = joined_groups(column(rows, "group"), joined)
    everything = np.arange(len(rows))
    if test_rows is not None:
        test_groups = column(test_rows, "group")
        _refuse_overlap(recipe, rows, np.isin(groups, test_groups))
        return Split(everything, test_rows, np.arange(len(test_rows)), test_groups)
    if recipe.data.eval_split:
        numbers = [n for n, source in enumerate(recipe.data.datasets) if source.held_out]
        drawn_from = np.isin(column(rows, "source"), numbers)
        trained, held_out = split_eval(groups, recipe.data.eval_split, drawn_from)
        if not len(trained):
            fix = "make eval_split smaller"
            raise InputError(Problem(recipe.name, "eval_split", "no row is left to train", fix))
        return Split(trained, rows, held_out, groups[held_out])
    nothing = np.empty(0, dtype=np.int64)
    return Split(everything, rows, nothing, nothing)


def split_eval(
    groups: Integers, eval_split: float, drawn_from: npt.NDArray[np.bool_] | None = None
) -> tuple[Integers, Integers]:
    """Indices of (train, eval) rows: whole groups in the order of their hash are held out.

    `eval_split` below 1 is a share of the rows, from 1 on a count. The hash is seeded, so the draw
    is, too. A group of more than half the rows wanted stays in train if there are smaller ones: it
    would be most of the evaluation. `drawn_from` marks the rows that share and draw are of (None:
    all); another row goes along with its group.
    """
    candidates = groups if drawn_from is None else groups[drawn_from]
    wanted = int(eval_split)
    if eval_split < 1:
        wanted = round(eval_split * len(candidates))
    if wanted <= 0 or not len(candidates):
        return np.arange(len(groups)), np.empty(0, dtype=np.int64)
    names, sizes = np.unique(candidates, return_counts=True)
    is_small = sizes <= max(wanted / 2, 1)
    if not is_small.any():
        is_small[:] = True
    rows_so_far = np.cumsum(sizes[is_small])
    count = int(np.searchsorted(rows_so_far, wanted)) + 1
    is_held_out = np.isin(groups, names[is_small][:count])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _refuse_overlap(recipe: Recipe, rows: Dataset, is_shared: npt.NDArray[np.bool_]) -> None:
    """Raise InputError where there is a training row with the prompt of a row of the test split."""
    if not is_shared.any():
        return
    sources = column(rows, "source")
    numbers = column(rows, "row")
    what = f"the same prompt stands in the {recipe.data.test_split!r} split"
    fix = "remove it from one of them; an evaluation on trained prompts says nothing"
    problems: list[Problem] = []
    for index in np.flatnonzero(is_shared)[:_NAMED_ROWS]:
        where = place(recipe.data.datasets[sources[index]].path, int(numbers[index]))
        problems.append(Problem(where, "dataset_test_split", what, fix))
    raise InputError(problems, total=int(is_shared.sum()))
