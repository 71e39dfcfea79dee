"""From a recipe to token ids on disk: one streaming pass, memory bounded, every row accounted for.

This process reads rows and writes results, in order; rows are labelled in batches, by worker processes where there are
many. The files are the same, byte for byte, for any number of workers. `data/prepared.py` says what they are.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.data import prepared
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.check_examples import CheckExamples
from sft_recipes.data.labels import IGNORE_INDEX, LabelledBatch, Labeller
from sft_recipes.data.ledger import SourceLedger, dropped_entries
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples, source_files
from sft_recipes.data.mixture import join_near_duplicates, prompt_group, prompt_text
from sft_recipes.data.prepared import PreparedData, check_files, file_sha256, load_prepared
from sft_recipes.data.reading.json_reader import append_json_lines, display_path
from sft_recipes.data.row_fingerprint import row_fingerprints
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, Recipe, as_dict

BATCH_ROWS = 500
# Held-out examples kept as messages for generation; evaluating more of them is the `evaluate` command's work.
KEPT_EVAL_EXAMPLES = 1000


def prepare(
    recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True
) -> PreparedData:
    """Prepare the recipe's data in `folder` and load it. Raises as `write_prepared` does."""
    write_prepared(recipe, labeller, folder, progress)
    return load_prepared(recipe, folder)


def write_prepared(recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True) -> None:
    """Prepare the recipe's data in `folder`, or leave what is already there if nothing it depends on has changed.

    A source that is not on this machine is taken to be as it was. One process prepares; the others `load_prepared`.
    Raises InputError for bad rows, lost tokens beyond `max_lost`, and overlap between train and its own eval split.
    """
    manifest = folder / prepared.MANIFEST
    before = run_folder.read_json(manifest) if manifest.is_file() else {}
    known = before.get("inputs", {})
    inputs = _inputs(recipe, labeller.renderer, known.get("data", []))
    expected = _digest(inputs)
    if before.get("fingerprint") == expected:
        check_files(folder, before, whole=True)
        return
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    if changed:
        print(
            f"preparing again: {', '.join(changed)} changed since {folder} was written",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = _Preparation(recipe, labeller, folder, progress).run()
    files: dict[str, Any] = {}
    for name in prepared.FILES:
        path = folder / name
        if path.is_file():
            files[name] = [path.stat().st_size, file_sha256(path)]
    run_folder.write_json(
        manifest, {"fingerprint": expected, "inputs": inputs, "files": files, **content}
    )


# -- what the prepared ids depend on -----------------------------------------------------------------------------------


def fingerprint(recipe: Recipe, renderer: ChatRenderer) -> str:
    """SHA-256 of everything the prepared ids depend on."""
    return _digest(_inputs(recipe, renderer, []))


def _inputs(
    recipe: Recipe, renderer: ChatRenderer, known: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What the prepared ids depend on: hashes by name. `known` are those of the sources, for one that is not here."""
    data = as_dict(recipe.data)
    tokenizer = renderer.tokenizer
    # The mixture and the split are drawn when the rows are loaded: other weights need no new rows.
    settings = [
        data[key]
        for key in ("test_split", "on_bad_rows", "max_rejected", "allow_empty_output", "seed")
    ]
    reading: list[dict[str, Any]] = []
    for source in data["datasets"]:
        reading.append({key: source[key] for key in source.keys() - {"path", "weight", "fraction"}})
    backend = tokenizer.backend_tokenizer.to_str().encode()
    code = [file_sha256(path) for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return {
        "data": list(_sources(recipe, known)),
        "settings": _digest(
            [settings, reading, as_dict(recipe.labels), bool(recipe.data.eval_split)]
        ),
        "template": _digest([renderer.template_text, renderer.chat_template_kwargs]),
        "tokenizer": _digest([hashlib.sha256(backend).hexdigest(), tokenizer.special_tokens_map]),
        "code": _digest([sft_recipes.__version__, *code]),
    }


def _sources(recipe: Recipe, known: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Each source's name and the hashes of its files; a Hub set has none, so a new version of it is not noticed."""
    for number, source in enumerate(recipe.data.datasets):
        name = Path(source.path).name
        before = known[number] if number < len(known) else ()
        files: list[Path] = []
        with contextlib.suppress(InputError):  # raised again where the rows are read
            for split in (source.split, recipe.data.test_split):
                files += source_files(source, split) if split else []
        if not files and before[1:] and before[0] == name:
            print(
                f"{source.path} is not here: its prepared rows stand as they are", file=sys.stderr
            )
            yield list(before)
        elif files:
            yield [name, *map(file_sha256, files)]
        else:
            yield [source.path]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# -- one batch, in whichever process -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Batch:
    """Examples of one source, and the source's number."""

    examples: Sequence[Example]
    source: int


@dataclass(frozen=True, slots=True)
class _PreparedBatch:
    """What became of a batch: rows as they are stored, and its part of the account.

    `labelled`: positions of the examples that have rows. `groups` and `prompts`: of every example, if anybody asks.
    """

    rows: pa.RecordBatch
    ledger: SourceLedger
    dropped: Sequence[Mapping[str, Any]]
    labelled: Sequence[int]
    groups: Sequence[int]
    prompts: Sequence[str]


@dataclass(frozen=True, slots=True)
class _PrepareBatch:
    """Labels a batch; `with_groups`: rows are held out, so which prompts are alike is asked."""

    labeller: Labeller
    seed: int
    with_groups: bool

    def __call__(self, batch: _Batch) -> _PreparedBatch:
        labelled = self.labeller.label(batch.examples)
        prompts = [prompt_text(example) if self.with_groups else "" for example in batch.examples]
        groups = [prompt_group(prompt, self.seed) for prompt in prompts]
        ledger = SourceLedger("", "")
        ledger.add(batch.examples, labelled)
        return _PreparedBatch(
            rows=_record_batch(labelled, batch, groups),
            ledger=ledger,
            dropped=list(dropped_entries(batch.examples, labelled)),
            labelled=sorted({row.example for row in labelled.rows}),
            groups=groups,
            prompts=prompts,
        )


def _record_batch(labelled: LabelledBatch, batch: _Batch, groups: Sequence[int]) -> pa.RecordBatch:
    rows = labelled.rows
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
            pa.array(np.full(len(rows), batch.source), type=pa.int16()),
            pa.array([batch.examples[row.example].row for row in rows], type=pa.int32()),
            pa.array([groups[row.example] for row in rows], type=pa.int64()),
            pa.array(lengths),
            pa.array([row.trained_tokens for row in rows], type=pa.int32()),
            pa.array(row_fingerprints(ids, labels, offsets)),
        ],
        schema=prepared.SCHEMA,
    )


