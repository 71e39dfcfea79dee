"""Rows that say the same as another: exact repeats of four kinds, near-duplicates, and what only looks like one.

A near-duplicate has the same numbers and nearly the same answer as the row that is kept. The same template with other
numbers, and nearly the same prompt with another answer, are listed apart and never called duplicates.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from sft_recipes import similarity
from sft_recipes.audit.finding import AuditRow, Finding, FlaggedRow, flag, make_finding
from sft_recipes.response_patterns import mask
from sft_recipes.similarity import PROMPT_SHINGLE, ROW_SHINGLE, THRESHOLD, Indices, folded

VERY_NEAR = 0.9
# Below it two answers are different answers, however much of the prompt the rows share.
SAME_ANSWER = 0.5
SHOWN_CHARACTERS = 1_000
_CONTROL = re.compile(r"<\|[^<>|]*\|>")


def check_duplicates(rows: Sequence[AuditRow]) -> tuple[list[Finding], dict[str, Any]]:
    """Findings of all six kinds, empty ones included, and plain data for the report (counts, histograms, pairs)."""
    texts = [(folded(row.question), folded(row.response)) for row in rows]
    repeats = {
        "row": _repeats(repr((row.turns, row.example.tools)) for row in rows),
        "messages": _repeats(
            tuple((role, folded(text)) for role, text in row.turns) for row in rows
        ),
        "prompt": _repeats(prompt or None for prompt, _ in texts),
        "response": _repeats(response or None for _, response in texts),
    }
    reworded = [pair for pair in repeats["messages"].items() if pair[0] not in repeats["row"]]
    answered = [
        (row, first) for row, first in repeats["prompt"].items() if texts[row][1] != texts[first][1]
    ]
    # Equal answers to different prompts ("yes", "18", a class label) are only counted.
    pairs = {"row": [*repeats["row"].items()], "messages": reworded, "prompt": answered}
    flagged = {
        f"duplicate_{kind}": [flag(rows[row], f"same {kind}", [rows[first]]) for row, first in some]
        for kind, some in pairs.items()
    }
    close, near = _check_near(
        [row for number, row in enumerate(rows) if number not in repeats["messages"]]
    )
    both = (flagged | close).items()
    findings = [make_finding(check, some, len(rows), threshold=THRESHOLD) for check, some in both]
    return findings, {
        "rows": len(rows),
        "exact": {kind: len(found) for kind, found in repeats.items()},
        **near,
    }


def _repeats(keys: Iterable[Hashable]) -> dict[int, int]:
    """Each row whose key an earlier row has, with the first such row; None is no key."""
    first = dict[
        int, int
    ]()  # by hash: of 64 bits, so that a million rows meet by chance once in 10 million data sets
    pairs = [
        (number, first.setdefault(hash(key), number))
        for number, key in enumerate(keys)
        if key is not None
    ]
    return {number: earlier for number, earlier in pairs if earlier != number}


def _check_near(rows: Sequence[AuditRow]) -> tuple[dict[str, list[FlaggedRow]], dict[str, Any]]:
    """Near-duplicates and their look-alikes among rows that repeat none exactly, and the numbers of them."""
    whole = [f"{row.question}\n{row.response}" for row in rows]
    found = similarity.near_duplicates(whole, ROW_SHINGLE, THRESHOLD)
    # A control token written in every response would make "yes" and "no" alike.
    responses = [_CONTROL.sub(" ", row.response) for row in rows]
    same_answer = similarity.jaccard_of_pairs(responses, found.pairs, PROMPT_SHINGLE) >= SAME_ANSWER
    alike, above = ~found.variant & same_answer, found.jaccard >= THRESHOLD
    pairs, jaccard = found.pairs[alike & above], found.jaccard[alike & above].tolist()
    value = dict(zip(map(tuple, pairs.tolist()), jaccard, strict=True))
    centres, first = similarity.star_centres(found.first, pairs).tolist(), found.first.tolist()
    # A copy of a row that goes is as near to the centre as that row is.
    scores = {
        row: value.get((centre, first[row]), 1.0)
        for row, centre in enumerate(centres)
        if centre != row
    }
    prompts = similarity.near_duplicates([row.question for row in rows], PROMPT_SHINGLE, THRESHOLD)
    close = prompts.pairs[~prompts.variant & (prompts.jaccard >= THRESHOLD)]
    questions = [folded(row.question) for row in rows]
    other = [(a, b) not in value and questions[a] != questions[b] for a, b in close.tolist()]
    nearly = [
        flag(rows[row], f"{score:.0%} alike", [rows[centres[row]]]) for row, score in scores.items()
    ]
    flagged = {
        "near_duplicate": nearly,
        "near_duplicate_prompt": _later(rows, close[other], "nearly the same prompt"),
        "template_variant": _later(rows, found.pairs[found.variant & above], "other numbers"),
    }
    edges = np.arange(50, 101, 5) / 100
    sizes = sorted(Counter(Counter(centres).values()).items())
    return flagged, {
        "near": {
            "threshold": THRESHOLD,
            "rows": len(scores),
            "rows_at_least_0.9": sum(score >= VERY_NEAR for score in scores.values()),
            "clusters_by_size": {str(size): count for size, count in sizes if size > 1},
            "histogram": {
                "edges": edges.tolist(),
                "counts": np.histogram(found.jaccard[alike], edges)[0].tolist(),
            },
            "just_above": _shown(whole, rows, found, alike & above, 1),
            "just_below": _shown(whole, rows, found, alike & ~above, -1),
        },
        "template_variants": _shown(whole, rows, found, found.variant & above, -1),
    }


def _later(rows: Sequence[AuditRow], pairs: Indices, detail: str) -> list[FlaggedRow]:
    """The later row of each pair, once, with all earlier ones."""
    earlier: dict[int, list[AuditRow]] = defaultdict(list)
    for one, other in pairs.tolist():
        earlier[other].append(rows[one])
    return [flag(rows[number], detail, others) for number, others in sorted(earlier.items())]


def _shown(
    texts: Sequence[str],
    rows: Sequence[AuditRow],
    found: similarity.Duplicates,
    chosen: similarity.Mask,
    order: int,
) -> list[dict[str, Any]]:
    """Five pairs of texts, those with the lowest Jaccard for order 1, with the highest for -1."""
    places = np.flatnonzero(chosen)
    places = places[np.argsort(order * found.jaccard[places], kind="stable")][:5]
    return [
        {
            "jaccard": round(score, 4),
            "where": [rows[row].where for row in pair],
            "texts": [mask(texts[row])[:SHOWN_CHARACTERS] for row in pair],
        }
        for pair, score in zip(
            found.pairs[places].tolist(), found.jaccard[places].tolist(), strict=True
        )
    ]
