"""A number for the ids and labels of a row, by which the row is known again where its columns are gone: in a batch.

A sum over the row's tokens, with random odd multipliers for the id and the label at each position, that wraps around at
64 bits. No loss covers the first label, and packing masks it, so it has no part.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def _multipliers(length: int) -> Integers:
    found: Integers = (
        np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (length, 2), np.int64, endpoint=True)
        | 1
    )
    found[0, 1] = 0
    return found


def multipliers(length: int) -> Integers:
    """(at least `length`, 2) multipliers of ids and labels by position; a longer table begins with the shorter one."""
    return _multipliers(1 << max(length - 1, 0).bit_length())


def row_fingerprints(ids: Any, labels: Any, offsets: Any) -> Integers:
    """(rows,) fingerprints of rows that lie one after the other in `ids` and `labels`, the k-th from `offsets[k]`."""
    starts, lengths = offsets[:-1], np.diff(offsets)
    factors = multipliers(int(lengths.max(initial=1)))
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    terms = (ids.astype(np.int64) + 1) * factors[positions, 0] + labels.astype(np.int64) * factors[
        positions, 1
    ]
    return np.add.reduceat(terms, starts)
