"""Lexical similarity: texts that are nearly the same, found by MinHash and verified by Jaccard.

Candidates come from rensa's signatures of 128 slots in 32 bands of 4 (a pair at J = .7 is missed
once in 5,000); every pair reported is verified on the full sets of 64-bit shingle hashes.
Paraphrases share few shingles: they are not found.

The bands are looked up here and not by rensa's own index, which returns every pair of a bucket.
Rows that share a template are one bucket: 12,000 such prompts are 72 million pairs, whose query
alone takes 17 s where all of this takes 5 s, and the time grows with the square of the rows.
(Without a template both take the same: 1.8 and 1.7 s for 20,000 rows of a hundred words, with
recall 1 at J >= .7 on either side.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sft_recipes.shingles import (
    PROMPT_SHINGLE,
    ROW_SHINGLE,
    Hashes,
    Indices,
    Mask,
    Shingle,
    distinct,
    first_equal,
    jaccard_of_pairs,
    mixed,
    number_multiset,
    shingle_hashes,
    text_chunks,
)

THRESHOLD = 0.7
SLOTS = 128
BANDS = 32
SEED = 42
# Of a larger bucket only pairs with its first row are made; the others have to share a second and
# a third band.
LARGE_BUCKET = 50
LEVELS = 3
# How many pairs with other numbers are kept of a row.
VARIANTS = 10
# The estimate over 128 slots is off by .15 once in 10,000 pairs; exact verification costs more
# than the estimate.
ESTIMATE_MARGIN = 0.15
_CHUNK_PAIRS = 1 << 16
# Two numbers of 32 bits in one of 64 sort and compare as one.
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_BAND_MIXER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Verified pairs among n texts: `pairs` (m, 2), first < second, sorted; `jaccard` (m,).

    Pairs below the threshold stand there, too, as far as they were candidates (nearly all from
    threshold - .1 on). `variant` (m,) marks pairs whose numbers differ: the same template with
    other values, never a duplicate; of a later text at most ten are kept. `first` (n,) is the first
    equal text (normalised, same numbers): only that is compared with others, and a copy stands in
    one pair, with the first.
    """

    first: Indices
    pairs: Indices
    jaccard: npt.NDArray[np.float64]
    variant: Mask


class Signatures(NamedTuple):
    """MinHash signatures of n texts, and the hash of each whole text (n,).

    `bands` (n, 32): a key of each band; `slots` (n, 128): one byte of each slot.
    """

    bands: npt.NDArray[np.uint32]
    slots: npt.NDArray[np.uint8]
    whole: Hashes


class _Candidates(NamedTuple):
    """`pairs` (m, 2) to be verified, and which of them differ in their numbers (m,)."""

    pairs: Indices
    variant: Mask


def near_duplicates(
    texts: Sequence[str],
    shingle: Shingle = ROW_SHINGLE,
    threshold: float = THRESHOLD,
    signatures: Signatures | None = None,
) -> Duplicates:
    """All pairs of texts that share `threshold` of their shingles; see `Duplicates`.

    `signatures`: of these texts and shingles, where they are there already. Without them it needs
    500 bytes a text (0.5 GB for a million, measured).
    """
    if signatures is None:
        signatures = sign(texts, shingle)
    first = first_equal(texts, signatures.whole)
    is_copy = first != np.arange(len(texts))
    originals = np.flatnonzero(~is_copy)
    alike = _alike_signatures(signatures, originals, threshold - ESTIMATE_MARGIN)
    candidates = _thin_variants(texts, alike)
    measured = jaccard_of_pairs(texts, candidates.pairs, shingle)

    copies = np.flatnonzero(is_copy)
    copy_pairs = np.stack([first[copies], copies], axis=1)
    pairs = np.concatenate([candidates.pairs, copy_pairs])
    jaccard = np.concatenate([measured, np.ones(len(copies))])
    variant = np.concatenate([candidates.variant, np.zeros(len(copies), dtype=np.bool_)])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Duplicates(
        first=first,
        pairs=pairs[order],
        jaccard=jaccard[order],
        variant=variant[order],
    )


def prompt_clusters(prompts: Sequence[str], signatures: Signatures | None = None) -> Indices:
    """(n,) a row of each prompt's cluster, itself if alone: one side of a split has all of it.

    Prompts linked by pairs at J >= .7 are one cluster however long the chain. One of more than 1 %
    of the prompts (50 at least) is a template with short inputs: its rows are linked at .8 instead,
    then at .9, and last only where equal.
    """
    duplicates = near_duplicates(prompts, PROMPT_SHINGLE, signatures=signatures)
    clusters = duplicates.first.copy()
    largest = max(LARGE_BUCKET, len(prompts) // 100)
    for threshold in (0.9, 0.8, THRESHOLD):
        labels = _linked(duplicates, threshold)
        first_of_label = np.unique(labels, return_index=True)[1]
        size = np.bincount(labels, minlength=1)
        is_small = size[labels] <= largest
        clusters[is_small] = first_of_label[labels[is_small]]
    return clusters


def _linked(duplicates: Duplicates, threshold: float) -> Indices:
    """(n,) a label of each text: the same for texts that pairs at the threshold link."""
    is_link = ~duplicates.variant & (duplicates.jaccard >= threshold)
    left, right = duplicates.pairs[is_link].T
    count = len(duplicates.first)
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    return np.asarray(labels, dtype=np.int64)


def star_centres(first: Indices, pairs: Indices) -> Indices:
    """(n,) centre of each row: the first row it is paired with that is itself kept, else itself.

    Nothing is transitive. `pairs` (m, 2), sorted; `first` (n,) is each row's first equal one, whose
    centre it shares.
    """
    centres = list(range(len(first)))
    for earlier, later in pairs.tolist():
        if centres[earlier] == earlier and centres[later] == later:
            centres[later] = earlier
    return np.array(centres, dtype=np.int64)[first]


def sign(texts: Sequence[str], shingle: Shingle) -> Signatures:
    """The signatures of texts: a text's own do not depend on the others."""
    signatures = Signatures(
        bands=np.empty((len(texts), BANDS), dtype=np.uint32),
        slots=np.empty((len(texts), SLOTS), dtype=np.uint8),
        whole=np.empty(len(texts), dtype=np.uint64),
    )
    for rows in text_chunks(texts, np.arange(len(texts))):
        shingles = shingle_hashes([texts[row] for row in rows], shingle)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            shingles.hashes,
            shingles.offsets.astype(np.uint64),
            SLOTS,
            SEED,
        )
        digests = np.array(matrix.to_rows(), dtype=np.uint32)
        # Four slots of 32 bits are a band: two numbers of 64 bits.
        halves = digests.view(np.uint64).reshape(len(rows), BANDS, 2)
        joined = halves[..., 0] * _BAND_MIXER + halves[..., 1]
        signatures.bands[rows] = mixed(joined) >> _HALF
        signatures.slots[rows] = digests & 0xFF
        signatures.whole[rows] = shingles.whole
    return signatures


