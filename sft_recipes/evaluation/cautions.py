"""What makes the figures of an evaluation worth less than they look: said above everything else."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.evaluation.training_rows import TrainingRows
from sft_recipes.model_folder import was_trained
from sft_recipes.overlap import trained_on


def cautions(training: TrainingRows, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each, in the order of their weight; `rows` are the scored ones."""
    return [*_of_training(training, len(rows)), *_of_budget(rows)]


def of_template(model: str, renderer: ChatRenderer, named: str | None) -> list[str]:
    """A run of another tool that has no template of its own is asked in ours, unless one was named."""
    if named or renderer.has_own_template or not was_trained(Path(model)):
        return []
    return [
        "the run has no chat template, and was asked in `instruction` (### Instruction:). Fix: if it was "
        "trained otherwise, add --chat_template FILE.jinja"
    ]


def _of_training(training: TrainingRows, asked: int) -> Iterator[str]:
    if training.unknown:
        yield f"whether these rows were trained on is not known: {training.unknown}"
    if not training.seen:
        return
    first = training.seen[0]
    relation = trained_on(Counter(row.rule for row in training.seen))
    yield (
        f"{len(training.seen)} of {asked} rows were {relation}: the figures flatter the model. "
        f"{first.where} is like {first.trained} ({first.rule})"
    )


def _of_budget(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    too_long = [row for row in rows if row.get("reference_beyond_budget")]
    if not too_long:
        return
    # One more for the token that ends the answer.
    needed = 1 + max(row["reference_tokens"] for row in too_long)
    yield (
        f"{len(too_long)} of {len(rows)} references do not fit into --max_new_tokens with their "
        f"end: answers to them are cut. Fix: add --max_new_tokens {needed}"
    )
