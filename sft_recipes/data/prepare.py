"""From a recipe to token ids on disk: one streaming pass, memory bounded, every row accounted for.

This process reads rows and writes results, in order; rows are labelled in batches, by worker
processes where there are many. The files are the same, byte for byte, for any number of workers.
`data/prepared.py` says what they are.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder, stop_request
from sft_recipes.data import prepared
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.check_examples import CheckExamples
from sft_recipes.data.kept_examples import GroupedExample, write_examples
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.data.ledger import SourceLedger, dropped_entries
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples, source_files
from sft_recipes.data.mixture import data_set_names
from sft_recipes.data.prepared import PreparedData, check_files, file_sha256, load_prepared
from sft_recipes.data.prompt_groups import join_near_duplicates, prompt_group, prompt_text
from sft_recipes.data.reading.json_reader import append_json_lines, display_path
from sft_recipes.data.row_table import SCHEMA, record_batch
from sft_recipes.data.splits import SplitCandidates
from sft_recipes.data.template_trial import RowBlame
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, Recipe, as_dict
from sft_recipes.upstream import tokenizers

BATCH_ROWS = 500
# Data settings that decide what the rows are. The mixture and the split are drawn when the rows are
# loaded: other weights need no new rows.
_READING_SETTINGS = ("test_split", "on_bad_rows", "max_rejected", "allow_empty_output", "seed")
_NO_READING_SETTINGS = frozenset({"path", "weight", "fraction"})


def prepare(
    recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True
) -> PreparedData:
    """Prepare the recipe's data in `folder` and load it. Raises as `write_prepared` does."""
    write_prepared(recipe, labeller, folder, progress)
    return load_prepared(recipe, folder)


