"""Training rows that the evaluation has seen: four lexical rules against any evaluation set, clusters across a split.

A row is compared by its prompt without system messages, raw text as a whole. Paraphrases and translations pass.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sft_recipes import similarity
from sft_recipes.audit.finding import AuditRow, Finding, excerpt, flag, make_finding
from sft_recipes.response_patterns import mask
from sft_recipes.similarity import PROMPT_SHINGLE, ROW_SHINGLE, THRESHOLD, Shingle

PROMPT_GRAM, ANSWER_GRAM = 8, 13
COVERAGE, SHORT_WORDS, SHORT_JACCARD = 0.5, 16, 0.8
RULES = EXACT, COVERED, SHORT, ANSWERED = (
    "exact prompt",
    "prompt coverage",
    "short prompt",
    "reference answer",
)
LEAST_TEMPLATE, LEAST_PHRASE = 5, 20
_SHOWN_HITS, _SPAN_CHARACTERS, _SHOWN_CHARACTERS, _BEFORE = 100, 300, 1000, 200


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
    """The finding over the training rows to remove, and for each evaluation set its share of rows hit, with texts."""
    leaks: dict[int, list[tuple[AuditRow, str]]] = defaultdict(list)
    tables = []
    for name, rows in eval_sets.items():
        hits = find_overlaps(train, rows)
        for hit in hits:
            leaks[hit.train_row].append(
                (rows[hit.eval_row], f"{hit.rule} {hit.score:.2f}: {excerpt(hit.text)}")
            )
        ranked = sorted(hits, key=lambda one: (-RULES.index(one.rule), one.score, -one.train_row))
        best = {hit.eval_row: hit for hit in ranked}
        table = {
            "name": name,
            "rows": len(rows),
            "rows_hit": len(best),
            "share": len(best) / len(rows) if rows else None,
            "train_rows": len({hit.train_row for hit in hits}),
            "rows_hit_by_rule": {
                rule: len({hit.eval_row for hit in hits if hit.rule == rule}) for rule in RULES
            },
            "hits": [
                _shown(best[row], rows[row], train[best[row].train_row])
                for row in sorted(best)[:_SHOWN_HITS]
            ],
        }
        tables.append(table)
    flagged = [
        flag(
            train[row],
            found[0][1],
            list({held_out.where: held_out for held_out, _ in found}.values()),
        )
        for row, found in sorted(leaks.items())
    ]
    limits = {"coverage": COVERAGE, "short": SHORT_WORDS, "short_jaccard": SHORT_JACCARD}
    return make_finding("contamination", flagged, len(train), **limits), tables


def _shown(hit: Hit, held_out: AuditRow, train: AuditRow) -> dict[str, Any]:
    """Where a hit stands, and both texts around what they share, as they are spelled but for private data."""
    span, texts = re.compile(r"[\W_]*".join(map(re.escape, hit.text.split())), re.IGNORECASE), []
    for row in (held_out, train):
        text = mask(row.response if hit.rule == ANSWERED else _subject(row))
        start = max(match.start() - _BEFORE, 0) if (match := span.search(text)) else 0
        texts.append("... " * (start > 0) + text[start : start + _SHOWN_CHARACTERS])
    return {
        "eval": held_out.where,
        "train": train.where,
        "rule": hit.rule,
        "text": hit.text,
        "texts": texts,
    }


def check_split_leak(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> Finding:
    """Training rows in a near-duplicate cluster (`prompt_clusters`) that also has rows of the run's own eval split."""
    centres = similarity.prompt_clusters([_subject(row) for row in (*train, *held_out)]).tolist()
    leaked: dict[int, list[AuditRow]] = defaultdict(list)
    for row, centre in zip(held_out, centres[len(train) :], strict=True):
        leaked[centre].append(row)
    pairs = zip(train, centres, strict=False)
    flagged = [
        flag(row, "same prompt cluster", leaked[centre])
        for row, centre in pairs
        if centre in leaked
    ]
    return make_finding("split_leak", flagged, len(train), threshold=THRESHOLD)


def find_overlaps(train: Sequence[AuditRow], held_out: Sequence[AuditRow]) -> list[Hit]:
    """Hits of all four rules; a pair of rows with the same prompt stands under the first only."""
    prompts, eval_prompts = [_subject(row) for row in train], [_subject(row) for row in held_out]
    hits = list(_alike(prompts, eval_prompts))
    same = {(hit.eval_row, hit.train_row) for hit in hits if hit.rule == EXACT}
    hits += _covered(prompts, eval_prompts)
    hits += _answered([row.response for row in train], [row.response for row in held_out])
    return [hit for hit in hits if hit.rule == EXACT or (hit.eval_row, hit.train_row) not in same]


def _subject(row: AuditRow) -> str:
    return row.question or row.response


