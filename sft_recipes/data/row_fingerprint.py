"""A number by which a row is known again where its columns are gone: in a batch.

A sum over the row's tokens, with random odd multipliers for the id and the label at each position,
that wraps around at 64 bits. No loss covers the first label, and packing masks it, so it has no
part.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_SMALLEST = -(2**63)
_LARGEST = 2**63 - 1


@lru_cache(maxsize=4)
def _multipliers(length: int) -> Integers:
    generator = np.random.default_rng(0)
    numbers = generator.integers(_SMALLEST, _LARGEST, (length, 2), np.int64, endpoint=True)
    odd: Integers = numbers | 1
    odd[0, 1] = 0
    return odd


def multipliers(length: int) -> Integers:
    """(at least `length`, 2) multipliers of ids and labels by position.

    A longer table begins with the shorter one.
    """
    return _multipliers(1 << max(length - 1, 0).bit_length())


def row_fingerprints(ids: Any, labels: Any, offsets: Any) -> Integers:
    """(rows,) fingerprints of rows that lie one after the other, the k-th from `offsets[k]` on.

    `ids` and `labels` (tokens,) hold all of them, `offsets` (rows + 1,) ends with their number.
    """
    starts = offsets[:-1]
    lengths = np.diff(offsets)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    factors = multipliers(int(lengths.max(initial=1)))[positions]
    terms = (ids.astype(np.int64) + 1) * factors[:, 0]
    terms += labels.astype(np.int64) * factors[:, 1]
    return np.add.reduceat(terms, starts)
