"""Training rows that an evaluation has seen: four lexical rules against any evaluation set.

Each rule finds rows that no other finds: of fifty generated leaks of a kind, equal short prompts
escape coverage in 15 cases, short prompts behind a "Please:" in 13, and copied answers below other
prompts in all fifty. A row is compared by its prompt without system messages, raw text as a whole.
Paraphrases and translations pass. The audit and the evaluation both ask here.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from sft_recipes import similarity
from sft_recipes.messages import Example
from sft_recipes.response_patterns import mask
from sft_recipes.shingles import (
    PROMPT_SHINGLE,
    Hashes,
    Indices,
    Mask,
    Shingle,
    ShingleHashes,
    normalise,
    number_multiset,
    shingle_hashes,
    text_chunks,
    words,
)

EXACT = "exact prompt"
COVERED = "prompt coverage"
SHORT = "short prompt"
ANSWERED = "reference answer"
# In the order in which a table names one rule for a row that several rules hit.
RULES = (EXACT, COVERED, SHORT, ANSWERED)
PROMPT_GRAM = 8
ANSWER_GRAM = 13
COVERAGE = 0.5
SHORT_WORDS = 16
SHORT_JACCARD = 0.8
LEAST_TEMPLATE = 5
LEAST_PHRASE = 20
_SPAN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Hit:
    """An evaluation row and a training row (positions in their lists) that share a text.

    `rule` is one of `RULES`, `score` how much of the text is shared.
    """

    eval_row: int
    train_row: int
    rule: str
    score: float
    text: str


def question(example: Example) -> str:
    """The prompt without system messages, which all rows may share; nothing for raw text."""
    texts = []
    for message in example.messages:
        if message["role"] in ("user", "tool"):
            texts.append(message.get("content") or "")
    return "\n".join(texts)


def prompt_overlaps(prompts: Sequence[str], eval_prompts: Sequence[str]) -> list[Hit]:
    """Hits of the rules for prompts; a pair of rows with the same prompt stands under the first."""
    groups = _equal_prompts(prompts, eval_prompts)
    hits = list(_exact(groups))
    same = {(hit.eval_row, hit.train_row) for hit in hits}
    for hit in chain(_short(groups), _covered(prompts, eval_prompts)):
        if (hit.eval_row, hit.train_row) not in same:
            hits.append(hit)
    return hits


def best_hits(hits: Sequence[Hit]) -> dict[int, Hit]:
    """Of each evaluation row that is hit, in order, the hit that says most."""
    best: dict[int, Hit] = {}
    for hit in sorted(hits, key=_rank):
        best.setdefault(hit.eval_row, hit)
    return dict(sorted(best.items()))


def _rank(hit: Hit) -> tuple[int, float, int]:
    return RULES.index(hit.rule), -hit.score, hit.train_row


def trained_on(by_rule: Mapping[str, int]) -> str:
    """How evaluation rows that rules hit relate to training, in words behind their number."""
    near = sum(by_rule.values()) - by_rule.get(EXACT, 0)
    if not near:
        return "trained on"
    if not by_rule.get(EXACT):
        return "nearly trained on (prompts like trained ones)"
    return f"trained on, {near:,} of them nearly (prompts like trained ones)"


def rows_hit_by_rule(hits: Sequence[Hit]) -> dict[str, int]:
    """How many evaluation rows each rule hits."""
    counts = dict.fromkeys(RULES, 0)
    for rule, _ in {(hit.rule, hit.eval_row) for hit in hits}:
        counts[rule] += 1
    return counts


@dataclass(frozen=True, slots=True)
class _EqualPrompts:
    """Rows with the same normalised prompt and the same numbers in it: `text` is the first one.

    `eval_rows`: prompts by their positions.
    """

    text: str
    eval_rows: dict[int, str] = field(default_factory=dict)
    train_rows: list[int] = field(default_factory=list)


def _equal_prompts(prompts: Sequence[str], eval_prompts: Sequence[str]) -> list[_EqualPrompts]:
    groups: dict[tuple[str, tuple[str, ...]], _EqualPrompts] = {}

    def group_of(prompt: str) -> _EqualPrompts:
        key = (normalise(prompt), number_multiset(prompt))
        return groups.setdefault(key, _EqualPrompts(prompt))

    for number, prompt in enumerate(eval_prompts):
        if prompt.strip():
            group_of(prompt).eval_rows[number] = prompt
    for number, prompt in enumerate(prompts):
        if prompt.strip():
            group_of(prompt).train_rows.append(number)
    return list(groups.values())


def _exact(groups: Sequence[_EqualPrompts]) -> Iterator[Hit]:
    for group in groups:
        yield from _hits_between(group, group, EXACT, 1.0)


def _short(groups: Sequence[_EqualPrompts]) -> Iterator[Hit]:
    """Short evaluation prompts that nearly equal a training prompt.

    An 8-gram of a short prompt covers too much of it, or there is none.
    """
    longest = 0
    for group in groups:
        if group.eval_rows and _is_short(group.text):
            longest = max(longest, len(group.text))
    # Texts of very different length are never that much alike.
    compared = [group for group in groups if len(group.text) <= 2 * longest]
    texts = [group.text for group in compared]
    duplicates = similarity.near_duplicates(texts, PROMPT_SHINGLE, SHORT_JACCARD)
    close = ~duplicates.variant & (duplicates.jaccard >= SHORT_JACCARD)
    scores = duplicates.jaccard[close].tolist()
    for (left, right), score in zip(duplicates.pairs[close].tolist(), scores, strict=True):
        for held_out, train in ((left, right), (right, left)):
            if _is_short(texts[held_out]):
                yield from _hits_between(compared[held_out], compared[train], SHORT, score)


def _is_short(prompt: str) -> bool:
    return len(words(prompt)) < SHORT_WORDS


def _hits_between(
    held_out: _EqualPrompts, train: _EqualPrompts, rule: str, score: float
) -> Iterator[Hit]:
    if not train.train_rows:
        return
    for eval_row, prompt in held_out.eval_rows.items():
        text = mask(prompt)[:_SPAN_CHARACTERS]
        for train_row in train.train_rows:
            yield Hit(eval_row, train_row, rule, score, text)


def _covered(prompts: Sequence[str], eval_prompts: Sequence[str]) -> Iterator[Hit]:
    """Evaluation prompts half of whose own words stand in 8-grams of one training prompt."""
    grams = _HeldOutGrams.of(eval_prompts, PROMPT_GRAM)
    for overlap in _overlaps(prompts, grams, most=len(prompts)):
        own_positions = grams.own_positions(overlap.eval_row)
        own_words = _covered_words(own_positions, PROMPT_GRAM)
        shared_words = _covered_words(overlap.positions, PROMPT_GRAM)
        share = shared_words / own_words
        if share >= COVERAGE:
            text = _span(eval_prompts[overlap.eval_row], overlap.positions, PROMPT_GRAM)
            yield Hit(overlap.eval_row, overlap.train_row, COVERED, share, text)


def answer_overlaps(answers: Sequence[str], references: Sequence[str]) -> Iterator[Hit]:
    """Reference answers of which 13 words in a row stand in a training answer."""
    grams = _HeldOutGrams.of(references, ANSWER_GRAM)
    # What many responses say, as refusals do, is a phrase and no leak.
    most = max(LEAST_PHRASE, len(answers) // 200)
    for overlap in _overlaps(answers, grams, most):
        text = _span(references[overlap.eval_row], overlap.positions, ANSWER_GRAM)
        yield Hit(overlap.eval_row, overlap.train_row, ANSWERED, 1.0, text)


@dataclass(frozen=True, slots=True)
class _HeldOutGrams:
    """The word n-grams of all evaluation texts in order, with the row of each.

    `is_own`: the n-gram is no template text, which more than 5 % of the rows have.
    """

    size: int
    grams: ShingleHashes
    row: Indices
    is_own: Mask

    @classmethod
    def of(cls, texts: Sequence[str], size: int) -> "_HeldOutGrams":
        """The n-grams of `size` words."""
        # A text of fewer words would be one shingle as a whole, and no n-gram.
        long_enough = []
        for text in texts:
            has_gram = len(words(text)) >= size
            long_enough.append(text if has_gram else "")
        grams = shingle_hashes(long_enough, Shingle("word", size))
        row = np.repeat(np.arange(len(texts)), np.diff(grams.offsets))
        gram = np.unique(grams.hashes, return_inverse=True)[1]
        # Each n-gram and row once, as `gram << 32 | row`.
        gram_rows = np.unique(gram << 32 | row)
        rows_with = np.bincount(gram_rows >> 32)
        is_own = rows_with[gram] <= max(LEAST_TEMPLATE, len(texts) // 20)
        return cls(size, grams, row, is_own)

    def own_positions(self, row: int) -> list[int]:
        """Where a row's own n-grams begin, in words."""
        start, stop = self.grams.offsets[row : row + 2]
        positions: list[int] = np.flatnonzero(self.is_own[start:stop]).tolist()
        return positions


