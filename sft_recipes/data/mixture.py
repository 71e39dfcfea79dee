"""Which of the rows that may be trained are trained, and how often: drawn by seed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from sft_recipes.data.row_table import Integers, column
from sft_recipes.recipe import DatasetSource

# TRL logs `eval_aux_loss` of a mixture of experts; the loss of a data set is `eval_NAME_loss`.
_TAKEN_NAMES = ("aux",)


def data_set_names(sources: Sequence[DatasetSource]) -> list[str]:
    """A short name of each data set, no two alike: of its file, folder or Hub set.

    Where several share it, that of their config or folder stands before it.
    """
    stems = [Path(source.path).stem for source in sources]
    shared = Counter(stems)
    names: list[str] = []
    for source, stem in zip(sources, stems, strict=True):
        name = stem
        if shared[stem] > 1:
            before = source.name or Path(source.path).parent.name
            name = f"{before}-{stem}".strip("-")
        names.append(_unlike(name, (*names, *_TAKEN_NAMES)))
    return names


def _unlike(name: str, taken: Sequence[str]) -> str:
    """The name, numbered if it is taken."""
    number = 1
    numbered = name
    while numbered in taken:
        number += 1
        numbered = f"{name}-{number}"
    return numbered


@dataclass(frozen=True, slots=True)
class RowsByDataSet:
    """Rows of a mixture in their order: the number of each one's data set, by which it is in
    `names`, and by what it is known again: its fingerprint, the group of its prompt.
    """

    names: Sequence[str]
    numbers: Integers
    fingerprints: Integers
    groups: Integers

    def present(self) -> Mapping[int, str]:
        """The data sets that any of the rows is from."""
        return {number: self.names[number] for number in np.unique(self.numbers).tolist()}


def rows_by_data_set(table: Dataset, rows: Integers, names: Sequence[str]) -> RowsByDataSet:
    """Rows of a prepared table, by their data sets."""
    return RowsByDataSet(
        names=names,
        numbers=column(table, "source")[rows],
        fingerprints=column(table, "fingerprint")[rows],
        groups=column(table, "group")[rows],
    )


def mix(
    sources: Sequence[DatasetSource], source_of_row: Integers, seed: int, max_rows: int | None
) -> Integers:
    """Indices of the rows to train, with repeats where a `weight` above 1 asks for them.

    `fraction` is a share of the final mixture: the largest mixture that oversamples nothing, as in
    TRL, but drawn by seed instead of taking the first rows. `max_rows` then draws that many of the
    result.
    """
    generator = np.random.default_rng(seed)
    rows_by_source: list[Integers] = []
    for number in range(len(sources)):
        rows_by_source.append(np.flatnonzero(source_of_row == number))
    if any(source.fraction is not None for source in sources):
        parts = _by_fraction(sources, rows_by_source, generator)
    else:
        parts = _by_weight(sources, rows_by_source, generator)
    chosen = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    if max_rows is not None and max_rows < len(chosen):
        chosen = _draw(chosen, max_rows, generator)
    return chosen


def _by_fraction(
    sources: Sequence[DatasetSource],
    rows_by_source: Sequence[Integers],
    generator: np.random.Generator,
) -> list[Integers]:
    """Of each source its share of the largest mixture in which no row is repeated."""
    fractions = np.array([source.fraction or 0.0 for source in sources])
    shares = fractions / fractions.sum()
    sizes = np.array([len(rows) for rows in rows_by_source])
    is_used = shares > 0
    total = min(sizes[is_used] / shares[is_used])
    parts: list[Integers] = []
    for rows, share in zip(rows_by_source, shares, strict=True):
        parts.append(_draw(rows, round(share * total), generator))
    return parts


def _by_weight(
    sources: Sequence[DatasetSource],
    rows_by_source: Sequence[Integers],
    generator: np.random.Generator,
) -> list[Integers]:
    """Every row `floor(weight)` times, and a seeded share of the rows once more."""
    parts: list[Integers] = []
    for source, rows in zip(sources, rows_by_source, strict=True):
        whole = int(source.weight)
        extra = _draw(rows, round((source.weight - whole) * len(rows)), generator)
        parts += [np.tile(rows, whole), extra]
    return parts


def _draw(rows: Integers, count: int, generator: np.random.Generator) -> Integers:
    """`count` of the rows, in their own order."""
    return rows[np.sort(generator.permutation(len(rows))[:count])]
