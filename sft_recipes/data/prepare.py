"""From a recipe to token ids on disk: one streaming pass, memory bounded, every row accounted for.

This process reads rows and writes results, in order; rows are labelled in batches, by worker
processes where there are many. The files are the same, byte for byte, for any number of workers,
and whether it was stopped and went on (`shards.py`) or not. `data/prepared.py` says what they are.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from sft_recipes import run_folder, stop_request
from sft_recipes.data import prepared
from sft_recipes.data.check_examples import CheckExamples
from sft_recipes.data.kept_examples import GroupedExample, write_examples
from sft_recipes.data.labels import Labeller
from sft_recipes.data.ledger import SourceLedger
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples
from sft_recipes.data.mixture import data_set_names
from sft_recipes.data.prepared import PreparedData, check_files, load_prepared, size_and_hash
from sft_recipes.data.prepared_batch import Batch, PrepareBatch, batches
from sft_recipes.data.prepared_inputs import digest, prepared_inputs
from sft_recipes.data.prompt_groups import join_near_duplicates
from sft_recipes.data.prompt_table import read_prompts
from sft_recipes.data.reading.json_reader import display_path
from sft_recipes.data.row_table import Integers
from sft_recipes.data.shards import SHARD_BATCHES, Shard, ShardFolder
from sft_recipes.data.splits import SplitCandidates
from sft_recipes.data.template_trial import RowBlame
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError, Problem, TrainingFault
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, Recipe

Result = TypeVar("Result")


def prepare(
    recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True
) -> PreparedData:
    """Prepare the recipe's data in `folder` and load it. Raises as `write_prepared` does."""
    write_prepared(recipe, labeller, folder, progress)
    return load_prepared(recipe, folder)


def write_prepared(recipe: Recipe, labeller: Labeller, folder: Path, progress: bool = True) -> None:
    """Prepare the recipe's data in `folder`, unless what is there still holds.

    A preparation that was stopped goes on behind its last sealed shard (`shards.py`). A source that
    is not on this machine is taken to be as it was. One process prepares; the others
    `load_prepared`. Raises InputError for bad rows, lost tokens beyond `max_lost`, and overlap
    between train and its own eval split; Preempted where it is asked to stop.
    """
    _put_in_place(folder)
    before: Mapping[str, Any] = {}
    if (folder / prepared.MANIFEST).is_file():
        before = prepared.read_manifest(folder)
    known = before.get("inputs", {})
    inputs = prepared_inputs(recipe, labeller.renderer, known.get("data", []))
    expected = digest(inputs)
    if before.get("fingerprint") == expected:
        check_files(folder, before, whole=True)
        return
    changed = [name for name, value in inputs.items() if known.get(name, value) != value]
    if changed:
        names = ", ".join(changed)
        print(f"preparing again: {names} changed since {folder} was written", file=sys.stderr)
    shards = ShardFolder(folder, expected)
    with stop_request.listening():
        content = _Preparation(recipe, labeller, folder, shards, progress).run()
    manifest = {"fingerprint": expected, "inputs": inputs, **content}
    run_folder.write_json(shards.folder / prepared.MANIFEST, manifest)
    _put_in_place(folder)


