"""Texts made comparable: normal forms, numbers, words, hashes of shingles and their exact Jaccard.

A shingle is a run of a few characters or words. Texts that share most of theirs say nearly the same
in the same words.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
CodePoints = npt.NDArray[np.uint32]

_CHUNK_CHARACTERS = 1 << 20
# Eight bytes of hashes for each.
_CHUNK_PAIRED_CHARACTERS = 1 << 24
# An odd base has an inverse modulo 2**64, by which the hash of a span does not depend on its place.
_BASE = 0x9E3779B97F4A7C15
_INVERSE_BASE = pow(_BASE, -1, 1 << 64)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_SPACE = 32
_LINE_FEED = 10
# Scripts written without spaces, where each character counts as a word: Thai, Lao, Burmese, Khmer,
# kana, Han.
_UNSPACED = (
    (0xE00, 0xEFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0x20000, 0x3FFFF),
)
_ASCII_SPACES = str.maketrans("\t\n\v\f\r\x1c\x1d\x1e\x1f", " " * 9)
_NUMBERS = re.compile(
    r"\d+(?:[.,:]\d+)*"  # with groups, decimals and times
    r"|(?<=\d)\s*[-+*/^%<>=×÷]"  # a sign behind a digit
    r"|(?<=[^\W\d])[+#]+"  # as in C++
)


class Shingle(NamedTuple):
    """Runs of `size` characters or words. A shorter text is one shingle as a whole."""

    unit: Literal["char", "word"]
    size: int


PROMPT_SHINGLE = Shingle("char", 5)
ROW_SHINGLE = Shingle("word", 3)


class ShingleHashes(NamedTuple):
    """Shingles of n texts in order: `hashes` of all, one after another, repeats included.

    Those of text k are `hashes[offsets[k] : offsets[k + 1]]`, `offsets` (n + 1,); an empty text has
    none. `whole` (n,): one hash of each whole text.
    """

    hashes: Hashes
    offsets: Indices
    whole: Hashes

    def by_text(self) -> list[Hashes]:
        """The hashes of each text."""
        return np.split(self.hashes, self.offsets[1:-1])


class _Spans(NamedTuple):
    """Positions of the first character of each span and of the one after its last."""

    starts: Indices
    stops: Indices


def number_multiset(text: str) -> tuple[str, ...]:
    """Sorted numbers of a text, with the arithmetic signs behind them, and marks as in `C++`."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return tuple(sorted(map(str.strip, _NUMBERS.findall(plain))))


def folded(text: str) -> str:
    """NFKC, casefold, white space to one space: the same text but for how it is set."""
    if not text.isascii():
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # The same in half the time: every row of a preparation comes here.
    text = text.lower().translate(_ASCII_SPACES)
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def normalise(text: str) -> str:
    """NFKC, casefold, everything but letters, marks and digits to one space.

    A text without any of those keeps all it has.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    spaced = text.casefold().translate(_gaps())
    return " ".join(spaced.split()) or folded(text)


@functools.cache
def _gaps() -> dict[int, str]:
    """A space for all but letters, digits and marks.

    Without the marks, which Indic vowels are, other words would become equal.
    """
    gaps = {}
    for code in range(0x20000):
        character = chr(code)
        is_mark = unicodedata.category(character) in ("Mn", "Mc")
        if not character.isalnum() and not is_mark:
            gaps[code] = " "
    return gaps


def words(text: str) -> list[str]:
    """The words of a text when normalised, as shingles count them.

    In scripts without spaces each character is one.
    """
    plain = normalise(text)
    spans = _word_spans(_code_points(plain))
    found = []
    for start, stop in zip(spans.starts, spans.stops, strict=True):
        found.append(plain[start:stop])
    return found


def shingle_hashes(texts: Sequence[str], shingle: Shingle) -> ShingleHashes:
    """The shingles of the normalised texts.

    A hash is the polynomial of the characters of a span modulo 2**64, mixed; from sums over all
    texts in one array the polynomial of any span is a difference.
    """
    # No normalised text holds a line feed, so it can stand between texts.
    lines = [*map(normalise, texts), ""]
    codes = _code_points("\n".join(lines))
    ends = np.flatnonzero(codes == _LINE_FEED)
    starts = np.zeros(len(ends), dtype=np.int64)
    starts[1:] = ends[:-1] + 1
    if shingle.unit == "word":
        units = _word_spans(codes)
    else:
        units = _character_spans(codes)
    text_of_unit = np.searchsorted(ends, units.starts, side="right")

    shingles = _shingle_spans(units, text_of_unit, ends, shingle.size)
    text_of_shingle = np.searchsorted(ends, shingles.starts, side="right")
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    counts = np.bincount(text_of_shingle, minlength=len(texts))
    np.cumsum(counts, out=offsets[1:])
    sums = _polynomial_sums(codes)
    return ShingleHashes(
        hashes=_span_hashes(sums, shingles),
        offsets=offsets,
        whole=_span_hashes(sums, _Spans(starts, ends)),
    )


def _shingle_spans(units: _Spans, text_of_unit: Indices, ends: Indices, size: int) -> _Spans:
    """Runs of `size` units of one text; of a text with fewer units, all of it from its first on."""
    last_unit = np.arange(len(text_of_unit)) + size - 1
    is_inside = last_unit < len(text_of_unit)
    last_unit[~is_inside] = -1
    is_full = is_inside & (text_of_unit[last_unit] == text_of_unit)

    is_first = np.diff(text_of_unit, prepend=-1) > 0
    units_of_text = np.bincount(text_of_unit, minlength=len(ends))
    is_short = units_of_text[text_of_unit] < size

    is_shingle = is_full | (is_first & is_short)
    stops = np.where(is_full, units.stops[last_unit], ends[text_of_unit])
    return _Spans(units.starts[is_shingle], stops[is_shingle])


def _code_points(text: str) -> CodePoints:
    encoded = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(encoded, dtype=np.uint32)


def _character_spans(codes: CodePoints) -> _Spans:
    places = np.flatnonzero(codes != _LINE_FEED)
    return _Spans(places, places + 1)


def _word_spans(codes: CodePoints) -> _Spans:
    """The words in the code points of normalised texts."""
    is_word = np.zeros(len(codes), dtype=np.bool_)
    lowest, _ = _UNSPACED[0]
    if len(codes) and codes.max() >= lowest:
        for low, high in _UNSPACED:
            is_word |= (codes >= low) & (codes <= high)
    is_lettered = (codes > _SPACE) & ~is_word
    edges = np.diff(is_lettered.astype(np.int8), prepend=0, append=0)
    is_start = edges[:-1] == 1
    is_last = edges[1:] == -1
    return _Spans(
        starts=np.flatnonzero(is_start | is_word),
        stops=np.flatnonzero(is_last | is_word) + 1,
    )


def _polynomial_sums(codes: CodePoints) -> Hashes:
    """(n + 1,) sums of code times power of the base over the first 0, 1, ... n characters."""
    count = len(codes)
    values = codes.astype(np.uint64) + np.uint64(1)
    powers = _powers(_table_size(count), _BASE)
    sums = np.zeros(count + 1, dtype=np.uint64)
    np.cumsum(values * powers[:count], out=sums[1:])
    return sums


def _span_hashes(sums: Hashes, spans: _Spans) -> Hashes:
    polynomials = sums[spans.stops] - sums[spans.starts]
    inverse_powers = _powers(_table_size(len(sums)), _INVERSE_BASE)
    return mixed(polynomials * inverse_powers[spans.starts])


def _table_size(characters: int) -> int:
    """A power of two that is the same for nearly all chunks, so that the tables are made once."""
    return 1 << max(20, characters.bit_length())


@functools.lru_cache(maxsize=4)
def _powers(count: int, base: int) -> Hashes:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def mixed(values: Hashes) -> Hashes:
    """Hashes whose every bit depends on all bits of the value."""
    values = values ^ values >> np.uint64(31)
    values = values * _MIXER
    return values ^ values >> np.uint64(29)


def text_chunks(texts: Sequence[str], rows: Indices) -> Iterator[Indices]:
    """`rows` in parts of about a million characters, which keeps a part's arrays in the cache."""
    lengths = np.fromiter((len(texts[row]) for row in rows), dtype=np.int64, count=len(rows))
    yield from _in_chunks(rows, lengths, _CHUNK_CHARACTERS)


