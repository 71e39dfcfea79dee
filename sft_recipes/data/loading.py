"""From a recipe's data set to examples: files, folders and Hub sets, with every rejected row accounted for.

JSON is read by `json_reader`, CSV by the standard library (all cells are text and have a line; `datasets` would guess
numbers and turn the answer `None` into null), Parquet, Arrow and Hub sets by `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import RowProblem, check_mapping, convert_row, detect_format, unused_columns
from sft_recipes.data.json_reader import BadRow, SourceRow, display_path, read_json_rows, text_lines
from sft_recipes.errors import SHOWN_PROBLEMS, InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, DataSettings

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
# `path` of a source whose files are all named in `data_files`, as in `load_dataset("json", data_files=...)`.
_BUILDERS = ("json", "csv", "parquet", "arrow")
_SPLIT_FILE = re.compile(r"(?P<split>\w[\w.]*?)(?:-\d{5}-of-\d{5})?\.(?:jsonl|json|csv|parquet|arrow)")

_Rows = Iterator[SourceRow | BadRow]


class RejectLog:
    """Counts rejected rows and unused columns, and decides at the end of each source whether that is acceptable.

    `on_bad_rows: error` raises InputError with the first 20 problems and the total of the whole pass. `skip` writes
    every rejected row to `path` (JSON Lines: source, line, row, reason, raw; an older file is replaced) and raises
    where more than `max_rejected` of the rows are rejected, or all of them.
    """

    def __init__(self, settings: DataSettings, path: Path | None = None) -> None:
        self._settings, self._path = settings, path
        self._problems: list[Problem] = []
        self.rejected: dict[str, Counter[str]] = {}  # source -> reason -> rows, of the last pass
        self.unused_columns: dict[str, list[str]] = {}
        self.formats: dict[str, str] = {}  # source -> format, where it was detected
        if path is not None:
            path.unlink(missing_ok=True)

    def _begin(self, source: str) -> None:
        self._problems = []
        self.rejected[source] = Counter()

    def _add(self, source: str, file: str, bad: BadRow) -> None:
        reason = ": ".join(part for part in (bad.problem.field, bad.problem.what) if part)
        self.rejected[source][re.sub(r"\d+", "N", reason)] += 1
        if len(self._problems) < SHOWN_PROBLEMS:
            self._problems.append(bad.problem)
        if self._settings.on_bad_rows == "skip" and self._path is not None:
            row = {"source": file, "line": bad.line, "row": bad.row, "reason": reason, "raw": bad.raw}
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row, ensure_ascii=False) + "\n")

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
    *,
    split: str | None = None,
    columns: Sequence[str] = (),
    rejects: RejectLog,
) -> Iterator[Example]:
    """Yield the examples of one source in order; rows that are none go to `rejects`.

    `split` overrides the source's own; `columns` are further columns to keep on the examples. The format is detected
    from the first readable row unless the source names one. Raises InputError for a source that cannot be read.
    Exhaust it: what `rejects` does not accept is raised only behind the last row, never to a caller that stops early.
    """
    name, mapping, format = source.path, source.column_mapping, source.format
    if format is not None:
        check_mapping(format, mapping, columns, name)
    convert = partial(
        convert_row, column_mapping=mapping, columns=columns, allow_empty_output=settings.allow_empty_output
    )
    seen: set[frozenset[str]] = set()
    total = 0
    rejects._begin(name)
    for file, rows in _open(source, split or source.split):
        for item in rows:
            total += 1
            if isinstance(item, BadRow):
                rejects._add(name, file, item)
                continue
            values = item.values
            if source.columns is not None:
                values = {column: value for column, value in values.items() if column in source.columns}
            if format is None:
                where = f"{file}:{item.line}" if item.line is not None else f"{file} row {item.row}"
                format = rejects.formats[name] = detect_format(values, mapping, where)
                check_mapping(format, mapping, columns, name)
            if (names := frozenset(item.values)) not in seen:
                seen.add(names)
                unused = rejects.unused_columns.setdefault(name, [])
                unused += [
                    column for column in unused_columns(values, format, mapping, columns) if column not in unused
                ]
            try:
                example = convert(values, format=format, source=file, row=item.row, line=item.line)
            except RowProblem as error:
                raw = json.dumps(item.values, ensure_ascii=False, default=str)
                rejects._add(name, file, BadRow(item.row, item.line, error.problem, raw))
                continue
            yield example
    rejects._finish(name, total)
    if absent := set(source.columns or ()).difference(*seen):
        what = f"no row has the column {min(absent)!r}"
        raise InputError(Problem(name, "columns", what, _suggest(min(absent), set().union(*seen))))


def source_files(source: DatasetSource, split: str | None = None) -> list[Path]:
    """The local files behind one split of a source, in reading order; empty for a Hub name.

    Raises InputError, with the alternatives, where a file or split does not exist or cannot be read here.
    """
    split = split or source.split
    path = Path(source.path).expanduser()
    if source.data_files is not None and (path.is_dir() or source.path in _BUILDERS):
        files = _named_files(source, path if path.is_dir() else Path(), split)
    elif path.is_dir():
        files = _split_files(path, split)
    elif path.is_file():
        files = [path]
        if split != "train":
            fix = "use a folder or `data_files` with one file per split, or hold rows out with `eval_split`"
            raise InputError(Problem(source.path, "split", f"one file alone is the split 'train', not {split!r}", fix))
    elif source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1 or path.suffix in _SUFFIXES:
        raise _no_such_file(path)
    else:
        return []
    if source.name is not None:
        raise InputError(Problem(source.path, "name", "local files have no configurations", "remove `name`"))
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            what = f"cannot read files of type {file.suffix or 'none'!r}"
            raise InputError(Problem(display_path(file), "", what, f"convert it to one of {', '.join(_SUFFIXES)}"))
    return files


def _named_files(source: DatasetSource, folder: Path, split: str) -> list[Path]:
    """The files that `data_files` names for a split: paths or glob patterns below `folder`."""
    given: Any = source.data_files
    patterns = _of_split(split, given if isinstance(given, Mapping) else {"train": given}, f"{source.path} data_files")
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = folder / Path(pattern).expanduser()
        root = Path(path.anchor)
        matches = [path] if path.is_file() else sorted(root.glob(str(path.relative_to(root))))
        if not matches:
            raise _no_such_file(path)
        files.extend(matches)
    return files


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder: made by `save_to_disk`, or named `<split>.<suffix>` with or without shards."""
    saved = {"train": folder} if (folder / "state.json").is_file() else {}
    if (folder / "dataset_dict.json").is_file():
        saved = {state.parent.name: state.parent for state in folder.glob("*/state.json")}
    splits = {name: sorted(place.glob("data-*.arrow")) for name, place in saved.items()}
    if not splits:
        folder = folder / "data" if (folder / "data").is_dir() else folder
        for path in sorted(folder.iterdir()):
            if match := _SPLIT_FILE.fullmatch(path.name):
                splits.setdefault(match["split"], []).append(path)
    files = _of_split(split, splits, display_path(folder))
    shards = re.search(r"-of-(\d{5})\.", files[0].name) if files else None
    expected = int(shards[1]) if shards else 1
    if len(files) != expected:
        what = f"split {split!r} needs {expected} file(s), found {', '.join(file.name for file in files)}"
        raise InputError(Problem(display_path(folder), "", what, "keep one complete set of files per split"))
    return files