def _alike(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    """Equal prompts, and short evaluation prompts that nearly equal a training prompt."""
    texts = [*eval_prompts, *prompts]
    chunks = similarity.text_chunks(texts, np.arange(len(texts)))
    whole = [
        similarity.shingle_hashes([texts[row] for row in rows], ROW_SHINGLE)[2] for rows in chunks
    ]
    groups: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, first in enumerate(
        similarity.first_equal(texts, np.concatenate(whole)).tolist() if texts else ()
    ):
        if texts[row].strip():
            groups[first][row >= len(eval_prompts)].append(row)
    brief = {
        one
        for one, (held, _) in groups.items()
        if held and len(similarity.words(texts[one])) < SHORT_WORDS
    }
    longest = 2 * max((len(texts[one]) for one in brief), default=0)
    chosen = [one for one in groups if one in brief or len(texts[one]) <= longest]
    found = similarity.near_duplicates(
        [texts[one] for one in chosen], PROMPT_SHINGLE, SHORT_JACCARD
    )
    close = ~found.variant & (found.jaccard >= SHORT_JACCARD)
    pairs = [(one, one, EXACT, 1.0) for one in groups]
    for places, score in zip(
        found.pairs[close].tolist(), found.jaccard[close].tolist(), strict=True
    ):
        one, other = (chosen[place] for place in places)
        pairs += [
            (left, right, SHORT, score)
            for left, right in ((one, other), (other, one))
            if left in brief
        ]
    for left, right, rule, score in pairs:
        for number in groups[left][0] if groups[right][1] else ():
            text = mask(eval_prompts[number])[:_SPAN_CHARACTERS]
            yield from (
                Hit(number, row - len(eval_prompts), rule, score, text) for row in groups[right][1]
            )


def _covered(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    pairs, total = _shared_grams(prompts, eval_prompts, PROMPT_GRAM, len(prompts))
    for (number, row), positions in pairs.items():
        share = _covered_words(positions, PROMPT_GRAM) / total[number]
        if share >= COVERAGE:
            yield Hit(
                number, row, COVERED, share, _span(eval_prompts[number], positions, PROMPT_GRAM)
            )


def _answered(answers: Sequence[str], references: Sequence[str]) -> Iterator[Hit]:
    pairs, _ = _shared_grams(
        answers, references, ANSWER_GRAM, max(LEAST_PHRASE, len(answers) // 200)
    )
    for (number, row), positions in pairs.items():
        yield Hit(number, row, ANSWERED, 1.0, _span(references[number], positions, ANSWER_GRAM))


def _shared_grams(
    texts: Sequence[str], held_out: Sequence[str], size: int, most: int
) -> tuple[dict[tuple[int, int], list[int]], list[int]]:
    """Positions of the word n-grams that an evaluation row and a text share, and the words in all of each row's own.

    Template text is not its own; n-grams of more than `most` texts are left out. Positions rise.
    """
    # A text of fewer words would be one shingle as a whole, and no n-gram.
    held_out = [text if len(similarity.words(text)) >= size else "" for text in held_out]
    hashes, offsets, _ = similarity.shingle_hashes(held_out, Shingle("word", size))
    row = np.repeat(np.arange(len(held_out)), np.diff(offsets))
    gram = np.unique(hashes, return_inverse=True)[1]
    rows_with = np.bincount(np.unique(gram << 32 | row) >> 32)
    is_own = rows_with[gram] <= max(LEAST_TEMPLATE, len(held_out) // 20)
    rows_of: dict[int, dict[int, None]] = defaultdict(dict)
    for part in similarity.text_chunks(texts, np.arange(len(texts))):
        found, starts, _ = similarity.shingle_hashes(
            [texts[number] for number in part], Shingle("word", size)
        )
        shared = np.flatnonzero(np.isin(found, hashes[is_own]))
        owner = part[np.searchsorted(starts, shared, side="right") - 1]
        for value, number in zip(found[shared].tolist(), owner.tolist(), strict=True):
            rows_of[value][number] = None
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for at in np.flatnonzero(
        is_own & np.isin(hashes, np.array(list(rows_of), dtype=np.uint64))
    ).tolist():
        for number in others if len(others := rows_of[int(hashes[at])]) <= most else ():
            pairs[int(row[at]), number].append(at - int(offsets[row[at]]))
    return pairs, [
        _covered_words(np.flatnonzero(part).tolist(), size)
        for part in np.split(is_own, offsets[1:-1])
    ]


def _covered_words(positions: Sequence[int], size: int) -> int:
    return size + sum(min(later - one, size) for one, later in pairwise(positions))


def _span(text: str, positions: Sequence[int], size: int) -> str:
    """The longest run of n-grams at adjacent positions, as normalised words; with private data the masked text."""
    if (masked := mask(text)) != text:
        return masked[:_SPAN_CHARACTERS]
    run = max(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1), key=len)
    return " ".join(similarity.words(text)[run[0] : run[-1] + size])[:_SPAN_CHARACTERS]
