"""From a recipe's data set to examples: files, folders and Hub sets, no row unaccounted for."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import RowConverter, RowFormat, detect_format
from sft_recipes.data.reading.column_values import as_list, first_step
from sft_recipes.data.reading.columns import recognise, refuse_second_candidates
from sft_recipes.data.reading.json_reader import Row, RowProblem, read_json_rows
from sft_recipes.data.reading.known_formats import FORMATS
from sft_recipes.data.reading.rejects import RejectLog
from sft_recipes.data.reading.row_files import (
    READ_ERRORS,
    display_path,
    file_kind,
    source_files,
    unreadable,
)
from sft_recipes.data.reading.tables import TableRows, arrow_file_rows, csv_rows, hub_rows
from sft_recipes.data.reading.turn_keys import TurnKeys
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import Example, place
from sft_recipes.recipe import DatasetSource, DataSettings

__all__ = [
    "EVALUATION_COLUMNS",
    "RejectLog",
    "iter_examples",
    "open_rows",
    "read_held_out",
    "source_files",
]

# Makes the values of a row that is read out of those that stand in the file.
Completion = Callable[[Mapping[str, Any]], dict[str, Any]]
# Columns that evaluation reads where a data set has them.
EVALUATION_COLUMNS = ("task_type", "expected_format")


def iter_examples(
    source: DatasetSource,
    settings: DataSettings,
    rejects: RejectLog,
    split: str | None = None,
    columns: Sequence[str] = (),
    complete: Completion | None = None,
) -> Iterator[Example]:
    """Yield the examples of one source in order; rows that are none go to `rejects`.

    `split` overrides the source's own; `columns` are further columns to keep on the examples;
    `complete` changes the values of a row before they are read. The format is detected from the
    first readable row unless the source names one. Raises InputError for a source that cannot be
    read. Exhaust it: what `rejects` does not accept is raised only behind the last row, never to a
    caller that stops early.
    """
    name = source.path
    total = 0
    rejects.begin(name)
    reader = _SourceReader(source, settings, rejects, columns, complete)
    for file, rows in open_rows(source, split or source.split):
        try:
            for number, row in enumerate(rows):
                total += 1
                try:
                    if isinstance(row.content, RowProblem):
                        raise row.content
                    yield reader.convert(row.content, file, number, row.line)
                except RowProblem as error:
                    raw = row.text or json.dumps(row.content, ensure_ascii=False, default=str)
                    rejects.add(name, file, number, row.line, error, raw)
        finally:  # a caller may stop early
            if isinstance(rows, TableRows):
                rejects.nulls_removed[name] += rows.nulls_removed
    reader.check_columns()
    rejects.finish(name, total)
    reader.check_settings()


def read_held_out(sources: Sequence[DatasetSource], settings: DataSettings) -> list[Example]:
    """The conversations of sources that are only evaluated.

    Raises InputError for bad rows, as training does.
    """
    log = RejectLog(settings)
    examples: list[Example] = []
    for source in sources:
        examples += iter_examples(source, settings, log, columns=EVALUATION_COLUMNS)
    return examples


class _SourceReader:
    """Reads the rows of one source.

    The first row decides on the format, each new set of columns on what they are.
    """

    def __init__(
        self,
        source: DatasetSource,
        settings: DataSettings,
        rejects: RejectLog,
        columns: Sequence[str],
        complete: Completion | None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._rejects = rejects
        self._extra = columns
        self._complete = complete
        self._converters: dict[tuple[str, ...], RowConverter] = {}
        self._format: RowFormat | None = None
        self._recognised: dict[str, str] = {}
        self._seen: set[str] = set()

    def convert(self, cells: dict[str, Any], file: str, row: int, line: int | None) -> Example:
        """The example of a row.

        Raises RowProblem for a row that is none, InputError for columns that fit no format.
        """
        asked = self._source.columns
        values = cells
        if asked is not None:
            values = {name: cells[name] for name in cells if name in asked}
        if self._complete is not None:
            values = self._complete(values)
        shape = tuple(values)
        converter = self._converters.get(shape)
        if converter is None:
            self._seen.update(cells)
            if asked and not values:
                self.check_columns()
            converter = self._converter(values, place(file, row, line))
            self._converters[shape] = converter
        return converter.convert(values, file, row, line)

    def check_settings(self) -> None:
        """Raise InputError for a key of turns in the settings that no row has."""
        if self._format is not None:
            self._format.keys.check_seen(self._source.path)

    def check_columns(self) -> None:
        """Raise InputError for a column that the user names and no row has."""
        named = [("columns", column) for column in self._source.columns or ()]
        for paths in self._source.column_mapping.values():
            named += [("column_mapping", first_step(path)) for path in as_list(paths)]
        for key, column in named:
            is_there = column in self._seen or any(
                name.startswith(f"{column}.") for name in self._seen
            )
            if self._seen and not is_there:
                fix = suggest(column, self._seen, f"use one of {', '.join(sorted(self._seen))}")
                what = f"no row has a column {column!r}"
                raise InputError(Problem(self._source.path, key, what, fix))

    def _converter(self, values: Mapping[str, Any], where: str) -> RowConverter:
        """What converts rows with the columns of this one."""
        source = self._source
        name = source.path
        is_first = self._format is None
        if self._format is None:
            format = source.format or detect_format(values, source.column_mapping, where)
            keys = TurnKeys(
                source.message_mapping, source.role_mapping, source.consecutive_turns == "merge"
            )
            empty = self._settings.allow_empty_output
            self._format = RowFormat(format, source.column_mapping, self._extra, empty, {}, keys)
            self._format.check(name)
            self._rejects.formats[name] = format
        recognised = self._recognise(values, where, self._format, is_first)
        format_here = dataclasses.replace(self._format, recognised=recognised)
        used = format_here.used_columns()
        for column in values:
            unused = self._rejects.unused_columns[name]
            if column in EVALUATION_COLUMNS:
                unused = self._rejects.evaluation_columns[name]
            if column not in used and column not in unused:
                unused.append(column)
        return RowConverter(tuple(values), format_here)

    def _recognise(
        self, values: Mapping[str, Any], where: str, format: RowFormat, is_first: bool
    ) -> dict[str, str]:
        """The columns of this row that are read under other names than our own.

        The first row says which columns hold the question and the answer; later ones may add what
        goes with them.
        """
        known_format = FORMATS[format.name]
        mapping = {**self._recognised, **format.column_mapping}
        known = {column: name for column, name in self._recognised.items() if name in values}
        wanted = known_format.other_columns
        if is_first:
            wanted = (*known_format.required, *wanted)
        try:
            known |= recognise(values, format.name, mapping, where, wanted)
            if self._source.format is None:
                refuse_second_candidates(values, format.name, {**mapping, **known}, where)
        except InputError as error:
            if is_first:
                raise
            (problem,) = error.problems
            raise RowProblem(problem.field, problem.what, problem.fix) from error
        self._recognised |= known
        self._rejects.recognised[self._source.path] = dict(self._recognised)
        return known


def open_rows(source: DatasetSource, split: str) -> Iterator[tuple[str, Iterator[Row]]]:
    """The files of a source, or the Hub set, each with the name that messages show and its rows."""
    files = source_files(source, split)
    for file in files:
        yield display_path(file), _file_rows(file)
    if not files:
        yield source.path, hub_rows(source.path, source.name, source.data_files, split)


def _file_rows(file: Path) -> Iterator[Row]:
    kind = file_kind(file)
    if kind == "parquet" or kind == "arrow":
        return arrow_file_rows(file, kind)
    if kind == "csv" or kind == "tsv":
        return _guarded(file, lambda: csv_rows(file, kind))
    return _guarded(file, lambda: read_json_rows(file))


def _guarded(file: Path, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows; what reading the file raises becomes an InputError."""
    try:
        yield from rows()
    except READ_ERRORS as error:
        raise unreadable(display_path(file), error) from error