def _in_chunks(rows: Indices, sizes: Indices, most: int) -> Iterator[Indices]:
    """`rows` in parts of which the sizes (one for each row) add up to about `most`."""
    if len(rows):
        chunk = np.cumsum(sizes) // most
        yield from np.split(rows, np.flatnonzero(np.diff(chunk)) + 1)


def first_equal(texts: Sequence[str], whole: Hashes) -> Indices:
    """(n,) the first row with the same normalised text and the same numbers; itself if alone.

    `whole` (n,): the hash of each normalised text.
    """
    _, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    first_of_key: dict[tuple[int, tuple[str, ...]], int] = {}
    first = np.arange(len(texts))
    for row in repeated.tolist():
        key = (int(whole[row]), number_multiset(texts[row]))
        first[row] = first_of_key.setdefault(key, row)
    return first


def jaccard_of_pairs(
    texts: Sequence[str], pairs: Indices, shingle: Shingle
) -> npt.NDArray[np.float64]:
    """(m,) exact Jaccard of the shingles of each pair of texts; 1 where both texts are empty."""
    values = np.empty(len(pairs), dtype=np.float64)
    for places in _pair_chunks(texts, pairs):
        chosen = pairs[places]
        shingles_of: dict[int, Hashes] = {}
        for rows in text_chunks(texts, np.unique(chosen)):
            chunk = shingle_hashes([texts[row] for row in rows], shingle)
            for row, hashes in zip(rows.tolist(), chunk.by_text(), strict=True):
                shingles_of[row] = distinct(hashes)
        for place, (left, right) in zip(places.tolist(), chosen.tolist(), strict=True):
            values[place] = _jaccard(shingles_of[left], shingles_of[right])
    return values


def _pair_chunks(texts: Sequence[str], pairs: Indices) -> Iterator[Indices]:
    """Places of pairs in parts whose texts have so many characters that their hashes fit into memory."""
    rows, places = np.unique(pairs, return_inverse=True)
    lengths = np.fromiter((len(texts[row]) for row in rows), dtype=np.int64, count=len(rows))
    of_pairs = lengths[places.reshape(pairs.shape)].sum(axis=1)
    yield from _in_chunks(np.arange(len(pairs)), of_pairs, _CHUNK_PAIRED_CHARACTERS)


def distinct(values: Hashes) -> Hashes:
    """Sorted, without repeats: `np.unique`, several times as fast (that builds a hash table)."""
    ordered = np.sort(values)
    is_new = np.diff(ordered, prepend=~ordered[:1]) != 0
    return ordered[is_new]


def _jaccard(left: Hashes, right: Hashes) -> float:
    if not len(left) or not len(right):
        return float(len(left) == len(right))
    place = left.searchsorted(right)
    nearest = left.take(place, mode="clip")
    shared = np.count_nonzero(nearest == right)
    union = len(left) + len(right) - shared
    return float(shared / union)
