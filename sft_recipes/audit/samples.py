"""Some rows for people, as the trainer sees them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes.audit.finding import AuditRow, excerpt
from sft_recipes.data.inspection import token_runs
from sft_recipes.data.labels import Labeller

_SAMPLES = 20
_LONGEST = 800


class Passage(NamedTuple):
    """A part of a row's text, and whether it is trained."""

    text: str
    is_trained: bool


def draw_samples(
    rows: Sequence[AuditRow],
    reasons: Mapping[int, Sequence[str]],
    labeller: Labeller | None,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """20 kept and 20 dropped rows by seed, each with its passages. `reasons`: why, by row index."""
    choices: dict[str, list[AuditRow]] = {"kept": [], "dropped": []}
    for row in rows:
        name = "dropped" if row.index in reasons else "kept"
        choices[name].append(row)
    samples: dict[str, list[dict[str, Any]]] = {"kept": [], "dropped": []}
    for name, all_rows in choices.items():
        for row in random.Random(seed).sample(all_rows, min(_SAMPLES, len(all_rows))):
            sample = {
                "where": row.where,
                "reasons": reasons.get(row.index, []),
                "text": _passages(row, labeller),
            }
            samples[name].append(sample)
    return samples


def _passages(row: AuditRow, labeller: Labeller | None) -> list[Passage]:
    passages = []
    if labeller is not None:
        passages = _rendered(row, labeller)
    if not passages:
        passages = _spoken(row, marks_answers=labeller is None)
    return passages


def _rendered(row: AuditRow, labeller: Labeller) -> list[Passage]:
    """The rendered row, the last of a conversation with a row for each turn; none if none is."""
    labelled = labeller.label([row.example]).rows
    if not labelled:
        return []
    passages = []
    for run in token_runs(labeller.renderer, labelled[-1]):
        passages.append(Passage(excerpt(run.text, _LONGEST), run.is_trained))
    return passages


def _spoken(row: AuditRow, marks_answers: bool) -> list[Passage]:
    """The turns, each behind its role."""
    passages = []
    for turn in row.turns:
        is_marked = marks_answers and turn.role == "assistant"
        passages.append(Passage(f"\n{turn.role}: ", False))
        passages.append(Passage(excerpt(turn.content, _LONGEST), is_marked))
    return passages
