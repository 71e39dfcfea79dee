"""Files of rows: which kinds there are, which files stand behind a data set, and how one is opened.

A file is opened by its exact path, also where its name holds characters that are patterns elsewhere
(`run[1]`).
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.recipe import DatasetSource

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")
_TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
# What reading a file may raise besides what is wrong with its rows: no permission, a torn or
# foreign archive.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_SPLIT_FILE = re.compile(
    r"(?P<split>\w[\w.]*?)"
    r"(?:-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?)?"  # a shard, in older data sets with a hash
    rf"\.(?:{'|'.join(KINDS)})(?:\.(?:gz|bz2|xz|zst))?"
)


def _open_zstd(path: Path) -> Any:
    import pyarrow  # takes a moment, and other files do without it

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def display_path(path: Path) -> str:
    """The path as messages show it: relative below the working directory, else as it was given."""
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)


def file_kind(path: Path) -> str | None:
    """One of `KINDS` by the name of the file, `.jsonl.gz` and its like included.

    None for any other file.
    """
    known: Sequence[str] = KINDS
    if path.suffix.lower() in _OPENERS:
        known = _TEXT_KINDS
        path = path.with_suffix("")
    kind = path.suffix.lower().removeprefix(".")
    if kind not in known:
        return None
    return kind


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, unpacked where its name says that it is packed."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    return opener(path)


def unreadable(name: str, error: Exception) -> InputError:
    """The error for a file that cannot be opened, or read to its end."""
    if isinstance(error, PermissionError):
        what = "permission denied"
        fix = f"give yourself the right to read it, as in `chmod u+r {name}`"
        return InputError(Problem(name, "", what, fix))
    first_line = str(error).partition("\n")[0]
    reason = getattr(error, "strerror", None) or first_line or type(error).__name__
    what = f"cannot be read to its end ({reason})"
    return InputError(Problem(name, "", what, "copy or download the file again"))


def source_files(source: DatasetSource, split: str | None = None) -> list[Path]:
    """The local files behind one split of a source, in reading order; empty for a Hub name.

    Raises InputError, with the alternatives, where a file or split does not exist or cannot be read
    here.
    """
    split = split or source.split
    try:
        splits = _local_splits(source)
    except PermissionError as error:
        raise unreadable(source.path, error) from error
    if splits is None:
        return []
    if source.name is not None:
        what = "local files have no configurations"
        raise InputError(Problem(source.path, "name", what, "remove `name`"))
    files = splits.get(split)
    if not files:
        what = f"there is no split {split!r} (found: {', '.join(sorted(splits)) or 'none'})"
        fix = (
            "use a folder or `data_files` with files for each split, "
            "or hold rows out with `eval_split`"
        )
        raise InputError(Problem(source.path, "split", what, suggest(split, splits, fix)))
    for file in files:
        if file_kind(file) is None:
            what = f"cannot read files of type {file.suffix or 'none'!r}"
            known = ", ".join(f".{kind}" for kind in KINDS)
            raise InputError(Problem(display_path(file), "", what, f"convert it to one of {known}"))
    return files


def _local_splits(source: DatasetSource) -> dict[str, list[Path]] | None:
    """The files of each split; None for a Hub name."""
    path = Path(source.path).expanduser()
    is_folder = path.is_dir()
    if source.data_files is not None:
        if is_folder:
            return _named_files(source.data_files, path)
        if source.path in KINDS:
            # A bare file type is the path of a source whose files are all named, as in
            # `load_dataset("json", data_files=...)`.
            return _named_files(source.data_files, Path())
    if is_folder:
        return _files_by_split(path)
    if path.is_file():
        return {"train": [path]}
    if path.exists():
        what = "this is no file but a pipe or a device, and rows are read more than once"
        raise InputError(Problem(str(path), "", what, "write the rows into a file first"))
    looks_local = source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1
    if looks_local or file_kind(path) is not None:
        raise _no_such_file(path)
    return None


def _named_files(data_files: Any, folder: Path) -> dict[str, list[Path]]:
    """The files that `data_files` names for each split: paths or glob patterns below `folder`."""
    if not isinstance(data_files, Mapping):
        data_files = {"train": data_files}
    splits: dict[str, list[Path]] = {}
    for split, patterns in data_files.items():
        if isinstance(patterns, str):
            patterns = [patterns]
        for pattern in patterns:
            files = _matching_files(folder, Path(pattern).expanduser())
            splits.setdefault(split, []).extend(files)
    return splits


def _matching_files(folder: Path, pattern: Path) -> list[Path]:
    """The files that a pattern below a folder names.

    What exists under its very name is meant, whatever it holds.
    """
    path = folder / pattern
    if path.is_file():
        return [path]
    home = folder
    if pattern.is_absolute():
        home = Path(pattern.anchor)
    rest = list(pattern.relative_to(pattern.anchor).parts)
    while rest and (home / rest[0]).is_dir():
        home /= rest.pop(0)
    matches: list[Path] = []
    if rest:
        matches = sorted(home.glob(str(Path(*rest))))
    if not matches:
        raise _no_such_file(path)
    return matches


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split: made by `save_to_disk`, or `<split>.<suffix>`, or shards."""
    if (folder / "state.json").is_file():
        return {"train": sorted(folder.glob("data-*.arrow"))}
    splits: dict[str, list[Path]] = {}
    if (folder / "dataset_dict.json").is_file():
        for state in folder.glob("*/state.json"):
            splits[state.parent.name] = sorted(state.parent.glob("data-*.arrow"))
        return splits
    home = folder / "data"
    if not home.is_dir():
        home = folder
    for path in sorted(home.iterdir()):
        match = _SPLIT_FILE.fullmatch(path.name)
        if match is not None and path.is_file():
            splits.setdefault(match["split"], []).append(path)
    for split, files in splits.items():
        if len({"".join(file.suffixes) for file in files}) > 1:
            names = ", ".join(file.name for file in files)
            what = f"split {split!r} is there in several types: {names}"
            raise InputError(Problem(display_path(folder), "", what, "keep one of them"))
    if not splits and file_kind(folder) is not None:
        raise _folder_named_like_a_file(folder)
    return splits


def _folder_named_like_a_file(folder: Path) -> InputError:
    """The error for what Spark and its like write: a folder `train.parquet` with parts in it."""
    kind = file_kind(folder)
    suffixes = [part.suffix for part in folder.iterdir() if file_kind(part) is not None]
    if not suffixes:
        what = f"this is a folder, and no file of it is {kind}"
        return InputError(Problem(str(folder), "", what, "name a file"))
    what = "this is a folder, named like a file"
    entry = f"{{path: {folder}, data_files: '*{min(suffixes)}'}}"
    fix = f"name the parts, as in `datasets: [{entry}]`"
    return InputError(Problem(str(folder), "", what, fix))


def _no_such_file(path: Path) -> InputError:
    names: list[str] = []
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if file_kind(entry) is not None or entry.is_dir():
                names.append(entry.name)
    fix = suggest(path.name, names, "check the path")
    return InputError(Problem(str(path), "", "no such file or folder", fix))
