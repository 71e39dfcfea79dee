"""Lexical similarity: texts that are nearly the same, found by MinHash candidates and verified by exact Jaccard.

Candidates come from rensa's signatures of 128 slots in 32 bands of 4 (a pair at J = .7 is missed once in 5,000); every
pair reported is verified on the full sets of 64-bit shingle hashes. Paraphrases share few shingles: they are not found.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

THRESHOLD = 0.7
SLOTS, BANDS, SEED = 128, 32, 42
LARGE_BUCKET, LEVELS, VARIANTS = 50, 3, 10
# The estimate over 128 slots is off by .15 once in 10,000 pairs; exact verification costs more than the estimate.
ESTIMATE_MARGIN = 0.15
_CHUNK_CHARACTERS, _CHUNK_PAIRS = 1 << 20, 1 << 16
_BASE, _MIX = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9)
_HALF, _LOW, _BREAK = np.uint64(32), np.uint64(0xFFFFFFFF), 10
# Scripts written without spaces, where each character counts as a word: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    (0xE00, 0xEFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0x20000, 0x3FFFF),
)
_ASCII_SPACES = {ord(character): " " for character in "\t\n\v\f\r\x1c\x1d\x1e\x1f"}
_NUMBERS = re.compile(r"\d+(?:[.,:]\d+)*|(?<=\d)\s*[-+*/^%<>=×÷]|(?<=[^\W\d])[+#]+")


class Shingle(NamedTuple):
    """Runs of `size` characters or words. A shorter text is one shingle as a whole."""

    unit: Literal["char", "word"]
    size: int


PROMPT_SHINGLE, ROW_SHINGLE = Shingle("char", 5), Shingle("word", 3)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Verified pairs among n texts: `pairs` (m, 2), first < second, sorted; `jaccard` and `variant` (m,).

    Pairs below the threshold stand there, too, as far as they were candidates (nearly all from threshold - .1 on).
    `variant` marks pairs whose numbers differ: the same template with other values, never a duplicate; of a later
    text at most ten are kept. `first` (n,) is the first equal text (normalised, same numbers): only that is compared
    with others, and a copy stands in one pair, with the first.
    """

    first: Indices
    pairs: Indices
    jaccard: npt.NDArray[np.float64]
    variant: Mask


def near_duplicates(
    texts: Sequence[str], shingle: Shingle = ROW_SHINGLE, threshold: float = THRESHOLD
) -> Duplicates:
    """All pairs of texts that share `threshold` of their shingles; see `Duplicates`.

    Needs 500 bytes a text (0.5 GB for a million, measured) and 8 bytes for each shingle of texts with a candidate.
    """
    bands, slots, whole = _signatures(texts, shingle)
    first = first_equal(texts, whole)
    single = first == np.arange(len(texts))
    candidates = _candidates(bands, slots, np.flatnonzero(single), threshold - ESTIMATE_MARGIN)
    candidates, differ = _thinned_variants(texts, candidates)
    copies = np.stack([first[~single], np.flatnonzero(~single)], axis=1)
    pairs = np.concatenate([candidates, copies])
    jaccard = np.concatenate([jaccard_of_pairs(texts, candidates, shingle), np.ones(len(copies))])
    variant = np.concatenate([differ, np.zeros(len(copies), dtype=np.bool_)])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Duplicates(first, pairs[order], jaccard[order], variant[order])


def _thinned_variants(texts: Sequence[str], pairs: Indices) -> tuple[Indices, Mask]:
    """Pairs less those with other numbers beyond `VARIANTS` a row (arithmetic has millions), and which differ."""
    ids, numbers = dict[tuple[str, ...], int](), np.zeros(len(texts), dtype=np.int64)
    for row in np.unique(pairs).tolist():
        numbers[row] = ids.setdefault(number_multiset(texts[row]), len(ids))
    differ = numbers[pairs[:, 0]] != numbers[pairs[:, 1]]
    place = np.flatnonzero(differ)
    later = np.sort(pairs[place, 1] << 32 | place)
    rank = np.arange(len(later)) - np.searchsorted(later >> 32, later >> 32)
    kept = ~differ
    kept[later[rank < VARIANTS] & 0xFFFFFFFF] = True
    return pairs[kept], differ[kept]


