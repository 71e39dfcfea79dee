"""The table of prepared rows: its columns, how rows get into it, how a column is read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from sft_recipes.data.labelled_rows import IGNORE_INDEX, LabelledRow
from sft_recipes.data.row_fingerprint import row_fingerprints

Integers = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "source": pa.int16(),
        "row": pa.int32(),
        "group": pa.int64(),
        # Sums over these are sums over the rows, without reading them again at each start.
        "tokens": pa.int32(),
        "trained_tokens": pa.int32(),
        "fingerprint": pa.int64(),
    }
)


def record_batch(
    rows: Sequence[LabelledRow], source: int, row_numbers: Sequence[int], groups: Sequence[int]
) -> pa.RecordBatch:
    """Labelled rows of one source as rows of the table.

    `row_numbers` and `groups` are those of each.
    """
    tokens = np.array([len(row.ids) for row in rows], dtype=np.int32)
    trained_tokens = np.array([row.trained_tokens for row in rows], dtype=np.int32)
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(tokens, out=offsets[1:])
    ids = np.empty(0, dtype=np.int32)
    if rows:
        ids = np.concatenate([row.ids for row in rows])
    # All labels in one array: an array for each row would take longer to join than to fill.
    labels = np.full_like(ids, IGNORE_INDEX)
    for row, first in zip(rows, offsets.tolist(), strict=False):
        for start, end in row.spans:
            labels[first + start : first + end] = ids[first + start : first + end]
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
        "source": pa.array(np.full(len(rows), source), type=pa.int16()),
        "row": pa.array(row_numbers, type=pa.int32()),
        "group": pa.array(groups, type=pa.int64()),
        "tokens": pa.array(tokens),
        "trained_tokens": pa.array(trained_tokens),
        "fingerprint": pa.array(row_fingerprints(ids, labels, offsets)),
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def column(rows: Dataset, name: str) -> Integers:
    """A column of numbers of the whole table."""
    # At once: through a selection `datasets` gathers row by row, seven seconds for a million.
    return np.asarray(rows.data.column(name), dtype=np.int64)