# -- the pass over all rows --------------------------------------------------------------------------------------------


@dataclass
class _Preparation:
    """One pass over a recipe's data. `prompts`: of each group, where a split is drawn; `candidates`: the examples with
    the smallest groups so far, which a seeded split holds out first.
    """

    recipe: Recipe
    labeller: Labeller
    folder: Path
    progress: bool
    prompts: dict[int, str] = field(default_factory=dict)
    candidates: list[tuple[int, Example]] = field(default_factory=list)
    ledgers: list[SourceLedger] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Write everything but the manifest, and return what that says of the data."""
        data = self.recipe.data
        rejects = RejectLog(data, self.folder / prepared.REJECTS)
        (self.folder / prepared.DROPPED).unlink(missing_ok=True)
        check_examples = CheckExamples()
        self._write_split(None, prepared.TRAIN, rejects, check_examples)
        if data.test_split:
            self.candidates = []
            self._write_split(data.test_split, prepared.TEST, rejects, CheckExamples())
        self._write_examples(prepared.EVAL_EXAMPLES, self.candidates)
        self._write_examples(
            prepared.CHECK_EXAMPLES, [(0, example) for example in check_examples.chosen()]
        )
        joined = (
            join_near_duplicates(self.prompts) if self.prompts else np.empty((0, 2), dtype=np.int64)
        )
        np.save(self.folder / prepared.JOINED, joined)
        return {
            "sources": [ledger.as_json() for ledger in self.ledgers],
            "near_duplicate_prompts": len(joined),
        }

    def _write_split(
        self, split: str | None, file: str, rejects: RejectLog, checked: CheckExamples
    ) -> None:
        # Renamed when whole: another process may still read the old file from memory.
        unfinished = self.folder / f".{file}.tmp"
        with (
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, prepared.SCHEMA) as writer,
        ):
            for number in range(len(self.recipe.data.datasets)):
                self._write_source(number, split, writer, rejects, checked)
        # From here on, and not before, what an earlier preparation left is of no use.
        (self.folder / prepared.MANIFEST).unlink(missing_ok=True)
        unfinished.replace(self.folder / file)

    def _write_source(
        self,
        number: int,
        split: str | None,
        writer: Any,
        rejects: RejectLog,
        checked: CheckExamples,
    ) -> None:
        data = self.recipe.data
        source = data.datasets[number]
        ledger = SourceLedger(display_path(Path(source.path)), split or source.split)
        work = _PrepareBatch(self.labeller, data.seed, bool(data.eval_split or data.test_split))
        workers = Workers(work, data.dataset_num_proc)
        with self._examples(source, split, rejects) as examples:
            read = (_Batch(batch, number) for batch in batches(examples))
            for batch, result in workers.map(read):
                writer.write_batch(result.rows)
                ledger.merge(result.ledger)
                if result.dropped:
                    append_json_lines(self.folder / prepared.DROPPED, result.dropped)
                if data.eval_split:
                    self.prompts.update(zip(result.groups, result.prompts, strict=True))
                self._keep_candidates(batch, result)
                for index in result.labelled:
                    checked.add(number, batch.examples[index])
        ledger.add_rejected(rejects, source.path)
        ledger.check(self.recipe.labels.max_lost)
        self.ledgers.append(ledger)

    def _examples(self, source: DatasetSource, split: str | None, rejects: RejectLog) -> Any:
        """The examples of a source, behind a progress bar."""
        examples = iter_examples(
            source, self.recipe.data, split=split, columns=EVALUATION_COLUMNS, rejects=rejects
        )
        title = f"preparing {Path(source.path).name}"
        return tqdm(examples, title, unit=" rows", disable=not self.progress, leave=False)

    def _keep_candidates(self, batch: _Batch, result: _PreparedBatch) -> None:
        more = [(result.groups[index], batch.examples[index]) for index in result.labelled]
        self.candidates = sorted([*self.candidates, *more], key=itemgetter(0))[:KEPT_EVAL_EXAMPLES]

    def _write_examples(self, name: str, examples: Iterable[tuple[int, Example]]) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        entries: list[dict[str, Any]] = []
        for group, example in examples:
            entries.append(
                {"group": group} | {slot: getattr(example, slot) for slot in Example.__slots__}
            )
        append_json_lines(path, entries)


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in batches for the labeller."""
    remaining = iter(examples)
    while batch := list(islice(remaining, BATCH_ROWS)):
        yield batch
