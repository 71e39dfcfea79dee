"""One batch of examples, labelled and ready to be stored, in whichever process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from sft_recipes.data.check_examples import CheckExamples
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.data.ledger import SourceLedger, dropped_entries
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.data.prompt_table import prompt_batch
from sft_recipes.data.row_table import record_batch
from sft_recipes.messages import Example

BATCH_ROWS = 500


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one source, and the source's number."""

    examples: Sequence[Example]
    source: int


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """What became of a batch: rows as they are stored, and its part of the account.

    `labelled`: positions of the examples that have rows; `groups`: of every example, 0 where nobody
    asks which prompts are alike; `prompts`: signed, where near-duplicates are looked for;
    `for_checks`: positions of those that `CheckExamples` keeps of this batch.
    """

    rows: pa.RecordBatch
    ledger: SourceLedger
    dropped: Sequence[Mapping[str, Any]]
    labelled: Sequence[int]
    groups: Sequence[int]
    prompts: pa.RecordBatch | None
    for_checks: Sequence[int]


@dataclass(frozen=True, slots=True)
class PrepareBatch:
    """Labels a batch. `with_groups`: rows are held out; `with_prompts`: by a draw of whole groups."""

    labeller: Labeller
    seed: int
    with_groups: bool
    with_prompts: bool

    def __call__(self, batch: Batch) -> PreparedBatch:
        examples = batch.examples
        labelled = self.labeller.label(examples)
        groups = [0] * len(examples)
        prompts = None
        if self.with_groups:
            texts = [prompt_text(example) for example in examples]
            groups = [prompt_group(text, self.seed) for text in texts]
            if self.with_prompts:
                prompts = prompt_batch(groups, texts)
        ledger = SourceLedger("", "")
        ledger.add(examples, labelled)
        positions = sorted({row.example for row in labelled.rows})
        checks = CheckExamples()
        return PreparedBatch(
            rows=_stored_rows(labelled, batch, groups),
            ledger=ledger,
            dropped=list(dropped_entries(examples, labelled)),
            labelled=positions,
            groups=groups,
            prompts=prompts,
            for_checks=[at for at in positions if checks.add(batch.source, examples[at])],
        )


def _stored_rows(labelled: LabelledBatch, batch: Batch, groups: Sequence[int]) -> pa.RecordBatch:
    """The labelled rows of a batch as they are stored."""
    row_numbers: list[int] = []
    row_groups: list[int] = []
    for row in labelled.rows:
        row_numbers.append(batch.examples[row.example].row)
        row_groups.append(groups[row.example])
    return record_batch(labelled.rows, batch.source, row_numbers, row_groups)


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in batches for the labeller."""
    remaining = iter(examples)
    while batch := list(islice(remaining, BATCH_ROWS)):
        yield batch
