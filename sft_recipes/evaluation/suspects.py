"""Training rows that the tuned model still finds hardest: where wrong answers end up.

Every trained row's mean loss a trained token, under the tuned model. With a tenth of the
quickstart's answers swapped all rows of the worst 1 % were swapped ones, after 3 and after 10
epochs, with LoRA, and with 2 % swapped, too; the losses that were tried beside it found fewer
(docs/negative-results.md). Rare and hard rows stand there as well: it is a list to be read.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepared import TRAIN, open_table
from sft_recipes.data.reading.row_files import display_path
from sft_recipes.data.row_table import Integers, column, record_batch
from sft_recipes.data.trained_rows import trained_indices
from sft_recipes.errors import InputError
from sft_recipes.evaluation.open_run import OpenedRun
from sft_recipes.evaluation.row_losses import row_losses
from sft_recipes.messages import place
from sft_recipes.recipe import Recipe

FILE = "suspects.jsonl"
SHARE = 0.01
LEAST = 10
MOST = 1000
# Of these the report and `metrics.json` show some.
SHOWN = 50


@dataclass(frozen=True, slots=True)
class Suspect:
    """A trained row, its mean loss a trained token, and its text before and in its labels."""

    where: str
    loss: float
    trained_tokens: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Suspects:
    """The trained rows with the highest loss, of `rows` with the median loss `median`."""

    rows: int
    median: float
    listed: Sequence[Suspect]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `metrics.json`."""
        shown = [asdict(suspect) for suspect in self.listed[:SHOWN]]
        return {
            "rows": self.rows,
            "median": self.median,
            "listed": len(self.listed),
            "shown": shown,
        }

    def write(self, folder: Path) -> None:
        """Write all that are listed, the worst first."""
        lines = [json.dumps(asdict(suspect), ensure_ascii=False) for suspect in self.listed]
        text = "".join(f"{line}\n" for line in lines)
        (folder / FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def find_suspects(
    model: Any, run: OpenedRun, recipe: Recipe, folder: Path, progress: bool
) -> Suspects:
    """The worst 1 % of the rows that a run trained, at least ten, the same on every process.

    `folder` holds the prepared rows. Raises InputError if it is not whole.
    """
    trained = trained_indices(recipe, folder)
    table = open_table(folder, TRAIN)
    lengths = column(table, "tokens")[trained]
    rows_trained = table.select(trained)
    title = "loss of training rows"
    losses = row_losses(model, rows_trained, lengths, title, progress).means
    count = min(max(math.ceil(SHARE * len(trained)), LEAST), MOST, len(trained))
    worst = np.argsort(-losses, kind="stable")[:count]
    rows = trained[worst]
    names = _names(run, recipe, table, rows)
    listed = []
    for index, loss in zip(rows.tolist(), losses[worst].tolist(), strict=True):
        listed.append(_suspect(run, names[index], table[index], loss))
    return Suspects(len(trained), float(np.median(losses)), listed)


def _suspect(run: OpenedRun, where: str, row: Mapping[str, Any], loss: float) -> Suspect:
    labels = [label for label in row["labels"] if label != IGNORE_INDEX]
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    decode = run.labeller.renderer.tokenizer.decode
    return Suspect(where, loss, len(labels), decode(row["input_ids"][:first]), decode(labels))


def _names(run: OpenedRun, recipe: Recipe, table: Dataset, rows: Integers) -> dict[int, str]:
    """Where each row of the table stands in its source: the line, where that can still be read."""
    sources = column(table, "source")
    numbers = column(table, "row")
    names = {}
    wanted: dict[tuple[int, int], list[int]] = {}
    for index in rows.tolist():
        source = display_path(Path(recipe.data.datasets[sources[index]].path))
        names[index] = place(source, int(numbers[index]))
        wanted.setdefault((int(sources[index]), int(numbers[index])), []).append(index)
    try:
        names.update(_lines(run, recipe, column(table, "fingerprint"), wanted))
    except InputError:
        # The sources are gone or changed: their names and row numbers stay.
        return names
    return names


def _lines(
    run: OpenedRun,
    recipe: Recipe,
    fingerprints: Integers,
    wanted: Mapping[tuple[int, int], Sequence[int]],
) -> Iterator[tuple[int, str]]:
    for number, source in enumerate(recipe.data.datasets):
        for example in iter_examples(source, recipe.data, RejectLog(recipe.data)):
            indices = wanted.get((number, example.row))
            if indices is None:
                continue
            # Several files of one source count their rows each from 0: the labels tell.
            labelled = run.labeller.label([example]).rows
            zeros = [0] * len(labelled)
            own = record_batch(labelled, 0, zeros, zeros).column("fingerprint").to_pylist()
            for index in indices:
                if fingerprints[index] in own:
                    yield index, example.where