def _of_split(split: str, splits: Mapping[str, Any], where: str) -> Any:
    if split not in splits:
        raise InputError(Problem(where, "split", f"there is no split {split!r}", _suggest(split, splits)))
    return splits[split]


def _no_such_file(path: Path) -> InputError:
    folder = path.parent
    if not folder.is_dir():
        return InputError(Problem(str(path), "", f"no such file, and no folder {folder}", "check the path"))
    names = [entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES or entry.is_dir()]
    return InputError(Problem(str(path), "", "no such file or folder", _suggest(path.name, names)))


def _suggest(name: str, names: Iterable[str]) -> str:
    """What to write instead: the closest known name, and the first ten of all."""
    known = sorted(names)
    shown = f"there are: {', '.join(known[:10])}{' ...' if len(known) > 10 else ''}" if known else "there are none"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? ({shown})" if close else f"choose one that exists ({shown})"


def _open(source: DatasetSource, split: str) -> Iterator[tuple[str, _Rows]]:
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


def _csv_rows(path: Path) -> _Rows:
    name = display_path(path)
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 kB
    reader = csv.reader(text_lines(path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or "" in header:
            raise InputError(Problem(f"{name}:1", "", "empty or repeated column names", "name each column once"))
        row, start = 0, reader.line_num + 1
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(header):
                yield SourceRow(row, line, dict(zip(header, cells, strict=True)))
            else:
                what = f"{len(cells)} cells where the header names {len(header)} columns"
                problem = Problem(f"{name}:{line}", "", what, "quote cells that hold commas or line breaks")
                yield BadRow(row, line, problem, ",".join(cells))
            row += 1
    except csv.Error as error:
        where = f"{name}:{reader.line_num}"
        raise InputError(Problem(where, "", f"invalid CSV ({error})", "repair the quoting there")) from error


def _table_rows(name: str, *path: str | None, **options: Any) -> _Rows:
    """The rows of what `datasets.load_dataset` loads, a batch at a time (single rows are ten times slower)."""
    import datasets  # takes a second, and JSON never needs it
    from huggingface_hub.errors import HFValidationError
    from pyarrow import ArrowException

    try:
        table = datasets.load_dataset(*path, **options)
    except ArrowException as error:
        what, fix = f"not a readable {path[0]} file ({error})", "write the file again"
        raise InputError(Problem(name, "", what, fix)) from error
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError, HFValidationError) as error:
        what = f"neither a file or folder here nor a data set the Hub gives us ({error})"
        fix = "check the spelling, the network and, for a private set, `hf auth login`"
        raise InputError(Problem(name, "", what, fix)) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        what = f"the Hub data set cannot be loaded ({error.__cause__ or error})"
        raise InputError(Problem(name, "", what, "check `name`, `split` and `data_files`")) from error
    row = 0
    for batch in table.iter(batch_size=1000):
        for cells in zip(*batch.values(), strict=True):
            yield SourceRow(row, None, dict(zip(batch, map(_without_nulls, cells), strict=True)))
            row += 1


def _without_nulls(value: Any) -> Any:
    """Arrow gives every nested object the keys of all others, as nulls: tool calls would get foreign arguments."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
