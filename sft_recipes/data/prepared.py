"""The folder of prepared rows: its files, and how a run loads them, draws its split and its mixture.

`train.arrow` (and `test.arrow`) have columns input_ids, labels, source, row, group, tokens, trained_tokens and
fingerprint; `manifest.json` has the fingerprint of everything the ids depend on; `dropped.jsonl` and `rejects.jsonl`
are there where rows were lost; `eval_examples.jsonl` holds held-out conversations that generation is tried on, and
`check_examples.jsonl` training conversations that the checks look at. All ranks load the folder, none tokenizes again;
a copy of it serves machines that have neither the sources nor a network.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sft_recipes import run_folder
from sft_recipes.data.mixture import Indices, mix, split_eval
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, place
from sft_recipes.recipe import Recipe

MANIFEST = "manifest.json"
TRAIN = "train.arrow"
TEST = "test.arrow"
JOINED = "joined_groups.npy"
EVAL_EXAMPLES = "eval_examples.jsonl"
CHECK_EXAMPLES = "check_examples.jsonl"
DROPPED = "dropped.jsonl"
REJECTS = "rejects.jsonl"
# What must be as the manifest says.
FILES = (TRAIN, TEST, JOINED, EVAL_EXAMPLES, CHECK_EXAMPLES)

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


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for the trainer. `train` and `eval` hold input_ids and labels; `summary` is what `data.json` says.

    `eval_examples` are held-out conversations; `check_examples` up to 200 training ones, every structure among them.
    `fingerprints`: one number for each training row, in their order (`row_fingerprint.py`).
    """

    folder: Path
    train: Dataset
    eval: Dataset | None
    eval_examples: Sequence[Example]
    check_examples: Sequence[Example]
    summary: Mapping[str, Any]
    fingerprints: Indices


@dataclass(frozen=True, slots=True)
class _Split:
    """Which rows are trained, and which of `table` are held out; `groups` are those of the held-out rows."""

    trained: Indices
    table: Dataset
    held_out: Indices
    groups: Indices


def load_prepared(recipe: Recipe, folder: Path) -> PreparedData:
    """Load a prepared folder and draw the recipe's split and mixture from it. Raises InputError if it is not whole."""
    if not (folder / MANIFEST).is_file():
        fix = "run `sft-recipes prepare` first; all machines of a run must see its output_dir"
        raise InputError(Problem(str(folder), MANIFEST, "no such file", fix))
    manifest = run_folder.read_json(folder / MANIFEST)
    check_files(folder, manifest)
    rows = Dataset.from_file(str(folder / TRAIN))
    joined = dict(np.load(folder / JOINED, allow_pickle=False).tolist())
    split = _draw_split(recipe, folder, rows, joined)

    sources = _column(rows, "source")[split.trained]
    mixture = mix(recipe.data.datasets, sources, recipe.data.seed, recipe.data.max_rows)
    trained = split.trained[mixture]
    held_out = _rows_for_trainer(split.table, split.held_out) if len(split.held_out) else None
    summary = {
        **manifest,
        "train": _counts(rows, trained),
        "eval": _counts(split.table, split.held_out) if len(split.held_out) else None,
    }
    return PreparedData(
        folder=folder,
        train=_rows_for_trainer(rows, trained),
        eval=held_out,
        eval_examples=_held_out_examples(
            folder / EVAL_EXAMPLES, set(split.groups.tolist()), joined
        ),
        check_examples=[example for _, example in _read_examples(folder / CHECK_EXAMPLES)],
        summary=summary,
        fingerprints=_column(rows, "fingerprint")[trained],
    )


def _draw_split(recipe: Recipe, folder: Path, rows: Dataset, joined: Mapping[int, int]) -> _Split:
    groups = _column(rows, "group")
    if joined:
        groups = np.array([joined.get(group, group) for group in groups.tolist()], dtype=np.int64)
    everything = np.arange(len(rows))
    nothing: Indices = np.empty(0, dtype=np.int64)
    if recipe.data.test_split:
        table = Dataset.from_file(str(folder / TEST))
        held_out_groups = _column(table, "group")
        _check_overlap(recipe, rows, groups, held_out_groups)
        return _Split(everything, table, np.arange(len(table)), held_out_groups)
    if recipe.data.eval_split:
        trained, held_out = split_eval(groups, recipe.data.eval_split)
        if not len(trained):
            fix = "make eval_split smaller"
            raise InputError(Problem(recipe.name, "eval_split", "no row is left to train", fix))
        return _Split(trained, rows, held_out, groups[held_out])
    return _Split(everything, rows, nothing, nothing)


def _rows_for_trainer(table: Dataset, chosen: Indices) -> Dataset:
    return table.select(chosen).select_columns(["input_ids", "labels"])


def _column(rows: Dataset, name: str) -> Indices:
    # At once: through a selection `datasets` gathers row by row, seven seconds for a million.
    return np.asarray(rows.data.column(name), dtype=np.int64)


def check_files(folder: Path, manifest: Mapping[str, Any], whole: bool = False) -> None:
    """Refuse files that are not those of the manifest, by size or, where `whole`, by hash."""
    for name, expected in manifest.get("files", {}).items():
        path = folder / name
        actual: list[Any] = []
        if path.is_file():
            actual = [path.stat().st_size, file_sha256(path) if whole else expected[1]]
        if actual != expected:
            fix = "copy the folder again, or remove its manifest.json and prepare again"
            raise InputError(
                Problem(str(path), "", "missing, cut off or changed since it was prepared", fix)
            )


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_overlap(
    recipe: Recipe, rows: Dataset, groups: Indices, held_out_groups: Indices
) -> None:
    """Raise InputError where a training row has the prompt of a row of the test split."""
    shared = np.isin(groups, held_out_groups)
    if not shared.any():
        return
    sources = _column(rows, "source")
    numbers = _column(rows, "row")
    what = f"the same prompt stands in the {recipe.data.test_split!r} split"
    fix = "remove it from one of them; an evaluation on trained prompts says nothing"
    problems: list[Problem] = []
    for index in np.flatnonzero(shared)[:20]:
        where = place(recipe.data.datasets[sources[index]].path, int(numbers[index]))
        problems.append(Problem(where, "dataset_test_split", what, fix))
    raise InputError(problems, total=int(shared.sum()))


def _counts(rows: Dataset, chosen: Indices) -> dict[str, int]:
    tokens = _column(rows, "tokens")[chosen]
    trained = _column(rows, "trained_tokens")[chosen]
    return {
        "rows": len(chosen),
        "tokens": int(tokens.sum()),
        "trained_tokens": int(trained.sum()),
        "longest": int(tokens.max(initial=0)),
    }


def _held_out_examples(path: Path, groups: set[int], joined: Mapping[int, int]) -> list[Example]:
    if not groups:
        return []
    return [
        example for group, example in _read_examples(path) if joined.get(group, group) in groups
    ]


def _read_examples(path: Path) -> list[tuple[int, Example]]:
    """Group and example of every line of a file that preparation wrote; none where there is no file."""
    if not path.is_file():
        return []
    examples: list[tuple[int, Example]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            group = entry.pop("group")
            examples.append((group, Example(**entry)))
    return examples
