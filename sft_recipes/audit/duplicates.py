"""Rows that say the same as another: exact repeats of four kinds, near-duplicates, look-alikes.

A near-duplicate has the same numbers and nearly the same answer as the row that is kept. The same
template with other numbers, and nearly the same prompt with another answer, are listed by
themselves and never called duplicates.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sft_recipes import similarity
from sft_recipes.audit.finding import AuditRow, Finding, FlaggedRow, flag, make_finding
from sft_recipes.response_patterns import mask
from sft_recipes.shingles import (
    PROMPT_SHINGLE,
    ROW_SHINGLE,
    Indices,
    Mask,
    folded,
    jaccard_of_pairs,
)
from sft_recipes.similarity import THRESHOLD, Duplicates

VERY_NEAR = 0.9
# Below it two answers are different answers, however much of the prompt the rows share.
SAME_ANSWER = 0.5
SHOWN_CHARACTERS = 1_000
_SHOWN_PAIRS = 5
_CONTROL = re.compile(r"<\|[^<>|]*\|>")
_NOTHING = hash("")

# Position of a row that repeats another -> that of the first row which says the same.
Repeats = Mapping[int, int]
Flagged = dict[str, list[FlaggedRow]]


class _RowKeys(NamedTuple):
    """What has to be equal in two rows, by the kind of repeat; 0 for a text that says nothing.

    Hashes: of 64 bits, so that a million rows meet by chance once in 10 million data sets.
    """

    row: int
    messages: int
    prompt: int
    response: int

    @classmethod
    def of(cls, row: AuditRow) -> _RowKeys:
        """All but the first are the same for texts that differ in case and white space only."""
        messages = []
        for turn in row.turns:
            messages.append((turn.role, folded(turn.content)))
        return cls(
            row=hash(repr((row.turns, row.example.tools))),
            messages=hash(tuple(messages)),
            prompt=hash(folded(row.question)),
            response=hash(folded(row.response)),
        )


@dataclass(frozen=True, slots=True)
class _NearRows:
    """Pairs of rows whose texts are alike, and what kind of pair each is (m,).

    `near`: nearly the same answer and the same numbers; `above`: they reach the threshold.
    `centres` (n,): the row that stays of each group of near-duplicates. `scores`: Jaccard of each
    row that goes, by its position.
    """

    rows: Sequence[AuditRow]
    texts: Sequence[str]
    duplicates: Duplicates
    near: Mask
    above: Mask
    centres: Sequence[int]
    scores: Mapping[int, float]


def check_duplicates(rows: Sequence[AuditRow]) -> tuple[list[Finding], dict[str, Any]]:
    """Findings of all six kinds, empty ones included, and plain data for the report."""
    keys = [_RowKeys.of(row) for row in rows]
    repeats: dict[str, Repeats] = {
        "row": _repeats(key.row for key in keys),
        "messages": _repeats(key.messages for key in keys),
        "prompt": _repeats(key.prompt for key in keys),
        "response": _repeats(key.response for key in keys),
    }
    flagged = _flag_repeats(rows, keys, repeats)
    different = []
    for number, row in enumerate(rows):
        if number not in repeats["messages"]:
            different.append(row)
    near_rows = _find_near_rows(different)
    flagged |= _flag_near_rows(near_rows)
    findings = []
    for check, flagged_rows in flagged.items():
        findings.append(make_finding(check, flagged_rows, len(rows), threshold=THRESHOLD))
    variants = near_rows.duplicates.variant & near_rows.above
    content = {
        "rows": len(rows),
        "exact": {kind: len(repeated) for kind, repeated in repeats.items()},
        "near": _summarise(near_rows),
        "template_variants": _highest(near_rows, variants),
    }
    return findings, content


def _repeats(keys: Iterable[int]) -> Repeats:
    """Each row whose key an earlier row has, with the first such row."""
    first_of_key: dict[int, int] = {}
    repeats = {}
    for number, key in enumerate(keys):
        if key == _NOTHING:
            continue
        first = first_of_key.setdefault(key, number)
        if first != number:
            repeats[number] = first
    return repeats


def _flag_repeats(
    rows: Sequence[AuditRow], keys: Sequence[_RowKeys], repeats: Mapping[str, Repeats]
) -> Flagged:
    """Each repeat under one kind. Equal answers to different prompts ("yes", a class label) are
    only counted.
    """
    flagged: Flagged = {"duplicate_row": [], "duplicate_messages": [], "duplicate_prompt": []}
    for number, first in repeats["row"].items():
        flagged["duplicate_row"].append(flag(rows[number], "same row", [rows[first]]))
    for number, first in repeats["messages"].items():
        if number not in repeats["row"]:
            flagged_row = flag(rows[number], "same messages", [rows[first]])
            flagged["duplicate_messages"].append(flagged_row)
    for number, first in repeats["prompt"].items():
        if keys[number].response != keys[first].response:
            flagged_row = flag(rows[number], "same prompt", [rows[first]])
            flagged["duplicate_prompt"].append(flagged_row)
    return flagged


def _find_near_rows(rows: Sequence[AuditRow]) -> _NearRows:
    """Near-duplicates and their look-alikes among rows that repeat none exactly."""
    texts = []
    responses = []
    for row in rows:
        texts.append(f"{row.question}\n{row.response}")
        # A control token written in every response would make "yes" and "no" alike.
        responses.append(_CONTROL.sub(" ", row.response))
    duplicates = similarity.near_duplicates(texts, ROW_SHINGLE, THRESHOLD)
    answers_alike = jaccard_of_pairs(responses, duplicates.pairs, PROMPT_SHINGLE)
    near = ~duplicates.variant & (answers_alike >= SAME_ANSWER)
    above = duplicates.jaccard >= THRESHOLD
    near_pairs = duplicates.pairs[near & above]
    centres = similarity.star_centres(duplicates.first, near_pairs).tolist()
    return _NearRows(
        rows=rows,
        texts=texts,
        duplicates=duplicates,
        near=near,
        above=above,
        centres=centres,
        scores=_scores(duplicates, near & above, centres),
    )


def _scores(duplicates: Duplicates, chosen: Mask, centres: Sequence[int]) -> dict[int, float]:
    """The Jaccard of each row that goes and its centre."""
    pairs = map(tuple, duplicates.pairs[chosen].tolist())
    jaccard = dict(zip(pairs, duplicates.jaccard[chosen].tolist(), strict=True))
    first = duplicates.first.tolist()
    scores = {}
    for number, centre in enumerate(centres):
        if centre != number:
            # A copy of a row that goes is as near to the centre as that row is.
            scores[number] = jaccard.get((centre, first[number]), 1.0)
    return scores


def _flag_near_rows(near_rows: _NearRows) -> Flagged:
    rows = near_rows.rows
    duplicates = near_rows.duplicates
    nearly = []
    for number, score in near_rows.scores.items():
        centre = near_rows.centres[number]
        nearly.append(flag(rows[number], f"{score:.0%} alike", [rows[centre]]))
    variants = duplicates.pairs[duplicates.variant & near_rows.above]
    return {
        "near_duplicate": nearly,
        "near_duplicate_prompt": _flag_near_prompts(near_rows),
        "template_variant": _flag_later(rows, variants.tolist(), "other numbers"),
    }


def _flag_near_prompts(near_rows: _NearRows) -> list[FlaggedRow]:
    """Rows with nearly the prompt of another that is neither a near-duplicate nor has the same."""
    rows = near_rows.rows
    questions = [row.question for row in rows]
    prompts = similarity.near_duplicates(questions, PROMPT_SHINGLE, THRESHOLD)
    close = ~prompts.variant & (prompts.jaccard >= THRESHOLD)
    near_pairs = near_rows.duplicates.pairs[near_rows.near & near_rows.above]
    near_duplicates = set(map(tuple, near_pairs.tolist()))
    pairs = []
    for earlier, later in prompts.pairs[close].tolist():
        is_same = folded(questions[earlier]) == folded(questions[later])
        if not is_same and (earlier, later) not in near_duplicates:
            pairs.append([earlier, later])
    return _flag_later(rows, pairs, "nearly the same prompt")


def _flag_later(
    rows: Sequence[AuditRow], pairs: Iterable[Sequence[int]], detail: str
) -> list[FlaggedRow]:
    """The later row of each pair, once, with all earlier ones."""
    earlier_rows: dict[int, list[AuditRow]] = defaultdict(list)
    for earlier, later in pairs:
        earlier_rows[later].append(rows[earlier])
    flagged = []
    for number in sorted(earlier_rows):
        flagged.append(flag(rows[number], detail, earlier_rows[number]))
    return flagged


def _summarise(near_rows: _NearRows) -> dict[str, Any]:
    """Counts, histograms and pairs around the threshold."""
    edges = np.arange(50, 101, 5) / 100
    counts, _ = np.histogram(near_rows.duplicates.jaccard[near_rows.near], edges)
    scores = list(near_rows.scores.values())
    return {
        "threshold": THRESHOLD,
        "rows": len(scores),
        "rows_at_least_0.9": int(np.count_nonzero(np.array(scores) >= VERY_NEAR)),
        "clusters_by_size": _clusters_by_size(near_rows.centres),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "just_above": _lowest(near_rows, near_rows.near & near_rows.above),
        "just_below": _highest(near_rows, near_rows.near & ~near_rows.above),
    }


def _clusters_by_size(centres: Sequence[int]) -> dict[str, int]:
    sizes = Counter(centres).values()
    clusters = Counter(size for size in sizes if size > 1)
    return {str(size): clusters[size] for size in sorted(clusters)}


def _lowest(near_rows: _NearRows, chosen: Mask) -> list[dict[str, Any]]:
    places = np.flatnonzero(chosen)
    order = np.argsort(near_rows.duplicates.jaccard[places], kind="stable")
    return _shown(near_rows, places[order[:_SHOWN_PAIRS]])


def _highest(near_rows: _NearRows, chosen: Mask) -> list[dict[str, Any]]:
    places = np.flatnonzero(chosen)
    order = np.argsort(-near_rows.duplicates.jaccard[places], kind="stable")
    return _shown(near_rows, places[order[:_SHOWN_PAIRS]])


def _shown(near_rows: _NearRows, places: Indices) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for place in places:
        jaccard = float(near_rows.duplicates.jaccard[place])
        pair: dict[str, Any] = {"jaccard": round(jaccard, 4), "where": [], "texts": []}
        for row in near_rows.duplicates.pairs[place]:
            pair["where"].append(near_rows.rows[row].where)
            pair["texts"].append(mask(near_rows.texts[row])[:SHOWN_CHARACTERS])
        shown.append(pair)
    return shown
