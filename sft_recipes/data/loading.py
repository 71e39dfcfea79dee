"""From a recipe's data set to examples: files, folders and Hub sets, with every rejected row accounted for.

JSON is read by `json_reader`, CSV by the standard library (all cells are text and have a line; `datasets` would guess
numbers and turn the answer `None` into null), Parquet, Arrow and Hub sets by `datasets`.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import RowFormat, convert_row, detect_format
from sft_recipes.data.json_reader import Row, RowProblem, append_json_lines, display_path, read_json_rows, text_lines
from sft_recipes.errors import SHOWN_PROBLEMS, InputError, Problem, suggest
from sft_recipes.messages import Example, place
from sft_recipes.recipe import DatasetSource, DataSettings

# Columns that evaluation reads where a data set has them.
EVALUATION_COLUMNS = ("task_type", "expected_format")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_SPLIT_FILE = re.compile(r"(\w[\w.]*?)(?:-\d{5}-of-\d{5})?\.(?:jsonl|json|csv|parquet|arrow)")


class RejectLog:
    """Counts rejected rows and unused columns, and decides at the end of each source whether that is acceptable.

    `on_bad_rows: error` raises InputError with the first 20 problems and the total of the whole pass. `skip` writes
    every rejected row to `path` (JSON Lines: source, line, row, reason, raw; an older file is replaced), or without a
    path keeps it in `rows`, and raises where more than `max_rejected` of the rows are rejected, or all of them.
    """

    def __init__(self, settings: DataSettings, path: Path | None = None) -> None:
        self._settings, self._path = settings, path
        self._problems: list[Problem] = []
        self.rejected: dict[str, Counter[str]] = {}  # source -> reason -> rows, of the last pass
        self.unused_columns: dict[str, list[str]] = {}  # the same
        self.formats: dict[str, str] = {}  # source -> format
        self.rows: list[dict[str, Any]] = []
        if path is not None:
            path.unlink(missing_ok=True)

    def _begin(self, source: str) -> None:
        self._problems, self.rejected[source], self.unused_columns[source] = [], Counter(), []

    def _add(self, source: str, file: str, row: int, line: int | None, error: RowProblem, raw: str) -> None:
        reason = ": ".join(part for part in (error.field, error.what) if part)
        self.rejected[source][re.sub(r"\d+", "N", reason)] += 1
        if len(self._problems) < SHOWN_PROBLEMS:
            self._problems.append(error.at(place(file, row, line)))
        if self._settings.on_bad_rows == "skip":
            entry = {"source": file, "line": line, "row": row, "reason": reason, "raw": raw}
            if self._path is None:
                self.rows.append(entry)
            else:
                append_json_lines(self._path, [entry])

    def _finish(self, source: str, total: int) -> None:
        reasons, limit = self.rejected[source], self._settings.max_rejected
        rejected = reasons.total()
        if not total:
            raise InputError(Problem(source, "", "no rows", "write at least one row"))
        if rejected and self._settings.on_bad_rows == "error":
            raise InputError(self._problems, total=rejected)
        if rejected / total > limit or rejected == total:
            table = "\n".join(f"{count:8} x {reason}" for reason, count in reasons.most_common(SHOWN_PROBLEMS))
            what = f"{rejected} of {total} rows are rejected, the limit is {limit:.4g} of them:\n{table}"
            raise InputError(Problem(source, "max_rejected", what, "repair the rows or raise `max_rejected`"))


def iter_examples(
    source: DatasetSource,
    settings: DataSettings,
    rejects: RejectLog,
    split: str | None = None,
    columns: Sequence[str] = (),
) -> Iterator[Example]:
    """Yield the examples of one source in order; rows that are none go to `rejects`.

    `split` overrides the source's own; `columns` are further columns to keep on the examples. The format is detected
    from the first readable row unless the source names one. Raises InputError for a source that cannot be read.
    Exhaust it: what `rejects` does not accept is raised only behind the last row, never to a caller that stops early.
    """
    name, mapping, total = source.path, source.column_mapping, 0
    format, used = None, set[str]()
    rejects._begin(name)
    unused = rejects.unused_columns[name]
    for file, rows in open_rows(source, split or source.split):
        for row, (line, found, text) in enumerate(rows):
            total += 1
            try:
                if isinstance(found, RowProblem):
                    raise found
                asked = found if source.columns is None else source.columns
                values = {column: value for column, value in found.items() if column in asked}
                if format is None:
                    detected = source.format or detect_format(values, mapping, place(file, row, line))
                    format = RowFormat(detected, mapping, columns, settings.allow_empty_output)
                    format.check(name)
                    rejects.formats[name], used = detected, format.used_columns()
                unused += [column for column in values if column not in used and column not in unused]
                yield convert_row(values, format, file, row, line)
            except RowProblem as error:
                rejects._add(name, file, row, line, error, text or json.dumps(found, ensure_ascii=False, default=str))
    rejects._finish(name, total)


def read_held_out(sources: Sequence[DatasetSource], settings: DataSettings) -> list[Example]:
    """The conversations of sources that are only evaluated. Raises InputError for bad rows, as training does."""
    log = RejectLog(settings)
    return [row for one in sources for row in iter_examples(one, settings, log, columns=EVALUATION_COLUMNS)]


def source_files(source: DatasetSource, split: str | None = None) -> list[Path]:
    """The local files behind one split of a source, in reading order; empty for a Hub name.

    Raises InputError, with the alternatives, where a file or split does not exist or cannot be read here.
    """
    path, split = Path(source.path).expanduser(), split or source.split
    # A bare file type is the path of a source whose files are all named, as in `load_dataset("json", data_files=...)`.
    if source.data_files is not None and (path.is_dir() or f".{source.path}" in _SUFFIXES):
        splits = _named_files(source.data_files, path if path.is_dir() else Path())
    elif path.is_dir():
        splits = _files_by_split(path)
    elif path.is_file():
        splits = {"train": [path]}
    elif source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1 or path.suffix in _SUFFIXES:
        raise _no_such_file(path)
    else:
        return []
    if source.name is not None:
        raise InputError(Problem(source.path, "name", "local files have no configurations", "remove `name`"))
    if not splits.get(split):
        what = f"there is no split {split!r} (found: {', '.join(sorted(splits)) or 'none'})"
        fix = "use a folder or `data_files` with files for each split, or hold rows out with `eval_split`"
        raise InputError(Problem(source.path, "split", what, suggest(split, splits, fix)))
    for file in splits[split]:
        if file.suffix.lower() not in _SUFFIXES:
            what = f"cannot read files of type {file.suffix or 'none'!r}"
            raise InputError(Problem(display_path(file), "", what, f"convert it to one of {', '.join(_SUFFIXES)}"))
    return splits[split]


def _named_files(data_files: Any, folder: Path) -> dict[str, list[Path]]:
    """The files that `data_files` names for each split: paths or glob patterns below `folder`."""
    splits: dict[str, list[Path]] = {}
    for split, patterns in (data_files if isinstance(data_files, Mapping) else {"train": data_files}).items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            path = folder / Path(pattern).expanduser()
            root = Path(path.anchor)
            matches = [path] if path.is_file() else sorted(root.glob(str(path.relative_to(root))))
            if not matches:
                raise _no_such_file(path)
            splits.setdefault(split, []).extend(matches)
    return splits


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder made by `save_to_disk`, or named `<split>.<suffix>` with or without shards."""
    if (folder / "state.json").is_file():
        return {"train": sorted(folder.glob("data-*.arrow"))}
    if (folder / "dataset_dict.json").is_file():
        return {state.parent.name: sorted(state.parent.glob("data-*.arrow")) for state in folder.glob("*/state.json")}
    splits: dict[str, list[Path]] = {}
    for path in sorted((folder / "data" if (folder / "data").is_dir() else folder).iterdir()):
        if match := _SPLIT_FILE.fullmatch(path.name):
            splits.setdefault(match[1], []).append(path)
    for split, files in splits.items():
        if len({file.suffix for file in files}) > 1:
            what = f"split {split!r} is there in several types: {', '.join(file.name for file in files)}"
            raise InputError(Problem(display_path(folder), "", what, "keep one of them"))
    return splits