def _put_in_place(folder: Path) -> None:
    """Move the files of a preparation that is done to where they are read; of another one do nothing.

    It can be stopped anywhere: the manifest of what is done stays where it is until all else is moved.
    """
    unfinished = folder / prepared.UNFINISHED
    if not (unfinished / prepared.MANIFEST).is_file():
        return
    manifest = prepared.read_manifest(unfinished)
    # From here on, and not before, what an earlier preparation left is of no use.
    (folder / prepared.MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("*.arrow"):
        if path.name not in manifest["files"] and prepared.is_shard(path.name):
            path.unlink()
    for name in manifest["files"]:
        if (unfinished / name).is_file():
            (unfinished / name).replace(folder / name)
    (unfinished / prepared.MANIFEST).replace(folder / prepared.MANIFEST)
    shutil.rmtree(unfinished)


class _Preparation:
    """One pass over a recipe's data, or the rest of one."""

    def __init__(
        self,
        recipe: Recipe,
        labeller: Labeller,
        folder: Path,
        shards: ShardFolder,
        progress: bool,
    ) -> None:
        data = recipe.data
        is_split = bool(data.eval_split or data.test_split)
        self._recipe = recipe
        self._folder = folder
        self._shards = shards
        self._progress = progress
        self._work = PrepareBatch(
            labeller, data.seed, with_groups=is_split, with_prompts=bool(data.eval_split)
        )
        self._rejects = RejectLog(data, folder / prepared.REJECTS)
        self._candidates = SplitCandidates()
        self._check_examples = CheckExamples()
        self._ledgers: list[SourceLedger] = []
        self._files: dict[str, Any] = {}
        self._prompt_files: list[Path] = []
        self._examples_done = 0

    def run(self) -> dict[str, Any]:
        """Write everything but the manifest, and return what that says of the data."""
        (self._folder / prepared.DROPPED).unlink(missing_ok=True)
        test_split = self._recipe.data.test_split
        self._write_table(prepared.TRAIN, None)
        if test_split:
            self._write_table(prepared.TEST, test_split)
        folder = self._shards.folder
        write_examples(folder / prepared.EVAL_EXAMPLES, self._candidates.examples)
        write_examples(
            folder / prepared.CHECK_EXAMPLES,
            [GroupedExample(0, example) for example in self._check_examples.chosen()],
        )
        joined = self._joined_groups()
        np.save(folder / prepared.JOINED, joined)
        for name in prepared.FILES:
            self._files[name] = size_and_hash(folder / name)
        return {
            "files": self._files,
            "sources": [ledger.as_json() for ledger in self._ledgers],
            "near_duplicate_prompts": len(joined),
        }

    def _joined_groups(self) -> Integers:
        """Which groups are near-duplicates of others, where whole groups are held out."""
        table = read_prompts(self._prompt_files, self._shards.folder)
        return join_near_duplicates(table.groups, table.prompts, table.signatures)

    def _write_table(self, table: str, test_split: str | None) -> None:
        """Write the rows of all sources: of the test split, or of each source's own."""
        sealed = self._shards.sealed(table)
        if sealed:
            rows = sum(shard.examples for shard in sealed)
            print(f"going on behind {rows:,} rows of {table} that are prepared", file=sys.stderr)
        written = 0
        for number, source in enumerate(self._recipe.data.datasets):
            if source.held_out or test_split is None:
                there = [shard for shard in sealed if shard.source == number]
                written += self._write_source(table, test_split, number, there, written)

    def _write_source(
        self, table: str, test_split: str | None, number: int, sealed: Sequence[Shard], first: int
    ) -> int:
        """Label the rows of one source and write them shard by shard, in their order.

        `sealed`: its shards that are there; `first`: how many the table has before them. Returns
        how many this source has.
        """
        data = self._recipe.data
        source = data.datasets[number]
        ledger = SourceLedger(display_path(Path(source.path)), test_split or source.split)
        workers = Workers(self._work, data.dataset_num_proc, self._blame)
        shards = list(sealed)
        with self._examples(source, test_split) as bar:
            examples = iter(bar)
            self._pass_over(examples, sealed, source)
            read = (Batch(batch, number) for batch in batches(examples))
            results = self._until_asked_to_stop(workers.map(read))
            while True:
                next_ones = islice(results, SHARD_BATCHES)
                shard = self._shards.write(table, first + len(shards), next_ones)
                if shard is None:
                    break
                self._examples_done += shard.examples
                shards.append(shard)
        for shard in shards:
            self._take(shard, table, ledger)
        ledger.add_rejected(self._rejects, source.path)
        ledger.check(self._recipe.labels.max_lost)
        self._ledgers.append(ledger)
        return len(shards)

    def _pass_over(
        self, examples: Iterator[Example], sealed: Sequence[Shard], source: DatasetSource
    ) -> None:
        """Read the examples of sealed shards: what they are is known, what was rejected is not."""
        wanted = sum(shard.examples for shard in sealed)
        passed = sum(1 for _ in islice(examples, wanted))
        if passed < wanted:
            what = (
                f"has {passed:,} rows now, and had {wanted:,} or more when it was prepared so far"
            )
            fix = f"delete {self._shards.folder} and prepare again"
            raise InputError(Problem(source.path, "", what, fix))
        self._examples_done += wanted

    def _until_asked_to_stop(self, results: Iterator[Result]) -> Iterator[Result]:
        while True:
            try:
                result = next(results, None)
            except TrainingFault:  # who is asked to stop may find that workers were told to end
                self._stop_if_asked()
                raise
            if result is None:
                return
            self._stop_if_asked()
            yield result

    def _stop_if_asked(self) -> None:
        kept = f"{self._examples_done:,} rows are prepared, and the same command goes on there"
        stop_request.raise_if_asked("while rows were prepared", kept)

    def _take(self, shard: Shard, table: str, ledger: SourceLedger) -> None:
        """Account for a sealed shard, and keep of its examples what the end needs."""
        data = self._recipe.data
        self._files[shard.rows] = shard.files[shard.rows]
        ledger.merge(shard.ledger)
        if shard.dropped.is_file():
            with (self._folder / prepared.DROPPED).open("ab") as file:
                file.write(shard.dropped.read_bytes())
        if shard.prompts.is_file():
            self._prompt_files.append(shard.prompts)
        if table == prepared.TRAIN:
            for grouped in shard.for_checks():
                self._check_examples.add(shard.source, grouped.example)
        held_out_of = prepared.TEST if data.test_split else prepared.TRAIN
        if table == held_out_of and data.datasets[shard.source].held_out:
            name = data_set_names(data.datasets)[shard.source]
            candidates = shard.held_out()
            self._candidates.add(
                [grouped.group for grouped in candidates],
                [replace(grouped.example, data_set=name) for grouped in candidates],
            )

    def _blame(self, batch: Batch) -> InputError | None:
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
