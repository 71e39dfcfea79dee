"""Training rows that the evaluation has seen: four lexical rules against any evaluation set, clusters across a split.

A row is compared by its prompt without system messages, raw text as a whole. Paraphrases and translations pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from sft_recipes import similarity
from sft_recipes.audit.duplicates import pair_finding
from sft_recipes.audit.finding import Finding, FlaggedRow
from sft_recipes.audit.rows import AuditRow
from sft_recipes.response_patterns import mask
from sft_recipes.similarity import PROMPT_SHINGLE, THRESHOLD, Indices, Shingle

PROMPT_GRAM, ANSWER_GRAM = 8, 13
COVERAGE, SHORT_WORDS, SHORT_JACCARD = 0.5, 16, 0.8
RULES = ("exact prompt", "prompt coverage", "short prompt", "reference answer")
LEAST_TEMPLATE, LEAST_PHRASE = 5, 20
_SHOWN_HITS, _SHOWN_CHARACTERS = 100, 300


@dataclass(frozen=True, slots=True)
class Hit:
    """Evaluation row and training row (positions in their lists), by which rule, how strongly, the text they share."""

    eval_row: int
    train_row: int
    rule: str
    score: float
    text: str


def check_contamination(
    train: Sequence[AuditRow], eval_sets: Mapping[str, Sequence[AuditRow]]
) -> tuple[Finding, list[dict[str, Any]]]:
    """The finding over the training rows to remove, and for each evaluation set its share of rows hit, with spans."""
    reasons: dict[int, dict[str, str]] = defaultdict(dict)
    tables = []
    for name, rows in eval_sets.items():
        hits = find_overlaps(train, rows)
        for hit in hits:
            reasons[hit.train_row].setdefault(rows[hit.eval_row].where, f"{hit.rule} {hit.score:.2f}: {hit.text}")
        best = {
            hit.eval_row: hit
            for hit in sorted(hits, key=lambda one: (-RULES.index(one.rule), one.score, -one.train_row))
        }
        shown = [best[row] for row in sorted(best)[:_SHOWN_HITS]]
        counts = {
            "rows": len(rows),
            "rows_hit": len(best),
            "share": len(best) / len(rows) if rows else None,
            "train_rows": len({hit.train_row for hit in hits}),
            "rows_hit_by_rule": {rule: len({hit.eval_row for hit in hits if hit.rule == rule}) for rule in RULES},
        }
        places = ({"eval": rows[one.eval_row].where, "train": train[one.train_row].where} for one in shown)
        spans = [{**place, "rule": one.rule, "text": one.text} for place, one in zip(places, shown, strict=True)]
        tables.append({"name": name, **counts, "hits": spans})
    flagged = [
        FlaggedRow(train[row].index, train[row].where, next(iter(found.values())), list(found))
        for row, found in sorted(reasons.items())
    ]
    limits = {"coverage": COVERAGE, "short": SHORT_WORDS, "short_jaccard": SHORT_JACCARD}
    return pair_finding("contamination", flagged, len(train), **limits), tables


def check_split_leak(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> Finding:
    """Training rows in a near-duplicate cluster (`prompt_clusters`) that also has rows of the run's own eval split."""
    centres = similarity.prompt_clusters([_subject(row) for row in (*train, *held_out)]).tolist()
    leaked: dict[int, list[str]] = defaultdict(list)
    for row, centre in zip(held_out, centres[len(train) :], strict=True):
        leaked[centre].append(row.where)
    flagged = [
        FlaggedRow(row.index, row.where, "same prompt cluster", leaked[centre])
        for row, centre in zip(train, centres, strict=False)
        if centre in leaked
    ]
    return pair_finding("split_leak", flagged, len(train), threshold=THRESHOLD)