def write_prepared(recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True) -> None:
    """Prepare the recipe's data in `folder`, unless what is there still holds.

    A source that is not on this machine is taken to be as it was. One process prepares; the others
    `load_prepared`. Raises InputError for bad rows, lost tokens beyond `max_lost`, and overlap
    between train and its own eval split.
    """
    manifest = folder / prepared.MANIFEST
    before: Mapping[str, Any] = {}
    if manifest.is_file():
        before = prepared.read_manifest(folder)
    known = before.get("inputs", {})
    inputs = _inputs(recipe, labeller.renderer, known.get("data", []))
    expected = _digest(inputs)
    if before.get("fingerprint") == expected:
        check_files(folder, before, whole=True)
        return
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    if changed:
        names = ", ".join(changed)
        print(f"preparing again: {names} changed since {folder} was written", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    content = _Preparation(recipe, labeller, folder, progress).run()
    files: dict[str, Any] = {}
    for name in prepared.FILES:
        path = folder / name
        if path.is_file():
            files[name] = [path.stat().st_size, file_sha256(path)]
    run_folder.write_json(
        manifest,
        {
            "fingerprint": expected,
            "inputs": inputs,
            "files": files,
            **content,
        },
    )


# -- what the prepared ids depend on ---------------------------------------------------------------


def fingerprint(recipe: Recipe, renderer: ChatRenderer) -> str:
    """SHA-256 of everything the prepared ids depend on."""
    return _digest(_inputs(recipe, renderer, []))


def changed_inputs(
    recipe: Recipe, renderer: ChatRenderer, manifest: Mapping[str, Any]
) -> list[str]:
    """What of the recipe's inputs is not as it was when the rows of this manifest were prepared."""
    before = manifest["inputs"]
    now = _inputs(recipe, renderer, before["data"])
    return [name for name, value in now.items() if before.get(name) != value]


def _inputs(
    recipe: Recipe, renderer: ChatRenderer, known: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What the prepared ids depend on: hashes by name.

    `known` are those of the sources, for one that is not here.
    """
    tokenizer = renderer.tokenizer
    backend = tokenizer.backend_tokenizer.to_str().encode()
    return {
        "data": list(_sources(recipe, known)),
        "settings": _digest(_settings(recipe)),
        "template": _digest([renderer.template_text, renderer.chat_template_kwargs]),
        "tokenizer": _digest([hashlib.sha256(backend).hexdigest(), tokenizer.special_tokens_map]),
        "code": _digest([sft_recipes.__version__, *_code_hashes()]),
    }


def _settings(recipe: Recipe) -> list[Any]:
    """The settings of the recipe that decide what the rows and their ids are."""
    data = as_dict(recipe.data)
    reading: list[dict[str, Any]] = []
    for source in data["datasets"]:
        reading.append({key: source[key] for key in source.keys() - _NO_READING_SETTINGS})
    settings = [data[key] for key in _READING_SETTINGS]
    return [settings, reading, as_dict(recipe.labels), bool(recipe.data.eval_split)]


def _code_hashes() -> list[str]:
    """The hashes of the files of code that make the ids."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return [file_sha256(path) for path in [*files, Path(tokenizers.__file__)]]


def _sources(recipe: Recipe, known: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Each source's name and the hashes of its files.

    A Hub set has none, so a new version of it is not noticed.
    """
    for number, source in enumerate(recipe.data.datasets):
        name = Path(source.path).name
        before: Sequence[str] = ()
        if number < len(known):
            before = known[number]
        files = _files_of(source, recipe.data.test_split)
        if files:
            yield [name, *map(file_sha256, files)]
        elif len(before) > 1 and before[0] == name:
            what = f"{source.path} is not here: its prepared rows stand as they are"
            print(what, file=sys.stderr)
            yield list(before)
        else:
            yield [source.path]


def _files_of(source: DatasetSource, test_split: str | None) -> list[Path]:
    """The files of the splits that are read, as far as they are found."""
    files: list[Path] = []
    with contextlib.suppress(InputError):  # raised again where the rows are read
        files += source_files(source, source.split)
        if test_split:
            files += source_files(source, test_split)
    return files


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# -- one batch, in whichever process ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Batch:
    """Examples of one source, and the source's number."""

    examples: Sequence[Example]
    source: int


@dataclass(frozen=True, slots=True)
class _PreparedBatch:
    """What became of a batch: rows as they are stored, and its part of the account.

    `labelled`: positions of the examples that have rows. `groups` and `prompts`: of every example;
    empty texts where nobody asks which prompts are alike.
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
        prompts = [""] * len(batch.examples)
        if self.with_groups:
            prompts = [prompt_text(example) for example in batch.examples]
        groups = [prompt_group(prompt, self.seed) for prompt in prompts]
        ledger = SourceLedger("", "")
        ledger.add(batch.examples, labelled)
        return _PreparedBatch(
            rows=_stored_rows(labelled, batch, groups),
            ledger=ledger,
            dropped=list(dropped_entries(batch.examples, labelled)),
            labelled=sorted({row.example for row in labelled.rows}),
            groups=groups,
            prompts=prompts,
        )


def _stored_rows(labelled: LabelledBatch, batch: _Batch, groups: Sequence[int]) -> pa.RecordBatch:
    """The labelled rows of a batch as they are stored."""
    row_numbers: list[int] = []
    row_groups: list[int] = []
    for row in labelled.rows:
        row_numbers.append(batch.examples[row.example].row)
        row_groups.append(groups[row.example])
    return record_batch(labelled.rows, batch.source, row_numbers, row_groups)


# -- the pass over all rows ------------------------------------------------------------------------


class _Preparation:
    """One pass over a recipe's data."""

    def __init__(self, recipe: Recipe, labeller: Labeller, folder: Path, progress: bool) -> None:
        data = recipe.data
        is_split = bool(data.eval_split or data.test_split)
        self._recipe = recipe
        self._folder = folder
        self._progress = progress
        self._work = _PrepareBatch(labeller, data.seed, with_groups=is_split)
        self._rejects = RejectLog(data, folder / prepared.REJECTS)
        self._candidates = SplitCandidates()
        self._check_examples = CheckExamples()
        self._ledgers: list[SourceLedger] = []
        self._names = data_set_names(data.datasets)

    def run(self) -> dict[str, Any]:
        """Write everything but the manifest, and return what that says of the data."""
        (self._folder / prepared.DROPPED).unlink(missing_ok=True)
        self._write_table(prepared.TRAIN, None)
        test_split = self._recipe.data.test_split
        if test_split:
            self._candidates.examples = []  # only rows of the test split are held out
            self._write_table(prepared.TEST, test_split)
        write_examples(self._folder / prepared.EVAL_EXAMPLES, self._candidates.examples)
        write_examples(
            self._folder / prepared.CHECK_EXAMPLES,
            [GroupedExample(0, example) for example in self._check_examples.chosen()],
        )
        joined = join_near_duplicates(self._candidates.prompts)
        np.save(self._folder / prepared.JOINED, joined)
        return {
            "sources": [ledger.as_json() for ledger in self._ledgers],
            "near_duplicate_prompts": len(joined),
        }

    def _write_table(self, file: str, test_split: str | None) -> None:
        """Write the rows of all sources: of the test split, or of each source's own."""
        # Renamed when whole: another process may still read the old file from memory.
        unfinished = self._folder / f".{file}.tmp"
        with (
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
        ):
            for number, source in enumerate(self._recipe.data.datasets):
                if source.held_out or test_split is None:
                    self._write_source(number, test_split, writer)
        # From here on, and not before, what an earlier preparation left is of no use.
        (self._folder / prepared.MANIFEST).unlink(missing_ok=True)
        unfinished.replace(self._folder / file)

    def _write_source(self, number: int, test_split: str | None, writer: Any) -> None:
        """Label the rows of one source and write them batch by batch, in their order."""
        data = self._recipe.data
        source = data.datasets[number]
        ledger = SourceLedger(display_path(Path(source.path)), test_split or source.split)
        workers = Workers(self._work, data.dataset_num_proc, self._blame)
        with self._examples(source, test_split) as examples:
            read = (_Batch(batch, number) for batch in batches(examples))
            for batch, result in workers.map(read):
                stop_request.raise_if_asked("while rows were prepared")
                writer.write_batch(result.rows)
                ledger.merge(result.ledger)
                if result.dropped:
                    append_json_lines(self._folder / prepared.DROPPED, result.dropped)
                self._keep_for_split(batch, result)
                if test_split is None:
                    self._keep_for_checks(batch, result)
        ledger.add_rejected(self._rejects, source.path)
        ledger.check(self._recipe.labels.max_lost)
        self._ledgers.append(ledger)

    def _blame(self, batch: _Batch) -> InputError | None:
        """The row of a batch on which the template does not end."""
        return RowBlame(self._work.labeller)(batch.examples)

    def _examples(self, source: DatasetSource, test_split: str | None) -> Any:
        """The examples of a source, behind a progress bar."""
        examples = iter_examples(
            source,
            self._recipe.data,
            split=test_split,
            columns=EVALUATION_COLUMNS,
            rejects=self._rejects,
        )
        title = f"preparing {Path(source.path).name}"
        return tqdm(
            examples, title, unit=" rows", disable=None if self._progress else True, leave=False
        )

    def _keep_for_split(self, batch: _Batch, result: _PreparedBatch) -> None:
        if self._recipe.data.eval_split:
            self._candidates.prompts.update(zip(result.groups, result.prompts, strict=True))
        if not self._recipe.data.datasets[batch.source].held_out:
            return
        grouped: list[GroupedExample] = []
        for index in result.labelled:
            example = replace(batch.examples[index], data_set=self._names[batch.source])
            grouped.append(GroupedExample(result.groups[index], example))
        self._candidates.add(grouped)

    def _keep_for_checks(self, batch: _Batch, result: _PreparedBatch) -> None:
        for index in result.labelled:
            self._check_examples.add(batch.source, batch.examples[index])


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in batches for the labeller."""
    remaining = iter(examples)
    while batch := list(islice(remaining, BATCH_ROWS)):
        yield batch
