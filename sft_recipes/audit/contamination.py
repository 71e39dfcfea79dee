"""Training rows that the evaluation has seen (`overlap.py`): finding and tables of the audit."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes import similarity
from sft_recipes.audit.finding import AuditRow, Finding, excerpt, flag, make_finding
from sft_recipes.overlap import (
    ANSWERED,
    COVERAGE,
    EXACT,
    SHORT_JACCARD,
    SHORT_WORDS,
    Hit,
    answer_overlaps,
    best_hits,
    prompt_overlaps,
    rows_hit_by_rule,
)
from sft_recipes.response_patterns import mask

_SHOWN_HITS = 100
_SHOWN_CHARACTERS = 1000
_BEFORE = 200


class _Leak(NamedTuple):
    """An evaluation row that a training row repeats, and what was seen."""

    held_out: AuditRow
    detail: str


def check_contamination(
    train: Sequence[AuditRow], eval_sets: Mapping[str, Sequence[AuditRow]]
) -> tuple[Finding, list[dict[str, Any]]]:
    """The finding over the training rows to remove, and a table for each evaluation set.

    A table holds the share of the set's rows that are hit, with texts.
    """
    leaks: dict[int, list[_Leak]] = defaultdict(list)
    tables = []
    for name, held_out in eval_sets.items():
        hits = find_overlaps(train, held_out)
        tables.append(_table(name, held_out, train, hits))
        for hit in hits:
            detail = f"{hit.rule} {hit.score:.2f}: {excerpt(hit.text)}"
            leaks[hit.train_row].append(_Leak(held_out[hit.eval_row], detail))
    flagged = []
    for row in sorted(leaks):
        related = {leak.held_out.where: leak.held_out for leak in leaks[row]}
        first_leak = leaks[row][0]
        flagged.append(flag(train[row], first_leak.detail, list(related.values())))
    finding = make_finding(
        "contamination",
        flagged,
        len(train),
        coverage=COVERAGE,
        short=SHORT_WORDS,
        short_jaccard=SHORT_JACCARD,
    )
    return finding, tables


def _table(
    name: str, held_out: Sequence[AuditRow], train: Sequence[AuditRow], hits: Sequence[Hit]
) -> dict[str, Any]:
    best = best_hits(hits)
    shown = []
    for row in list(best)[:_SHOWN_HITS]:
        hit = best[row]
        shown.append(_shown(hit, held_out[row], train[hit.train_row]))
    return {
        "name": name,
        "rows": len(held_out),
        "rows_hit": len(best),
        "share": len(best) / len(held_out) if held_out else None,
        "train_rows": len({hit.train_row for hit in hits}),
        "rows_hit_by_rule": rows_hit_by_rule(hits),
        "hits": shown,
    }


def _shown(hit: Hit, held_out: AuditRow, train: AuditRow) -> dict[str, Any]:
    """Where a hit stands, and both texts around what they share, private data masked."""
    # The shared text is normalised: any punctuation and any space may stand between its words.
    shared_words = map(re.escape, hit.text.split())
    shared = re.compile(r"[\W_]*".join(shared_words), re.IGNORECASE)
    texts = []
    for row in (held_out, train):
        text = mask(row.response if hit.rule == ANSWERED else _subject(row))
        match = shared.search(text)
        start = max(match.start() - _BEFORE, 0) if match else 0
        shown = text[start : start + _SHOWN_CHARACTERS]
        texts.append(f"... {shown}" if start else shown)
    return {
        "eval": held_out.where,
        "train": train.where,
        "rule": hit.rule,
        "text": hit.text,
        "texts": texts,
    }


def check_split_leak(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> Finding:
    """Training rows whose prompt is in one cluster with rows of the run's own eval split.

    The clusters are those of `prompt_clusters`.
    """
    prompts = _subjects([*train, *held_out])
    clusters = similarity.prompt_clusters(prompts).tolist()
    held_out_in: dict[int, list[AuditRow]] = defaultdict(list)
    for row, cluster in zip(held_out, clusters[len(train) :], strict=True):
        held_out_in[cluster].append(row)
    flagged = []
    for row, cluster in zip(train, clusters[: len(train)], strict=True):
        if cluster in held_out_in:
            flagged.append(flag(row, "same prompt cluster", held_out_in[cluster]))
    return make_finding("split_leak", flagged, len(train), threshold=similarity.THRESHOLD)


def find_overlaps(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> list[Hit]:
    """Hits of all four rules; a pair of rows with the same prompt stands under the first only."""
    hits = prompt_overlaps(_subjects(train), _subjects(held_out))
    same = {(hit.eval_row, hit.train_row) for hit in hits if hit.rule == EXACT}
    answers = [row.response for row in train]
    references = [row.response for row in held_out]
    for hit in answer_overlaps(answers, references):
        if (hit.eval_row, hit.train_row) not in same:
            hits.append(hit)
    return hits


def _subject(row: AuditRow) -> str:
    return row.question or row.response


def _subjects(rows: Sequence[AuditRow]) -> list[str]:
    return list(map(_subject, rows))