def find_overlaps(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> list[Hit]:
    """Hits of all four rules; a pair of rows with the same prompt stands under the first only."""
    prompts, eval_prompts = [_subject(row) for row in train], [_subject(row) for row in held_out]
    hits = list(_equal(prompts, eval_prompts))
    same = {(hit.eval_row, hit.train_row) for hit in hits}
    answers, references = [row.response for row in train], [row.response for row in held_out]
    for found in (_covered(prompts, eval_prompts), _short(prompts, eval_prompts), _answered(answers, references)):
        hits += [hit for hit in found if (hit.eval_row, hit.train_row) not in same]
    return hits


def _subject(row: AuditRow) -> str:
    return row.question or row.response


def _grouped(texts: Sequence[str], rows: Sequence[int]) -> dict[tuple[int, tuple[str, ...]], list[int]]:
    """Rows by what makes them equal: the normalised text and its numbers. Empty texts are left out."""
    hashes = similarity.text_hashes([texts[row] for row in rows]).tolist()
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for row, value in zip(rows, hashes, strict=True):
        if texts[row].strip():
            groups[value, similarity.number_multiset(texts[row])].append(row)
    return groups


def _equal(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    known = _grouped(eval_prompts, range(len(eval_prompts)))
    possible = np.flatnonzero(np.isin(similarity.text_hashes(prompts), similarity.text_hashes(eval_prompts))).tolist()
    for key, rows in _grouped(prompts, possible).items():
        for number in known.get(key, ()):
            yield from (Hit(number, row, RULES[0], 1.0, mask(eval_prompts[number])[:_SHOWN_CHARACTERS]) for row in rows)


def _short(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    brief = [number for number, prompt in enumerate(eval_prompts) if len(similarity.words(prompt)) < SHORT_WORDS]
    longest = max((len(eval_prompts[number]) for number in brief), default=0)
    left = list(_grouped(eval_prompts, brief).values())
    right = list(_grouped(prompts, [row for row, prompt in enumerate(prompts) if len(prompt) <= 2 * longest]).values())
    texts = [*(eval_prompts[rows[0]] for rows in left), *(prompts[rows[0]] for rows in right)]
    found = similarity.near_duplicates(texts, PROMPT_SHINGLE, SHORT_JACCARD)
    chosen = ~found.variant & (found.jaccard >= SHORT_JACCARD)
    for (one, other), score in zip(found.pairs[chosen].tolist(), found.jaccard[chosen].tolist(), strict=True):
        if one < len(left) <= other:
            pairs = product(left[one], right[other - len(left)])
            yield from (
                Hit(number, row, RULES[2], score, mask(eval_prompts[number])[:_SHOWN_CHARACTERS])
                for number, row in pairs
            )


def _covered(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    own, known = _own_grams(eval_prompts, PROMPT_GRAM)
    total = {number: covered for number, _, covered, _ in _by_pair(own, PROMPT_GRAM)}
    for shared in _shared_grams(prompts, own, known, PROMPT_GRAM):
        for number, row, covered, positions in _by_pair(shared, PROMPT_GRAM, total):
            text = _span(eval_prompts[number], positions, PROMPT_GRAM)
            yield Hit(number, row, RULES[1], covered / total[number], text)


def _answered(answers: Sequence[str], references: Sequence[str]) -> Iterator[Hit]:
    shared = np.concatenate(list(_shared_grams(answers, *_own_grams(references, ANSWER_GRAM), ANSWER_GRAM)))
    _, gram, rows_with = np.unique(shared[:, 0] << 32 | shared[:, 2], return_inverse=True, return_counts=True)
    rare = shared[rows_with[gram] <= max(LEAST_PHRASE, len(answers) // 200)]
    for number, row, _, positions in _by_pair(rare, ANSWER_GRAM):
        yield Hit(number, row, RULES[3], 1.0, _span(references[number], positions, ANSWER_GRAM))


def _own_grams(texts: Sequence[str], size: int) -> tuple[Indices, similarity.Hashes]:
    """Word n-grams of the evaluation rows that are no template text: (m, 3) row, 0, position, sorted; hashes (m,)."""
    # A text of fewer words is one shingle as a whole, and no n-gram.
    enough = np.diff(similarity.shingle_hashes(texts, Shingle("word", 1))[1]) >= size
    hashes, offsets, _ = similarity.shingle_hashes(texts, Shingle("word", size))
    row = np.repeat(np.arange(len(texts)), np.diff(offsets))
    _, gram = np.unique(hashes, return_inverse=True)
    rows_with = np.bincount(np.unique(gram << 32 | row) >> 32)
    kept = np.flatnonzero(enough[row] & (rows_with[gram] <= max(LEAST_TEMPLATE, len(texts) // 20)))
    return np.stack([row, np.zeros_like(row), np.arange(len(row)) - offsets[row]], axis=1)[kept], hashes[kept]


def _shared_grams(texts: Sequence[str], own: Indices, known: similarity.Hashes, size: int) -> Iterator[Indices]:
    """N-grams of evaluation rows that stand in `texts`, some texts at a time: (m, 3) as above with the text's row."""
    order = np.argsort(known, kind="stable")
    known, own = known[order], own[order]
    yield own[:0]
    for rows in similarity.text_chunks(texts, np.arange(len(texts))):
        hashes, offsets, _ = similarity.shingle_hashes([texts[number] for number in rows], Shingle("word", size))
        first, last = (np.searchsorted(known, hashes, side=side) for side in ("left", "right"))
        count = last - first
        shared = own[np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())]
        shared[:, 1] = np.repeat(np.repeat(rows, np.diff(offsets)), count)
        shared = shared[np.lexsort(shared.T[::-1])]
        yield shared[np.any(np.diff(shared, axis=0, prepend=-1) != 0, axis=1)]


def _by_pair(
    grams: Indices, size: int, total: Mapping[int, int] | None = None
) -> Iterator[tuple[int, int, int, Indices]]:
    """Evaluation row, other row, words covered together and positions, where `COVERAGE` of `total` words is reached."""
    starts = np.flatnonzero(np.any(np.diff(grams[:, :2], axis=0, prepend=-1) != 0, axis=1))
    words = np.minimum(np.diff(grams[:, 2], prepend=0), size)
    words[starts] = size
    covered = np.add.reduceat(words, starts) if len(starts) else starts
    pairs = zip(grams[starts, 0].tolist(), grams[starts, 1].tolist(), covered.tolist(), starts.tolist(), strict=True)
    for place, (number, row, count, start) in enumerate(pairs):
        if total is None or count >= COVERAGE * total[number]:
            yield number, row, count, grams[start : starts[place + 1] if place + 1 < len(starts) else None, 2]


def _span(text: str, positions: Indices, size: int) -> str:
    """The longest run of n-grams at adjacent positions, as normalised words; with private data the masked text."""
    if (masked := mask(text)) != text:
        return masked[:_SHOWN_CHARACTERS]
    run = max(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1), key=len)
    return " ".join(similarity.words(text)[run[0] : run[-1] + size])[:_SHOWN_CHARACTERS]
