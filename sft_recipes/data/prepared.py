"""The folder of prepared rows: its files, and how a run loads them.

The shards `train-00000.arrow`, and `test-00000.arrow`, and so on have the columns of `row_table.py`;
`manifest.json` has the fingerprint of everything the ids depend on; `dropped.jsonl` and
`rejects.jsonl` are there where rows were lost; `eval_examples.jsonl` holds held-out conversations
that generation is tried on, and `check_examples.jsonl` training conversations that the checks look
at. All ranks load the folder, none tokenizes again; a copy of it serves machines that have neither
the sources nor a network.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from sft_recipes import run_folder
from sft_recipes.data.kept_examples import read_examples
from sft_recipes.data.mixture import RowsByDataSet, data_set_names, mix, rows_by_data_set
from sft_recipes.data.prompt_groups import joined_groups
from sft_recipes.data.row_table import Integers, column
from sft_recipes.data.splits import Split, draw_split
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import Recipe
from sft_recipes.text_files import interpreting

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
TRAIN = "train"
TEST = "test"
JOINED = "joined_groups.npy"
EVAL_EXAMPLES = "eval_examples.jsonl"
CHECK_EXAMPLES = "check_examples.jsonl"
DROPPED = "dropped.jsonl"
REJECTS = "rejects.jsonl"
# What must be as the manifest says, beside the shards.
FILES = (JOINED, EVAL_EXAMPLES, CHECK_EXAMPLES)


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for the trainer. `train` and `eval` hold input_ids and labels.

    `summary` is what `data.json` says. `eval_examples` are held-out conversations; `check_examples`
    up to 200 training ones, every structure among them. `fingerprints`: one number for each
    training row, in their order (`row_fingerprint.py`). `held_out`: the rows of `eval` by data set,
    where they are of several.
    """

    folder: Path
    train: Dataset
    eval: Dataset | None
    eval_examples: Sequence[Example]
    check_examples: Sequence[Example]
    summary: Mapping[str, Any]
    fingerprints: Integers
    held_out: RowsByDataSet | None = None


def load_prepared(recipe: Recipe, folder: Path) -> PreparedData:
    """Load a prepared folder and draw the recipe's split and mixture from it.

    Raises InputError if the folder is not whole.
    """
    if not (folder / MANIFEST).is_file():
        fix = "run `sft-recipes prepare` first; all machines of a run must see its output_dir"
        raise InputError(Problem(str(folder), MANIFEST, "no such file", fix))
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    rows = open_table(folder, TRAIN)
    test_rows = None
    if recipe.data.test_split:
        test_rows = open_table(folder, TEST)
    joined = np.load(folder / JOINED, allow_pickle=False)
    split = draw_split(recipe, rows, test_rows, joined)

    sources = column(rows, "source")[split.trained]
    mixture = mix(recipe.data.datasets, sources, recipe.data.seed, recipe.data.max_rows)
    trained = split.trained[mixture]
    summary = {
        **manifest,
        "train": _counts(rows, trained),
        "eval": None,
    }
    names = data_set_names(recipe.data.datasets)
    if len(names) > 1:
        summary["mixture"] = {
            name: _counts(rows, trained[sources[mixture] == number])
            for number, name in enumerate(names)
        }
    eval_rows = None
    held_out = None
    if len(split.held_out):
        summary["eval"] = _counts(split.table, split.held_out)
        eval_rows = _rows_for_trainer(split.table, split.held_out)
        held_out = rows_by_data_set(split.table, split.held_out, names)
        if len(held_out.present()) == 1:
            held_out = None
    return PreparedData(
        folder=folder,
        train=_rows_for_trainer(rows, trained),
        eval=eval_rows,
        eval_examples=_held_out_examples(folder / EVAL_EXAMPLES, split, joined),
        check_examples=[grouped.example for grouped in read_examples(folder / CHECK_EXAMPLES)],
        summary=summary,
        fingerprints=column(rows, "fingerprint")[trained],
        held_out=held_out,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a prepared folder says. Raises InputError if it is damaged."""
    path = folder / MANIFEST
    fix = f"delete {path}: the rows are prepared again"
    manifest = run_folder.read_json(path, fix)
    with interpreting(path, fix):
        for name, (size, sha256) in manifest["files"].items():
            if not isinstance(size, int) or not isinstance(sha256, str):
                raise TypeError(f"files: {name}")
            if Path(name).name != name:
                raise ValueError(f"files: {name} is no name of a file")
        for entry in manifest["inputs"]["data"]:
            if not isinstance(entry, list):
                raise TypeError("inputs: data")
    return manifest


def open_table(folder: Path, table: str) -> Dataset:
    """All rows of a table (`TRAIN`, `TEST`) of a prepared folder, in their order, memory-mapped."""
    names = [name for name in read_manifest(folder)["files"] if is_shard(name, table)]
    return concatenate_datasets([Dataset.from_file(str(folder / name)) for name in names])


def is_shard(file: str, table: str = f"(?:{TRAIN}|{TEST})") -> bool:
    """Whether a file of this name holds rows of the table, or of either."""
    return re.fullmatch(rf"{table}-\d{{5,}}\.arrow", file) is not None


def _rows_for_trainer(table: Dataset, chosen: Integers) -> Dataset:
    return table.select(chosen).select_columns(["input_ids", "labels"])


def _counts(rows: Dataset, chosen: Integers) -> dict[str, int]:
    tokens = column(rows, "tokens")[chosen]
    trained = column(rows, "trained_tokens")[chosen]
    return {
        "rows": len(chosen),
        "tokens": int(tokens.sum()),
        "trained_tokens": int(trained.sum()),
        "longest": int(tokens.max(initial=0)),
    }


def _held_out_examples(path: Path, split: Split, joined: Integers) -> list[Example]:
    """The examples of the file whose prompts are held out."""
    if not len(split.groups):
        return []
    kept = read_examples(path)
    groups = np.array([grouped.group for grouped in kept], dtype=np.int64)
    is_held_out = np.isin(joined_groups(groups, joined), split.groups)
    return [kept[index].example for index in np.flatnonzero(is_held_out)]


def check_files(folder: Path, manifest: Mapping[str, Any], whole: bool = False) -> None:
    """Refuse files that are not those of the manifest, by size or, where `whole`, by hash."""
    for name, expected in manifest["files"].items():
        if not is_as_expected(folder / name, expected, whole):
            what = "missing, cut off or changed since it was prepared"
            fix = "copy the folder again, or remove its manifest.json and prepare again"
            raise InputError(Problem(str(folder / name), "", what, fix))


def is_as_expected(path: Path, expected: Sequence[Any], whole: bool) -> bool:
    """Whether a file has the size, and where `whole` the hash, that the manifest says."""
    size, sha256 = expected
    if not path.is_file() or path.stat().st_size != size:
        return False
    return not whole or file_sha256(path) == sha256


def size_and_hash(path: Path) -> list[Any]:
    """What a manifest says of a file: its size in bytes and its SHA-256."""
    return [path.stat().st_size, file_sha256(path)]


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