def prompt_clusters(prompts: Sequence[str]) -> Indices:
    """(n,) a row of each prompt's cluster, itself if alone: what must not stand on both sides of a split.

    Prompts linked by pairs at J >= .7 are one cluster however long the chain. One of more than 1 % of the prompts (50
    at least) is a template with short inputs: its rows are linked at .8 instead, then at .9, and last only where equal.
    """
    found = near_duplicates(prompts, PROMPT_SHINGLE)
    clusters, largest = found.first.copy(), max(LARGE_BUCKET, len(prompts) // 100)
    for threshold in (0.9, 0.8, THRESHOLD):
        one, other = found.pairs[~found.variant & (found.jaccard >= threshold)].T
        links = coo_array((np.ones(len(one)), (one, other)), shape=(len(prompts), len(prompts)))
        labels = connected_components(links, directed=False)[1]
        small = np.bincount(labels, minlength=1)[labels] <= largest
        clusters[small] = np.unique(labels, return_index=True)[1][labels][small]
    return clusters


def star_centres(first: Indices, pairs: Indices) -> Indices:
    """(n,) centre of each row: the first row it is paired with that is itself kept, else itself; no transitivity.

    `pairs` (m, 2), sorted; `first` (n,) is each row's first equal one, whose centre it shares.
    """
    centres = list(range(len(first)))
    for one, other in pairs.tolist():
        if centres[one] == one and centres[other] == other:
            centres[other] = one
    return np.array(centres, dtype=np.int64)[first]


def jaccard_of_pairs(
    texts: Sequence[str], pairs: Indices, shingle: Shingle
) -> npt.NDArray[np.float64]:
    """(m,) exact Jaccard of the sets of shingles of the texts of each pair; 1 where both texts are empty."""
    sets: dict[int, Hashes] = {}
    for rows in text_chunks(texts, np.unique(pairs)):
        hashes, offsets, _ = shingle_hashes([texts[row] for row in rows], shingle)
        sets |= {
            int(row): _distinct(part)
            for row, part in zip(rows, np.split(hashes, offsets[1:-1]), strict=True)
        }
    return np.array(
        [_jaccard(sets[one], sets[other]) for one, other in pairs.tolist()], dtype=np.float64
    )


def _distinct(values: Hashes) -> Hashes:
    """Sorted, without repeats: what `np.unique` gives, several times as fast (it builds a hash table)."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=~ordered[:1]) != 0]


def _jaccard(one: Hashes, other: Hashes) -> float:
    if not len(one) or not len(other):
        return float(len(one) == len(other))
    shared = np.count_nonzero(one.take(one.searchsorted(other), mode="clip") == other)
    return float(shared / (len(one) + len(other) - shared))


def number_multiset(text: str) -> tuple[str, ...]:
    """Sorted numbers of a text, with the arithmetic signs after them and marks as in `C++` and `C#`."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return tuple(sorted(found.strip() for found in _NUMBERS.findall(plain)))


def folded(text: str) -> str:
    """NFKC, casefold, white space to one space: the same text but for how it is set."""
    if not text.isascii():
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = text.lower().translate(
        _ASCII_SPACES
    )  # the same in half the time: every row of a preparation comes here
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def normalise(text: str) -> str:
    """NFKC, casefold, everything but letters, marks and digits to one space; a text without any of them keeps all."""
    plain = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(plain.translate(_gaps()).split()) or folded(text)


def words(text: str) -> list[str]:
    """The words of a normalised text, as shingles count them: single characters in scripts without spaces."""
    plain = normalise(text)
    return [plain[start:stop] for start, stop in zip(*_words(_codes(plain)), strict=True)]


@functools.cache
def _gaps() -> dict[int, str]:
    """A space for all but letters, digits and marks. Without marks (Indic vowels) other words become equal."""
    plane = map(chr, range(0x20000))
    return {
        ord(one): " "
        for one in plane
        if not (one.isalnum() or unicodedata.category(one) in ("Mn", "Mc"))
    }


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _words(codes: npt.NDArray[np.uint32]) -> tuple[Indices, Indices]:
    """Positions (starts, stops) of the words in the code points of normalised texts."""
    alone = np.zeros(len(codes), dtype=np.bool_)
    for low, high in _UNSPACED if len(codes) and codes.max() >= _UNSPACED[0][0] else ():
        alone |= (codes >= low) & (codes <= high)
    edge = np.diff(((codes > 32) & ~alone).astype(np.int8), prepend=0, append=0)
    return np.flatnonzero((edge[:-1] == 1) | alone), np.flatnonzero((edge[1:] == -1) | alone) + 1


@functools.lru_cache(maxsize=2)
def _powers(count: int, base: int) -> Hashes:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def shingle_hashes(texts: Sequence[str], shingle: Shingle) -> tuple[Hashes, Indices, Hashes]:
    """Shingles of the normalised texts in order: flat hashes, offsets (n + 1,) and one hash of each whole text (n,).

    Repeats stay; an empty text has none. A hash is the polynomial of the characters of a span modulo 2**64, mixed.
    """
    # No normalised text holds a line feed.
    codes = _codes("".join(f"{normalise(text)}\n" for text in texts))
    ends = np.flatnonzero(codes == _BREAK)
    begins = np.concatenate([[0], ends + 1])[:-1]
    size = 1 << max(20, len(codes).bit_length())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(
        (codes.astype(np.uint64) + np.uint64(1)) * _powers(size, _BASE)[: len(codes)], out=sums[1:]
    )
    position = np.flatnonzero(codes != _BREAK)
    starts, stops = (position, position + 1) if shingle.unit == "char" else _words(codes)
    owner, ahead = np.searchsorted(ends, starts, side="right"), shingle.size - 1
    full = np.roll(owner, -ahead) == owner
    full[max(len(owner) - ahead, 0) :] = False
    short = (np.bincount(owner, minlength=len(texts)) < shingle.size)[owner]
    kept = full | (short & (np.diff(owner, prepend=-1) > 0))
    last = np.where(full, np.roll(stops, -ahead), ends[owner])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=len(texts)))])
    back = _powers(size, pow(_BASE, -1, 1 << 64))
    spans = ((starts[kept], last[kept]), (begins, ends))
    hashes, whole = (_mixed((sums[stop] - sums[start]) * back[start]) for start, stop in spans)
    return hashes, offsets, whole


