"""Prompts of a preparation on disk, with the signatures that near-duplicates are found by.

Workers sign the prompts of their batches; a preparation writes them beside its shards and reads
them at its end from memory-mapped files, so that no more than numbers of all prompts are held.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_recipes.data.row_table import Integers
from sft_recipes.shingles import PROMPT_SHINGLE
from sft_recipes.similarity import BANDS, SLOTS, Signatures, sign

# A key of 32 bits of each band, and one byte of each slot.
_BAND_BYTES = 4 * BANDS

SCHEMA = pa.schema(
    {
        "group": pa.int64(),
        "prompt": pa.string(),
        "bands": pa.binary(_BAND_BYTES),
        "slots": pa.binary(SLOTS),
        "whole": pa.uint64(),
    }
)


def prompt_batch(groups: Sequence[int], prompts: Sequence[str]) -> pa.RecordBatch:
    """The different prompts of a batch, signed, in their order."""
    by_group = dict(zip(groups, prompts, strict=True))
    signatures = sign(list(by_group.values()), PROMPT_SHINGLE)
    columns = {
        "group": pa.array(list(by_group), type=pa.int64()),
        "prompt": pa.array(list(by_group.values()), type=pa.string()),
        "bands": _binary_column(signatures.bands, _BAND_BYTES),
        "slots": _binary_column(signatures.slots, SLOTS),
        "whole": pa.array(signatures.whole),
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


@dataclass(frozen=True)
class PromptTable:
    """The n different prompts of a preparation, each where it comes first; `groups` (n,)."""

    groups: Integers
    prompts: Sequence[str]
    signatures: Signatures


def read_prompts(files: Iterable[Path], folder: Path) -> PromptTable:
    """The different prompts of several files; arrays of signatures are written to `folder`."""
    tables: list[pa.Table] = []
    for file in files:
        tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    groups = np.asarray(table["group"])
    # In the order of the files: others would be read from all over them.
    rows = np.sort(np.unique(groups, return_index=True)[1])
    return PromptTable(
        groups=groups[rows],
        prompts=_StoredTexts(table["prompt"], rows),
        signatures=Signatures(
            bands=_gathered(table, "bands", rows, np.dtype(np.uint32), folder),
            slots=_gathered(table, "slots", rows, np.dtype(np.uint8), folder),
            whole=np.asarray(table["whole"])[rows],
        ),
    )


class _StoredTexts(Sequence[str]):
    """Chosen texts of a column on disk; each is read when it is asked for."""

    def __init__(self, column: pa.ChunkedArray, rows: Integers) -> None:
        self._column = column
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _StoredTexts(self._column, self._rows[index])
        text: str = self._column[int(self._rows[index])].as_py()
        return text


def _binary_column(matrix: npt.NDArray[Any], width: int) -> pa.Array:
    """The rows of a matrix as values of `width` bytes."""
    buffer = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(matrix), [None, buffer])


def _gathered(
    table: pa.Table, name: str, rows: Integers, kind: np.dtype[Any], folder: Path
) -> npt.NDArray[Any]:
    """(rows, values) a binary column of chosen rows, rising, as an array on disk."""
    width = table.schema.field(name).type.byte_width // kind.itemsize
    shape = (len(rows), width)
    if not len(rows):
        return np.empty(shape, dtype=kind)
    array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
    first = 0
    for chunk in table[name].chunks:
        start, stop = np.searchsorted(rows, (first, first + len(chunk)))
        values = np.frombuffer(chunk.buffers()[1], dtype=kind).reshape(-1, width)
        array[start:stop] = values[chunk.offset + rows[start:stop] - first]
        first += len(chunk)
    return array
