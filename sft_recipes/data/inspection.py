"""Rows exactly as the trainer sees them: ids, labels, and which tokens are trained."""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

from rich.text import Text

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, DroppedRow, LabelledRow, Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepare import batches
from sft_recipes.messages import Example, visible
from sft_recipes.recipe import DataSettings, LabelSettings

# An input row with its training row, or with the reason why it has none.
InspectedRow = tuple[Example, LabelledRow | DroppedRow]


def inspect_rows(
    renderer: ChatRenderer, data: DataSettings, labels: LabelSettings, limit: int | None = None
) -> Iterator[InspectedRow]:
    """Label the first `limit` input rows (all by default) of every data set, in order, dropped ones included."""
    labeller, rejects = Labeller(renderer, labels), RejectLog(data)
    for source in data.datasets:
        for batch in batches(islice(iter_examples(source, data, rejects=rejects), limit)):
            labelled = labeller.label(batch)
            every: list[LabelledRow | DroppedRow] = [*labelled.rows, *labelled.dropped]
            for found in sorted(every, key=attrgetter("example")):
                yield batch[found.example], found


def row_json(renderer: ChatRenderer, example: Example, row: LabelledRow) -> dict[str, Any]:
    """The row for `inspect --json`; `text` is what the ids decode to."""
    text = renderer.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
    place = {"row": example.row, "source": example.source}
    return {**place, "text": text, "input_ids": row.input_ids, "labels": row.labels}


def pieces(renderer: ChatRenderer, row: LabelledRow) -> Iterator[tuple[str, bool, bool]]:
    """The row's text in runs of tokens: the text, whether it is trained, whether it is special tokens."""
    special = set(renderer.special_tokens.values())
    pairs = zip(row.input_ids, row.labels, strict=True)
    for kind, run in groupby(pairs, lambda pair: (pair[1] != IGNORE_INDEX, pair[0] in special)):
        yield renderer.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False), *kind


def coloured(renderer: ChatRenderer, row: LabelledRow) -> Text:
    """The row's text with trained tokens in green on the rest in grey; special tokens bold, invisibles shown."""
    text = Text()
    for piece, trained, special in pieces(renderer, row):
        text.append(visible(piece), ("green" if trained else "grey50") + (" bold" if special else ""))
    return text


def summary_line(rows: Sequence[InspectedRow]) -> str:
    """How many rows were shown and what share of their tokens is trained."""
    kept = [row for _, row in rows if isinstance(row, LabelledRow)]
    trained, total = sum(row.trained_tokens for row in kept), sum(len(row.ids) for row in kept)
    return f"{len(kept)} rows shown, {trained} of {total} tokens trained, {len(rows) - len(kept)} dropped"
