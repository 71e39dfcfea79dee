"""From a recipe to token ids on disk: one streaming pass, memory bounded, every row accounted for.

The folder holds `train.arrow` (and `test.arrow`) with columns input_ids, labels, source, row, group, tokens,
trained_tokens and fingerprint; `manifest.json` with the fingerprint of everything the ids depend on; `dropped.jsonl`
and `rejects.jsonl` where rows were lost; `eval_examples.jsonl` with the held-out examples that generation is tried on.
All ranks load it, none tokenizes again; a copy of it serves machines that have neither the sources nor a network.
"""

import contextlib
import gc
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.json_reader import append_json_lines, display_path
from sft_recipes.data.labels import IGNORE_INDEX, LabelledBatch, Labeller
from sft_recipes.data.ledger import SourceLedger, dropped_entries
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples, source_files
from sft_recipes.data.mixture import Indices, join_near_duplicates, mix, prompt_group, prompt_text, split_eval
from sft_recipes.data.row_fingerprint import row_fingerprints
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import Recipe, as_dict

BATCH_ROWS = 500
# Held-out examples kept as messages for generation; evaluating more of them is the `evaluate` command's work.
KEPT_EVAL_EXAMPLES = 1000

MANIFEST = "manifest.json"
JOINED = "joined_groups.npy"
EVAL_EXAMPLES = "eval_examples.jsonl"
_FILES = ("train.arrow", "test.arrow", JOINED, EVAL_EXAMPLES)
_SCHEMA = pa.schema(
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

    `fingerprints`: one number for each training row, in their order (`row_fingerprint.py`).
    """

    folder: Path
    train: Dataset
    eval: Dataset | None
    eval_examples: Sequence[Example]
    summary: Mapping[str, Any]
    fingerprints: Indices


def prepare(recipe: Recipe, renderer: ChatRenderer, folder: Path, progress: bool = True) -> PreparedData:
    """Prepare the recipe's data in `folder`, or load what is already there if nothing it depends on has changed.

    A source that is not on this machine is taken to be as it was. One process prepares; the others `load_prepared`.
    Raises InputError for bad rows, lost tokens beyond `max_lost`, and overlap between train and its own eval split.
    """
    manifest = folder / MANIFEST
    before = run_folder.read_json(manifest) if manifest.is_file() else {}
    known = before.get("inputs", {})
    inputs = _inputs(recipe, renderer, known.get("data", []))
    expected = _digest(inputs)
    if before.get("fingerprint") == expected:
        _check_files(folder, before, whole=True)
    else:
        if changed := [name for name, value in inputs.items() if known.get(name, value) != value]:
            print(f"preparing again: {', '.join(changed)} changed since {folder} was written", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        gc.freeze()  # collections need not look at all that the libraries hold: a sixth of the time, measured
        try:
            content = _prepare(recipe, renderer, folder, progress)
        finally:
            gc.unfreeze()
        files = {
            path.name: [path.stat().st_size, _sha256(path)] for path in map(folder.joinpath, _FILES) if path.is_file()
        }
        run_folder.write_json(manifest, {"fingerprint": expected, "inputs": inputs, "files": files, **content})
    return load_prepared(recipe, folder)


def fingerprint(recipe: Recipe, renderer: ChatRenderer) -> str:
    """SHA-256 of everything the prepared ids depend on."""
    return _digest(_inputs(recipe, renderer, []))


def _inputs(recipe: Recipe, renderer: ChatRenderer, known: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the prepared ids depend on: hashes by name. `known` are those of the sources, for one that is not here."""
    data, tokenizer = as_dict(recipe.data), renderer.tokenizer
    # The mixture and the split are drawn when the rows are loaded: other weights need no new rows.
    settings = [data[key] for key in ("test_split", "on_bad_rows", "max_rejected", "allow_empty_output", "seed")]
    reading = [{key: one[key] for key in one.keys() - {"path", "weight", "fraction"}} for one in data["datasets"]]
    backend = tokenizer.backend_tokenizer.to_str().encode()
    code = [_sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return {
        "data": list(_sources(recipe, known)),
        "settings": _digest([settings, reading, as_dict(recipe.labels), bool(recipe.data.eval_split)]),
        "template": _digest([renderer.template_text, renderer.chat_template_kwargs]),
        "tokenizer": _digest([hashlib.sha256(backend).hexdigest(), tokenizer.special_tokens_map]),
        "code": _digest([sft_recipes.__version__, *code]),
    }


def _sources(recipe: Recipe, known: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Each source's name and the hashes of its files; a Hub set has none, so a new version of it is not noticed."""
    for number, source in enumerate(recipe.data.datasets):
        name, files, before = Path(source.path).name, [], known[number] if number < len(known) else ()
        with contextlib.suppress(InputError):  # raised again where the rows are read
            splits = (source.split, recipe.data.test_split)
            files = [file for split in splits if split for file in source_files(source, split)]
        if not files and before[1:] and before[0] == name:
            print(f"{source.path} is not here: its prepared rows stand as they are", file=sys.stderr)
            yield list(before)
        else:
            yield [name, *map(_sha256, files)] if files else [source.path]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare(recipe: Recipe, renderer: ChatRenderer, folder: Path, progress: bool) -> dict[str, Any]:
    labeller = Labeller(renderer, recipe.labels)
    rejects = RejectLog(recipe.data, folder / "rejects.jsonl")
    (folder / "dropped.jsonl").unlink(missing_ok=True)
    splits: list[tuple[str, str | None]] = [("train", None)]
    if recipe.data.test_split:
        splits.append(("test", recipe.data.test_split))
    ledgers: list[SourceLedger] = []
    prompts: dict[int, str] = {}  # of each group, where a split is drawn
    holds_out = bool(recipe.data.eval_split or recipe.data.test_split)  # else nobody asks which prompts are the same
    for name, split in splits:
        candidates: list[tuple[int, Example]] = []
        # Renamed when whole: another process may still read the old file from memory.
        unfinished = folder / f".{name}.arrow.tmp"
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            for number, source in enumerate(recipe.data.datasets):
                ledger = SourceLedger(display_path(Path(source.path)), split or source.split)
                examples = iter_examples(source, recipe.data, split=split, columns=EVALUATION_COLUMNS, rejects=rejects)
                title = f"preparing {Path(source.path).name}"
                with tqdm(examples, title, unit=" rows", disable=not progress, leave=False) as bar:
                    for batch_examples, batch in labeller.label_batches(batches(bar)):
                        texts = [prompt_text(example) if holds_out else "" for example in batch_examples]
                        groups = [prompt_group(text, recipe.data.seed) for text in texts]
                        if recipe.data.eval_split:
                            prompts.update(zip(groups, texts, strict=True))
                        writer.write_batch(_record_batch(batch, batch_examples, groups, number))
                        ledger.add(batch_examples, batch)
                        if batch.dropped:
                            append_json_lines(folder / "dropped.jsonl", dropped_entries(batch_examples, batch))
                        candidates = _first_held_out(candidates, batch_examples, batch, groups)
                ledger.add_rejected(rejects.rejected[source.path].total(), rejects.unused_columns[source.path])
                ledger.check(recipe.labels.max_lost)
                ledgers.append(ledger)
        # From here on, and not before, what an earlier preparation left is of no use.
        (folder / MANIFEST).unlink(missing_ok=True)
        unfinished.replace(folder / f"{name}.arrow")
    # Those of the test split, which comes last, where there is one.
    fields = Example.__slots__
    kept = ({"group": group} | {name: getattr(one, name) for name in fields} for group, one in candidates)
    (folder / EVAL_EXAMPLES).unlink(missing_ok=True)
    append_json_lines(folder / EVAL_EXAMPLES, kept)
    joined = join_near_duplicates(prompts) if prompts else np.empty((0, 2), dtype=np.int64)
    np.save(folder / JOINED, joined)
    return {"sources": [ledger.as_json() for ledger in ledgers], "near_duplicate_prompts": len(joined)}


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in batches for the labeller."""
    remaining = iter(examples)
    while batch := list(islice(remaining, BATCH_ROWS)):
        yield batch


def _record_batch(
    batch: LabelledBatch, examples: Sequence[Example], groups: Sequence[int], source: int
) -> pa.RecordBatch:
    rows = batch.rows
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int32, count=len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)])
    labels = np.full_like(ids, IGNORE_INDEX)
    for row, first in zip(rows, offsets.tolist(), strict=False):
        for start, end in row.spans:
            labels[first + start : first + end] = ids[first + start : first + end]
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(ids)),
            pa.ListArray.from_arrays(offsets, pa.array(labels)),
            pa.array(np.full(len(rows), source), type=pa.int16()),
            pa.array([examples[row.example].row for row in rows], type=pa.int32()),
            pa.array([groups[row.example] for row in rows], type=pa.int64()),
            pa.array(lengths),
            pa.array([row.trained_tokens for row in rows], type=pa.int32()),
            pa.array(row_fingerprints(ids, labels, offsets)),
        ],
        schema=_SCHEMA,
    )


def _first_held_out(
    candidates: list[tuple[int, Example]], examples: Sequence[Example], batch: LabelledBatch, groups: Sequence[int]
) -> list[tuple[int, Example]]:
    """The labelled examples with the smallest group hashes so far: those that a seeded split holds out first."""
    labelled = sorted({row.example for row in batch.rows})
    more = [(groups[index], examples[index]) for index in labelled]
    return sorted([*candidates, *more], key=itemgetter(0))[:KEPT_EVAL_EXAMPLES]


def load_prepared(recipe: Recipe, folder: Path) -> PreparedData:
    """Load a prepared folder and draw the recipe's split and mixture from it. Raises InputError if it is not whole."""
    if not (folder / MANIFEST).is_file():
        fix = "run `sft-recipes prepare` first; all machines of a run must see its output_dir"
        raise InputError(Problem(str(folder), MANIFEST, "no such file", fix))
    manifest = run_folder.read_json(folder / MANIFEST)
    _check_files(folder, manifest)
    rows = Dataset.from_file(str(folder / "train.arrow"))
    joined = dict(np.load(folder / JOINED, allow_pickle=False).tolist())
    groups = _column(rows, "group")
    if joined:
        groups = np.array([joined.get(group, group) for group in groups.tolist()], dtype=np.int64)
    held_out, held = rows, np.empty(0, dtype=np.int64)  # where the held-out rows are, and which
    keep = np.arange(len(rows))
    eval_groups: Indices = np.empty(0, dtype=np.int64)
    if recipe.data.test_split:
        held_out = Dataset.from_file(str(folder / "test.arrow"))
        eval_groups = _column(held_out, "group")
        held = np.arange(len(held_out))
        _check_overlap(recipe, rows, groups, eval_groups)
    elif recipe.data.eval_split:
        keep, held = split_eval(groups, recipe.data.eval_split)
        if not len(keep):
            fix = "make eval_split smaller"
            raise InputError(Problem(recipe.name, "eval_split", "no row is left to train", fix))
        eval_groups = groups[held]
    kept = keep[mix(recipe.data.datasets, _column(rows, "source")[keep], recipe.data.seed, recipe.data.max_rows)]
    summary = {**manifest, "train": _counts(rows, kept), "eval": _counts(held_out, held) if len(held) else None}
    train, test = (
        table.select(of).select_columns(["input_ids", "labels"]) for table, of in ((rows, kept), (held_out, held))
    )
    examples = _read_eval_examples(folder / EVAL_EXAMPLES, set(eval_groups.tolist()), joined)
    fingerprints = _column(rows, "fingerprint")[kept]
    return PreparedData(folder, train, test if len(held) else None, examples, summary, fingerprints)


def _column(rows: Dataset, name: str) -> Indices:
    # At once: through a selection `datasets` gathers row by row, seven seconds for a million.
    return np.asarray(rows.data.column(name), dtype=np.int64)


def _check_files(folder: Path, manifest: Mapping[str, Any], whole: bool = False) -> None:
    """Refuse files that are not those of the manifest, by size or, where `whole`, by hash."""
    for name, expected in manifest.get("files", {}).items():
        path = folder / name
        found = [path.stat().st_size, _sha256(path) if whole else expected[1]] if path.is_file() else []
        if found != expected:
            fix = "copy the folder again, or remove its manifest.json and prepare again"
            raise InputError(Problem(str(path), "", "missing, cut off or changed since it was prepared", fix))


def _check_overlap(recipe: Recipe, rows: Dataset, groups: Indices, eval_groups: Indices) -> None:
    shared = np.isin(groups, eval_groups)
    if not shared.any():
        return
    sources, numbers = _column(rows, "source"), _column(rows, "row")
    problems = [
        Problem(
            f"{recipe.data.datasets[sources[index]].path} row {numbers[index]}",
            "dataset_test_split",
            f"the same prompt stands in the {recipe.data.test_split!r} split",
            "remove it from one of them; an evaluation on trained prompts says nothing",
        )
        for index in np.flatnonzero(shared)[:20]
    ]
    raise InputError(problems, total=int(shared.sum()))


def _counts(rows: Dataset, chosen: Indices) -> dict[str, int]:
    tokens, trained = _column(rows, "tokens")[chosen], _column(rows, "trained_tokens")[chosen]
    longest = int(tokens.max(initial=0))
    return {"rows": len(chosen), "tokens": int(tokens.sum()), "trained_tokens": int(trained.sum()), "longest": longest}


def _read_eval_examples(path: Path, groups: set[int], joined: Mapping[int, int]) -> list[Example]:
    if not groups or not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    found = [(joined.get(group, group), Example(**entry)) for entry in entries for group in [entry.pop("group")]]
    return [example for group, example in found if group in groups]