class _Overlap(NamedTuple):
    """Where the n-grams begin, in words of the evaluation row, that a training row has, rising."""

    eval_row: int
    train_row: int
    positions: list[int]


def _overlaps(texts: Sequence[str], held_out: _HeldOutGrams, most: int) -> Iterator[_Overlap]:
    """The own n-grams that evaluation rows share with a text, less those of more than `most`."""
    hashes = held_out.grams.hashes
    texts_with = _texts_with(hashes[held_out.is_own], texts, held_out.size)
    shared_grams = np.array(list(texts_with), dtype=np.uint64)
    is_shared = np.isin(hashes, shared_grams)
    positions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in np.flatnonzero(held_out.is_own & is_shared).tolist():
        numbers = texts_with[int(hashes[place])]
        if len(numbers) > most:
            continue
        row = int(held_out.row[place])
        position = place - int(held_out.grams.offsets[row])
        for number in numbers:
            positions[row, number].append(position)
    for (row, number), shared in positions.items():
        yield _Overlap(row, number, shared)


def _texts_with(grams: Hashes, texts: Sequence[str], size: int) -> Mapping[int, Collection[int]]:
    """The texts, in order, that hold each of the n-grams."""
    texts_with: dict[int, dict[int, None]] = defaultdict(dict)
    for numbers in text_chunks(texts, np.arange(len(texts))):
        chunk = shingle_hashes([texts[number] for number in numbers], Shingle("word", size))
        text_of_gram = np.repeat(numbers, np.diff(chunk.offsets))
        is_shared = np.isin(chunk.hashes, grams)
        shared = chunk.hashes[is_shared].tolist()
        for gram, number in zip(shared, text_of_gram[is_shared].tolist(), strict=True):
            texts_with[gram][number] = None
    return texts_with


def _covered_words(positions: Sequence[int], size: int) -> int:
    """How many words n-grams at these positions cover together."""
    covered = size
    for earlier, later in pairwise(positions):
        covered += min(later - earlier, size)
    return covered


def _span(text: str, positions: Sequence[int], size: int) -> str:
    """The longest run of n-grams at adjacent positions, as normalised words.

    A text with private data is shown masked from its beginning instead.
    """
    masked = mask(text)
    if masked != text:
        return masked[:_SPAN_CHARACTERS]
    breaks = np.flatnonzero(np.diff(positions) > 1) + 1
    run = max(np.split(positions, breaks), key=len)
    span = words(text)[run[0] : run[-1] + size]
    return " ".join(span)[:_SPAN_CHARACTERS]