def _mixed(values: Hashes) -> Hashes:
    values = (values ^ values >> np.uint64(31)) * _MIX
    return values ^ values >> np.uint64(29)


def text_chunks(texts: Sequence[str], rows: Indices) -> Iterator[Indices]:
    """`rows` in pieces of about a million characters, which keeps the arrays of one piece in the cache."""
    total = np.cumsum(
        np.fromiter((len(texts[row]) for row in rows), dtype=np.int64, count=len(rows))
    )
    if len(rows):
        yield from np.split(rows, np.flatnonzero(np.diff(total // _CHUNK_CHARACTERS)) + 1)


def _signatures(
    texts: Sequence[str], shingle: Shingle
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], Hashes]:
    """Band keys (n, 32), one byte of each slot (n, 128) and whole-text hashes (n,)."""
    bands = np.empty((len(texts), BANDS), dtype=np.uint32)
    slots = np.empty((len(texts), SLOTS), dtype=np.uint8)
    whole = np.empty(len(texts), dtype=np.uint64)
    for rows in text_chunks(texts, np.arange(len(texts))):
        hashes, offsets, whole[rows] = shingle_hashes([texts[row] for row in rows], shingle)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), SLOTS, SEED
        )
        digests = np.array(matrix.to_rows(), dtype=np.uint32)
        slots[rows] = digests & 0xFF
        halves = digests.view(np.uint64).reshape(len(rows), BANDS, 2)
        bands[rows] = _mixed(halves[..., 0] * np.uint64(_BASE) + halves[..., 1]) >> _HALF
    return bands, slots, whole


def first_equal(texts: Sequence[str], whole: Hashes) -> Indices:
    """(n,) the first row with the same normalised text (`whole`: its hash) and the same numbers; itself if alone."""
    _, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
    first, result = dict[tuple[int, tuple[str, ...]], int](), np.arange(len(texts))
    for row in np.flatnonzero(counts[inverse] > 1).tolist():
        result[row] = first.setdefault((int(whole[row]), number_multiset(texts[row])), row)
    return result


def _candidates(
    bands: npt.NDArray[np.uint32], slots: npt.NDArray[np.uint8], rows: Indices, least: float
) -> Indices:
    """(m, 2) pairs that share a band and whose signatures agree in at least `least` of the slots."""
    found = np.empty(0, dtype=np.uint64)
    for band in range(BANDS):
        members, fresh = rows, [found]
        keys = bands[rows, band].astype(np.uint64)
        for level in range(1, LEVELS + 1):
            pairs, large = _bucket_pairs(keys, members)
            fresh += [_agreeing(slots, *pair, least) for pair in pairs]
            # A large bucket shares a template: pairs that are closer than that share the next bands, too.
            keys, members = keys[large], members[large]
            keys = _mixed(keys << _HALF | bands[members, (band + level) % BANDS]) >> _HALF
        found = _distinct(np.concatenate(fresh))
    return np.stack([found >> _HALF, found & _LOW], axis=1).astype(np.int64)


def _bucket_pairs(keys: Hashes, rows: Indices) -> tuple[list[tuple[Indices, Indices]], Indices]:
    """Pairs of rows with equal keys, and the places in large buckets, of which only pairs with the first are made."""
    order = np.sort(keys << _HALF | np.arange(len(keys), dtype=np.uint64))
    key, place = order >> _HALF, (order & _LOW).astype(np.int64)
    row, first = rows[place], np.flatnonzero(np.diff(key, prepend=~key[:1]))
    sizes = np.diff(first, append=len(key))
    large = np.repeat(sizes > LARGE_BUCKET, sizes)
    pairs = [(np.repeat(row[first], sizes)[large], row[large])]
    position = np.flatnonzero(~large)
    for distance in range(1, LARGE_BUCKET):
        position = position[position + distance < len(key)]
        position = position[key[position] == key[position + distance]]
        pairs.append((row[position], row[position + distance]))
    return pairs, place[large]


def _agreeing(slots: npt.NDArray[np.uint8], left: Indices, right: Indices, least: float) -> Hashes:
    """Pairs, as `low << 32 | high`, whose signatures agree in at least `least` of the slots."""
    found = [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(left), _CHUNK_PAIRS):
        one, other = left[start : start + _CHUNK_PAIRS], right[start : start + _CHUNK_PAIRS]
        close = (np.count_nonzero(slots[one] == slots[other], axis=1) >= least * SLOTS) & (
            one != other
        )
        low, high = np.minimum(one, other)[close], np.maximum(one, other)[close]
        found.append(low.astype(np.uint64) << _HALF | high.astype(np.uint64))
    return np.concatenate(found)
