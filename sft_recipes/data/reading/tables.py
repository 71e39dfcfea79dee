"""Rows of tables: CSV by the standard library, the rest by pyarrow and `datasets`.

CSV cells are text and have a line; `datasets` would guess numbers and turn the answer `None` into
null. Arrow gives every nested object the keys of all others, as nulls, and cannot tell them from
nulls that somebody wrote: keys of nested objects that are null are removed, and rows in which one
was removed inside tool calls or tools are counted.
"""

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from sft_recipes.crash import is_network_down
from sft_recipes.data.reading.json_reader import Row, RowProblem, text_lines
from sft_recipes.data.reading.row_files import display_path, unreadable
from sft_recipes.errors import HubUnavailable, InputError, Problem

# Single rows are ten times slower, measured.
_BATCH_ROWS = 1000
# Below these keys a null may be an argument, or part of a tool's definition.
_TOOL_KEYS = ("tool_calls", "function_call", "tools", "functions")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
# Semicolons are what spreadsheets write where a comma is the decimal sign.
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


def csv_rows(path: Path, kind: str) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header.

    Raises InputError where the file cannot be cut into cells.

    A header without a comma and with semicolons or tabs says that the cells of a CSV file are
    separated by those.
    """
    name = display_path(path)
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 kB
    delimiter = _DELIMITERS[kind]
    lines = text_lines(path)
    first_line = next(lines, "")
    for other in _DELIMITER_NAMES:
        if delimiter not in first_line and other in first_line:
            delimiter = other
    reader = csv.reader(chain([first_line], lines), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or "" in header:
            what = "empty or repeated column names"
            raise InputError(Problem(f"{name}:1", "", what, "name each column once"))
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield Row(line, dict(zip(header, cells, strict=True)), "")
            elif cells:
                what = f"{len(cells)} cells where the header names {len(header)} columns"
                fix = f"quote cells that hold {_DELIMITER_NAMES[delimiter]} or line breaks"
                yield Row(line, RowProblem("", what, fix), delimiter.join(cells))
            # A row begins where the one before ended, and may have several lines.
            line = reader.line_num + 1
    except csv.Error as error:
        where = f"{name}:{reader.line_num}"
        what = f"invalid CSV ({error})"
        raise InputError(Problem(where, "", what, "repair the quoting there")) from error


class TableRows(Iterator[Row]):
    """The rows of batches of columns.

    `nulls_removed` counts those that lost a null in tool calls or tools so far.
    """

    def __init__(self, batches: Iterable[Mapping[str, list[Any]]]) -> None:
        self.nulls_removed = 0
        self._rows = self._read(batches)

    def __next__(self) -> Row:
        return next(self._rows)

    def _read(self, batches: Iterable[Mapping[str, list[Any]]]) -> Iterator[Row]:
        for batch in batches:
            for cells in zip(*batch.values(), strict=True):
                yield Row(None, self._values(tuple(batch), cells), "")

    def _values(self, names: tuple[str, ...], cells: tuple[Any, ...]) -> dict[str, Any]:
        removed: list[str] = []
        row: dict[str, Any] = {}
        for name, cell in zip(names, cells, strict=True):
            row[name] = _without_nulls(cell, name in _TOOL_KEYS, removed)
        self.nulls_removed += bool(removed)
        return row


def _without_nulls(value: Any, is_in_tools: bool, removed: list[str]) -> Any:
    """The value without null keys.

    Those that stood in tool calls or tools are added to `removed`.
    """
    if isinstance(value, list):
        return [_without_nulls(item, is_in_tools, removed) for item in value]
    if not isinstance(value, dict):
        return value
    values: dict[str, Any] = {}
    for key, item in value.items():
        if item is not None:
            values[key] = _without_nulls(item, is_in_tools or key in _TOOL_KEYS, removed)
        elif is_in_tools:
            removed.append(key)
    return values


def arrow_file_rows(path: Path, kind: str) -> TableRows:
    """The rows of a Parquet or Arrow file, which is read in place, batch by batch."""
    return TableRows(_file_batches(path, kind))


def _file_batches(path: Path, kind: str) -> Iterator[Mapping[str, list[Any]]]:
    from pyarrow import ArrowException

    name = display_path(path)
    try:
        if not path.stat().st_size:
            raise InputError(Problem(name, "", "the file is empty", "write it again"))
        batches = _ipc_batches(path)
        if kind == "parquet":
            batches = _parquet_batches(path)
        for batch in batches:
            names = batch.schema.names
            if len(set(names)) != len(names):
                what = "repeated column names"
                raise InputError(Problem(name, "", what, "name each column once"))
            columns: dict[str, list[Any]] = {}
            for column_name, column in zip(names, batch.columns, strict=True):
                columns[column_name] = column.to_pylist(maps_as_pydicts="strict")
            yield columns
    except OSError as error:
        raise unreadable(name, error) from error
    except (ArrowException, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        what = f"this is no {kind.capitalize()} file that can be read ({reason})"
        raise InputError(Problem(name, "", what, "copy or write the file again")) from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _ipc_batches(path: Path) -> Iterator[Any]:
    """The batches of either Arrow format: `datasets`' stream, or the file with an index."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_indexed = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_indexed:
            table = pa.ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)


def hub_rows(path: str, name: str | None, data_files: Any, split: str) -> TableRows:
    """The rows of one split of a Hub set."""
    return TableRows(_hub_batches(path, name, data_files, split))


def _hub_batches(
    path: str, name: str | None, data_files: Any, split: str
) -> Iterator[Mapping[str, list[Any]]]:
    import datasets  # takes a second, and files never need it
    from pyarrow import ArrowException

    try:
        rows = datasets.load_dataset(path, name, data_files=data_files, split=split)
        yield from rows.iter(batch_size=_BATCH_ROWS)
    except (datasets.exceptions.DatasetsError, ArrowException, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        if is_network_down(error):
            what = f"no file here, and the Hub did not answer ({reason})"
            fix = "check the path, or the network and run it again"
            raise HubUnavailable(str(Problem(path, "", what, fix))) from error
        fix = (
            "check the path or name, `name` and `split`, the network "
            "and, for a private set, `hf auth login`"
        )
        what = f"neither files here nor a data set we can read ({reason})"
        raise InputError(Problem(path, "", what, fix)) from error
