"""Rows exactly as the trainer sees them: ids, labels, and which tokens are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, DroppedRow, LabelledRow, Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepared_batch import batches
from sft_recipes.data.reading.rejects import RejectedRow
from sft_recipes.data.template_trial import RowBlame
from sft_recipes.data.workers import Workers
from sft_recipes.messages import Example, visible
from sft_recipes.recipe import DataSettings


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """An input row with its training row, or with the reason why it has none."""

    example: Example
    result: LabelledRow | DroppedRow


class TokensAndLabels(Protocol):
    """A training row, whoever made it."""

    @property
    def input_ids(self) -> list[int]:
        """The row's ids."""

    @property
    def labels(self) -> list[int]:
        """The id to be learned at each position, or -100."""


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens of one kind, as text."""

    text: str
    is_trained: bool
    is_special: bool


@dataclass(frozen=True, slots=True)
class _AlikeTokens:
    """Ids of neighbouring tokens of one kind."""

    ids: list[int]
    is_trained: bool
    is_special: bool

    def is_alike(self, is_trained: bool, is_special: bool) -> bool:
        """Whether a token of this kind belongs to the run."""
        return self.is_trained == is_trained and self.is_special == is_special


def inspect_rows(
    labeller: Labeller, data: DataSettings, rejects: RejectLog, limit: int | None = None
) -> Iterator[InspectedRow]:
    """Label the first `limit` input rows (all by default) of every data set, in order.

    Dropped ones are included.
    """
    workers = Workers(labeller.label, data.dataset_num_proc, RowBlame(labeller))
    for source in data.datasets:
        examples = islice(iter_examples(source, data, rejects=rejects), limit)
        for batch, labelled in workers.map(batches(examples)):
            results: list[LabelledRow | DroppedRow] = [*labelled.rows, *labelled.dropped]
            for result in sorted(results, key=lambda row: row.example):
                yield InspectedRow(batch[result.example], result)


def row_json(renderer: ChatRenderer, example: Example, row: TokensAndLabels) -> dict[str, Any]:
    """The row for `inspect --json`; `text` is what the ids decode to."""
    text = renderer.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
    return {
        "row": example.row,
        "source": example.source,
        "text": text,
        "input_ids": row.input_ids,
        "labels": row.labels,
    }


def token_runs(renderer: ChatRenderer, row: TokensAndLabels) -> Iterator[TokenRun]:
    """The row's text in runs of tokens that are alike: trained or not, special or not."""
    special = set(renderer.special_tokens.values())
    runs: list[_AlikeTokens] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        is_trained = label != IGNORE_INDEX
        is_special = token in special
        if not runs or not runs[-1].is_alike(is_trained, is_special):
            runs.append(_AlikeTokens([], is_trained, is_special))
        runs[-1].ids.append(token)
    for run in runs:
        text = renderer.tokenizer.decode(run.ids, clean_up_tokenization_spaces=False)
        yield TokenRun(text, run.is_trained, run.is_special)


def coloured(renderer: ChatRenderer, row: TokensAndLabels) -> Text:
    """The row's text with trained tokens in green on the rest in grey.

    Special tokens bold, invisibles shown.
    """
    text = Text()
    for run in token_runs(renderer, row):
        style = "grey50"
        if run.is_trained:
            style = "green"
        if run.is_special:
            style += " bold"
        text.append(visible(run.text), style)
    return text


def summary_line(rows: Sequence[InspectedRow], rejected: int = 0) -> str:
    """How many rows were shown and what share of their tokens is trained, and how many were not."""
    shown = 0
    trained = 0
    total = 0
    for row in rows:
        if isinstance(row.result, LabelledRow):
            shown += 1
            trained += row.result.trained_tokens
            total += len(row.result.ids)
    tokens = f"{trained} of {total} tokens trained"
    line = f"{shown} rows shown, {tokens}, {len(rows) - shown} dropped"
    if rejected:
        line += f", {rejected} rejected"
    return line


def rejected_json(row: RejectedRow) -> dict[str, Any]:
    """A row that is no example for `inspect --json`; `rejected` begins with its `FILE:LINE`."""
    return {
        "row": row.row,
        "source": row.file,
        "rejected": str(row.problem),
    }


def show_rows(
    renderer: ChatRenderer, rows: Sequence[InspectedRow], rejects: RejectLog | None = None
) -> None:
    """Print rows for people, each under its place, those that were rejected, and the summary."""
    console = Console()
    for row in rows:
        console.rule(row.example.where, align="left", style="grey50")
        if isinstance(row.result, DroppedRow):
            line = f"dropped, {row.result.reason}: {row.result.detail}"
            console.print(line, style="red", markup=False)
        else:
            console.print(coloured(renderer, row.result), soft_wrap=True)
    rejected = 0
    if rejects is not None:
        rejected = rejects.total
        for reject in rejects.rows:
            console.print(f"rejected, {reject.problem}", style="red", markup=False, soft_wrap=True)
    console.print(f"\n{summary_line(rows, rejected)} (green = trained)\n", markup=False)