def _no_such_file(path: Path) -> InputError:
    near = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [entry.name for entry in near if entry.suffix in _SUFFIXES or entry.is_dir()]
    return InputError(Problem(str(path), "", "no such file or folder", suggest(path.name, names, "check the path")))


def open_rows(source: DatasetSource, split: str) -> Iterator[tuple[str, Iterator[Row]]]:
    """The files of a source, or the Hub set, each with the name that messages show and its rows."""
    files = source_files(source, split)
    for file in files:
        name, kind = display_path(file), file.suffix.lower()
        if kind in (".json", ".jsonl"):
            yield name, read_json_rows(file)
        elif kind == ".csv":
            yield name, _csv_rows(file)
        else:  # Streaming reads the file in place; the other way copies it into a cache first.
            yield name, _table_rows(name, kind[1:], data_files=[str(file)], split="train", streaming=True)
    if not files:
        yield source.path, _table_rows(source.path, source.path, source.name, data_files=source.data_files, split=split)


def _csv_rows(path: Path) -> Iterator[Row]:
    name = display_path(path)
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 kB
    reader = csv.reader(text_lines(path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or "" in header:
            raise InputError(Problem(f"{name}:1", "", "empty or repeated column names", "name each column once"))
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True)), ""
            elif cells:
                what = f"{len(cells)} cells where the header names {len(header)} columns"
                yield line, RowProblem("", what, "quote cells that hold commas or line breaks"), ",".join(cells)
    except csv.Error as error:
        problem = Problem(f"{name}:{reader.line_num}", "", f"invalid CSV ({error})", "repair the quoting there")
        raise InputError(problem) from error


def _table_rows(name: str, *path: str | None, **options: Any) -> Iterator[Row]:
    """The rows of what `datasets.load_dataset` loads, a batch at a time (single rows are ten times slower)."""
    import datasets  # takes a second, and JSON never needs it
    from pyarrow import ArrowException

    try:
        for batch in datasets.load_dataset(*path, **options).iter(batch_size=1000):
            for cells in zip(*batch.values(), strict=True):
                yield None, dict(zip(batch, map(_without_nulls, cells), strict=True)), ""
    except (datasets.exceptions.DatasetsError, ArrowException, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        fix = "check the path or name, `name` and `split`, the network and, for a private set, `hf auth login`"
        raise InputError(Problem(name, "", f"neither files here nor a data set we can read ({reason})", fix)) from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every nested object the keys of all others, as nulls: tool calls would get foreign arguments."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