def _alike_signatures(signatures: Signatures, rows: Indices, least: float) -> Indices:
    """(m, 2) pairs of `rows` that share a band and agree in at least `least` of the slots."""
    packed = np.empty(0, dtype=np.uint64)
    for band in range(BANDS):
        new = list(_pairs_of_band(signatures, rows, band, least))
        packed = distinct(np.concatenate([packed, *new]))
    pairs = np.stack([packed >> _HALF, packed & _LOW], axis=1)
    return pairs.astype(np.int64)


def _pairs_of_band(
    signatures: Signatures, rows: Indices, band: int, least: float
) -> Iterator[Hashes]:
    """Pairs, as `low << 32 | high`, from buckets of rows with the same key of this band."""
    keys = signatures.bands[rows, band].astype(np.uint64)
    for level in range(1, LEVELS + 1):
        buckets = _Buckets.of(keys)
        for left, right in buckets.pairs():
            yield from _agreeing(signatures.slots, rows[left], rows[right], least)
        # A large bucket shares a template: pairs that are closer than that share the next bands.
        large = buckets.places[buckets.is_large]
        rows = rows[large]
        next_band = (band + level) % BANDS
        both_keys = keys[large] << _HALF | signatures.bands[rows, next_band]
        keys = mixed(both_keys) >> _HALF


class _Buckets(NamedTuple):
    """Places sorted by their key, each (n,): `first` has the same key, and `is_large` many have."""

    places: Indices
    keys: Hashes
    first: Indices
    is_large: Mask

    @classmethod
    def of(cls, keys: Hashes) -> _Buckets:
        """The buckets of equal keys of 32 bits."""
        place = np.arange(len(keys), dtype=np.uint64)
        order = np.sort(keys << _HALF | place)
        sorted_keys = order >> _HALF
        places = (order & _LOW).astype(np.int64)
        is_new = np.diff(sorted_keys, prepend=~sorted_keys[:1]) != 0
        begins = np.flatnonzero(is_new)
        sizes = np.diff(begins, append=len(keys))
        return cls(
            places=places,
            keys=sorted_keys,
            first=np.repeat(places[begins], sizes),
            is_large=np.repeat(sizes > LARGE_BUCKET, sizes),
        )

    def pairs(self) -> Iterator[tuple[Indices, Indices]]:
        """All pairs of places of small buckets; those with the first place of large ones."""
        yield self.first[self.is_large], self.places[self.is_large]
        position = np.flatnonzero(~self.is_large)
        for distance in range(1, LARGE_BUCKET):
            position = position[position + distance < len(self.keys)]
            partner = position + distance
            is_same = self.keys[position] == self.keys[partner]
            yield self.places[position[is_same]], self.places[partner[is_same]]
            position = position[is_same]


def _agreeing(
    slots: npt.NDArray[np.uint8], left: Indices, right: Indices, least: float
) -> Iterator[Hashes]:
    """Pairs, as `low << 32 | high`, whose signatures agree in at least `least` of the slots."""
    for start in range(0, len(left), _CHUNK_PAIRS):
        stop = start + _CHUNK_PAIRS
        rows = np.stack([left[start:stop], right[start:stop]])
        agreeing = np.count_nonzero(slots[rows[0]] == slots[rows[1]], axis=1)
        is_pair = rows[0] != rows[1]
        is_close = agreeing >= least * SLOTS
        low, high = np.sort(rows[:, is_pair & is_close], axis=0).astype(np.uint64)
        yield low << _HALF | high


def _number_hash(text: str) -> int:
    """A hash of 64 bits of the numbers of a text."""
    joined = "\0".join(number_multiset(text)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def _thin_variants(texts: Sequence[str], pairs: Indices) -> _Candidates:
    """Pairs less those with other numbers beyond `VARIANTS` a row: arithmetic has millions."""
    numbers = np.zeros(len(texts), dtype=np.uint64)
    for row in np.unique(pairs).tolist():
        numbers[row] = _number_hash(texts[row])
    earlier, later = pairs.T
    is_variant = numbers[earlier] != numbers[later]

    places = np.flatnonzero(is_variant)
    order = np.lexsort((places, later[places]))
    by_later_row = places[order]
    row = later[by_later_row]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    is_kept = ~is_variant
    is_kept[by_later_row[rank < VARIANTS]] = True
    return _Candidates(pairs[is_kept], is_variant[is_kept])
