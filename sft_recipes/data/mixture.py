"""Which of the rows that may be trained are trained, and how often: drawn by seed."""

from collections.abc import Sequence

import numpy as np

from sft_recipes.data.row_table import Integers
from sft_recipes.recipe import DatasetSource


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
