"""Shards of a preparation: written one after the other, each sealed, so that a stopped one goes on.

While rows are prepared everything lies in the folder `unfinished/`. A shard holds the rows of up to
20,000 examples of one source, and beside it stands what the end of the preparation needs of them:
the account, the rows that were dropped, the conversations that may be held out or checked, and the
prompts. Its seal, a JSON file with sizes and hashes, is written last: a shard without one, or with
a file that differs, is written again. What is in a shard depends on its rows alone, so shards of a
preparation that was stopped and of one that was not are the same.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from sft_recipes import run_folder
from sft_recipes.data.check_examples import CheckExamples
from sft_recipes.data.kept_examples import GroupedExample, read_examples, write_examples
from sft_recipes.data.ledger import SourceLedger
from sft_recipes.data.prepared import TRAIN, UNFINISHED, is_as_expected, size_and_hash
from sft_recipes.data.prepared_batch import BATCH_ROWS, Batch, PreparedBatch
from sft_recipes.data.prompt_table import SCHEMA as PROMPT_SCHEMA
from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.data.row_table import SCHEMA
from sft_recipes.data.splits import SplitCandidates
from sft_recipes.errors import InputError
from sft_recipes.text_files import interpreting

# 5 MB to 500 MB of ids and labels, for rows of 30 to 3,000 tokens.
SHARD_BATCHES = 40
SHARD_ROWS = SHARD_BATCHES * BATCH_ROWS
_FIX = "delete the folder: the rows are prepared again"


@dataclass(frozen=True)
class Shard:
    """A sealed shard: its file of rows, and what is known of the examples that they were made of.

    `examples`: how many were read. `files`: size and SHA-256 of every file, by name.
    """

    folder: Path
    name: str
    source: int
    examples: int
    ledger: SourceLedger
    files: dict[str, Any]

    @property
    def rows(self) -> str:
        """The file of its rows."""
        return f"{self.name}.arrow"

    @property
    def prompts(self) -> Path:
        """The file of its prompts, if they were asked for."""
        return self.folder / f"{self.name}.prompts"

    @property
    def dropped(self) -> Path:
        """The lines of `dropped.jsonl` about its examples."""
        return self.folder / f"{self.name}.dropped.jsonl"

    def held_out(self) -> list[GroupedExample]:
        """The examples that a split would hold out first."""
        return read_examples(self.folder / f"{self.name}.held_out.jsonl")

    def for_checks(self) -> list[GroupedExample]:
        """The examples that the checks may look at."""
        return read_examples(self.folder / f"{self.name}.checks.jsonl")


class ShardFolder:
    """The folder of a preparation that is not finished, for the inputs with this fingerprint.

    What is there of other inputs is removed.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / UNFINISHED
        self._fingerprint = fingerprint
        if self._read(f"{TRAIN}-00000") is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def sealed(self, table: str) -> list[Shard]:
        """The shards of a table that are there as they were sealed, in order, up to the first that is not."""
        shards: list[Shard] = []
        while (shard := self._read(f"{table}-{len(shards):05d}")) is not None:
            shards.append(shard)
        return shards

    def write(
        self, table: str, number: int, results: Iterable[tuple[Batch, PreparedBatch]]
    ) -> Shard | None:
        """Write and seal the next shard of a table; None where there are no results."""
        remaining = iter(results)
        first = next(remaining, None)
        if first is None:
            return None
        name = f"{table}-{number:05d}"
        for left_over in self.folder.glob(f"{name}.*"):
            left_over.unlink()
        with _ShardWriter(self.folder, name, with_prompts=first[1].prompts is not None) as writer:
            for batch, result in chain([first], remaining):
                writer.add(batch, result)
        self._seal(name, writer.content())
        shard = self._read(name)
        if shard is None:
            raise OSError(f"{self.folder / name}: what was written there is not what is read")
        return shard

    def _seal(self, name: str, content: dict[str, Any]) -> None:
        files: dict[str, list[Any]] = {}
        for path in sorted(self.folder.glob(f"{name}.*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = size_and_hash(path)
        content |= {"fingerprint": self._fingerprint, "files": files}
        run_folder.write_json(self.folder / f"{name}.json", content)

    def _read(self, name: str) -> Shard | None:
        """The shard of this name, if it is whole and of these inputs."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            shard, fingerprint = self._parsed(path, name)
        except InputError:  # a seal that cannot be read seals nothing
            return None
        for file, expected in shard.files.items():
            if not is_as_expected(self.folder / file, expected, whole=True):
                return None
        return shard if fingerprint == self._fingerprint else None

    def _parsed(self, path: Path, name: str) -> tuple[Shard, str]:
        """A shard as its seal describes it, and the fingerprint of its inputs."""
        content = run_folder.read_json(path, _FIX)
        with interpreting(path, _FIX):
            ledger = content["ledger"]
            ledger["dropped"] = Counter(ledger["dropped"])
            shard = Shard(
                folder=self.folder,
                name=name,
                source=content["source"],
                examples=content["examples"],
                ledger=SourceLedger(**ledger),
                files=content["files"],
            )
            return shard, content["fingerprint"]


class _ShardWriter:
    """Writes the files of one shard as its batches come, in their order."""

    def __init__(self, folder: Path, name: str, with_prompts: bool) -> None:
        self._path = folder / name
        self._open_files = contextlib.ExitStack()
        self._rows = self._writer("arrow", SCHEMA)
        self._prompts = self._writer("prompts", PROMPT_SCHEMA) if with_prompts else None
        self._source = 0
        self._examples = 0
        self._ledger = SourceLedger("", "")
        self._candidates = SplitCandidates()
        self._checks = CheckExamples()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def add(self, batch: Batch, result: PreparedBatch) -> None:
        """Write a batch."""
        self._rows.write_batch(result.rows)
        if self._prompts is not None:
            self._prompts.write_batch(result.prompts)
        self._source = batch.source
        self._examples += len(batch.examples)
        self._ledger.merge(result.ledger)
        if result.dropped:
            append_json_lines(self._file("dropped.jsonl"), result.dropped)
        groups = [result.groups[at] for at in result.labelled]
        self._candidates.add(groups, [batch.examples[at] for at in result.labelled])
        for at in result.for_checks:
            self._checks.add(batch.source, batch.examples[at])

    def content(self) -> dict[str, Any]:
        """Write the examples that are kept; returns what the seal says."""
        write_examples(self._file("held_out.jsonl"), self._candidates.examples)
        checked = [GroupedExample(0, example) for example in self._checks.kept]
        write_examples(self._file("checks.jsonl"), checked)
        return {
            "source": self._source,
            "examples": self._examples,
            "ledger": self._ledger.as_json(),
        }

    def _writer(self, kind: str, schema: pa.Schema) -> Any:
        sink = self._open_files.enter_context(pa.OSFile(str(self._file(kind)), "wb"))
        return self._open_files.enter_context(pa.ipc.new_stream(sink, schema))

    def _file(self, kind: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{kind}")
