"""Normalisation, shingles, exact Jaccard, near-duplicate pairs and stars.

They are held against answers by hand and brute force.
"""

from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from sft_recipes import shingles, similarity
from sft_recipes.shingles import (
    PROMPT_SHINGLE,
    ROW_SHINGLE,
    Shingle,
    jaccard_of_pairs,
    normalise,
    number_multiset,
    shingle_hashes,
    words,
)
from sft_recipes.similarity import Duplicates, near_duplicates, prompt_clusters, star_centres

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invented_words(random: Random, count: int, vocabulary: int = 3000) -> list[str]:
    """Words of a small language, the same for the same numbers."""
    made = []
    for _ in range(count):
        word = Random(random.randrange(vocabulary)).choices(LETTERS, k=6)
        made.append("".join(word))
    return made


def edited(random: Random, old: list[str], changes: int) -> list[str]:
    """A copy with some words replaced."""
    new = list(old)
    for place in random.sample(range(len(new)), changes):
        new[place] = "".join(random.choices(LETTERS, k=6))
    return new


def shingle_list(text: str, shingle: Shingle) -> list[object]:
    """The definition, slowly."""
    plain = normalise(text)
    units = list(plain) if shingle.unit == "char" else words(text)
    if len(units) < shingle.size:
        return [plain] if plain else []
    starts = range(len(units) - shingle.size + 1)
    return [tuple(units[start : start + shingle.size]) for start in starts]


def jaccard(left: str, right: str, shingle: Shingle) -> float:
    """The definition, with two empty sets equal."""
    left_set = set(shingle_list(left, shingle))
    right_set = set(shingle_list(right, shingle))
    if not left_set | right_set:
        return 1.0
    return len(left_set & right_set) / len(left_set | right_set)


@pytest.mark.parametrize(
    ("text", "normal", "split"),
    [
        ("", "", []),
        (" \n", "", []),
        ("  Hello,   WORLD!\n", "hello world", ["hello", "world"]),
        ("snake_case and-dash", "snake case and dash", ["snake", "case", "and", "dash"]),
        ("ＡＢＣ１２３ ﬁn", "abc123 fin", ["abc123", "fin"]),
        ("Straße", "strasse", ["strasse"]),
        ("हिन्दी, भाषा।", "हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("שָׁלוֹם עולם", "שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("日本語、です", "日本語 です", ["日", "本", "語", "で", "す"]),
        ("use 日本 now", "use 日本 now", ["use", "日", "本", "now"]),
        ("???", "???", ["???"]),
        ("x\ud800y", "x y", ["x", "y"]),
    ],
)
def test_normalise(text: str, normal: str, split: list[str]) -> None:
    """Case, forms and punctuation go; letters and vowel signs of every script stay.

    Scripts without spaces are divided into characters.
    """
    assert normalise(text) == normal
    assert words(text) == split


@pytest.mark.parametrize(
    "shingle", [PROMPT_SHINGLE, ROW_SHINGLE, Shingle("char", 1), Shingle("word", 1)]
)
def test_texts_do_not_touch_in_a_batch(shingle: Shingle) -> None:
    """Many texts at once give each what it gets alone, whatever its neighbours are."""
    texts = ["a, b.", "", "...", "..c", "d..", " ", "é?", "!\n?", "x", "日本 y", ""]
    together = shingle_hashes(texts, shingle)
    for number, hashes in enumerate(together.by_text()):
        alone = shingle_hashes([texts[number]], shingle)
        assert hashes.tolist() == alone.hashes.tolist()
        assert together.whole[number] == alone.whole[0]


@pytest.mark.parametrize(
    "shingle", [PROMPT_SHINGLE, ROW_SHINGLE, Shingle("word", 1), Shingle("word", 8)]
)
def test_shingles_are_those_of_the_definition(shingle: Shingle) -> None:
    """Each text has the shingles of the definition; hashes are equal exactly if shingles are."""
    random = Random(1)
    texts = ["", "abc", "abcd e", "?!", "日本語のテキスト"]
    for count in range(40):
        texts.append(" ".join(invented_words(random, count, vocabulary=30)))
    meaning: dict[int, object] = {}
    for text, hashes in zip(texts, shingle_hashes(texts, shingle).by_text(), strict=True):
        expected = shingle_list(text, shingle)
        assert len(hashes) == len(expected)
        for value, gram in zip(hashes.tolist(), expected, strict=True):
            assert meaning.setdefault(value, gram) == gram
    assert len(set(meaning.values())) == len(meaning)


def test_whole_text_hash_sees_the_normalised_text_only() -> None:
    """Whole-text hashes are equal exactly for texts that are equal when normalised."""
    whole = shingle_hashes(["A b!", "", "c", "a  B", "a b c"], ROW_SHINGLE).whole
    assert whole[0] == whole[3]
    assert len(set(whole.tolist())) == 4


@pytest.mark.parametrize("shingle", [PROMPT_SHINGLE, ROW_SHINGLE])
def test_jaccard_is_exact(shingle: Shingle) -> None:
    """The Jaccard of each pair is that of the definition, empty and short texts included."""
    random = Random(2)
    texts = ["", "", "ab", "AB!", "abc"]
    for count in range(2, 30):
        texts.append(" ".join(invented_words(random, count, vocabulary=12)))
    pairs = list(combinations(range(len(texts)), 2))
    expected = [jaccard(texts[left], texts[right], shingle) for left, right in pairs]
    measured = jaccard_of_pairs(texts, np.array(pairs), shingle)
    assert measured.tolist() == pytest.approx(expected)


def centres_of(found: Duplicates) -> npt.NDArray[np.int64]:
    """The star centre of each text by its duplicates."""
    is_duplicate = ~found.variant & (found.jaccard >= similarity.THRESHOLD)
    return star_centres(found.first, found.pairs[is_duplicate])


def pairs_from(found: Duplicates, threshold: float) -> set[tuple[int, int]]:
    """The pairs at a threshold."""
    return set(map(tuple, found.pairs[found.jaccard >= threshold].tolist()))


def generated(seed: int, rows: int, copies: int) -> list[str]:
    """Rows of 40 to 90 words, and copies with up to four words replaced."""
    random = Random(seed)
    made = [invented_words(random, random.randint(40, 90)) for _ in range(rows)]
    made += [edited(random, random.choice(made), random.randint(1, 4)) for _ in range(copies)]
    return list(map(" ".join, made))


def above(texts: list[str], shingle: Shingle, threshold: float) -> dict[tuple[int, int], float]:
    """All pairs from a threshold on, by comparing everything with everything."""
    sets = [set(shingle_list(text, shingle)) for text in texts]
    found = {}
    for left, right in combinations(range(len(texts)), 2):
        value = len(sets[left] & sets[right]) / len(sets[left] | sets[right])
        if value >= threshold:
            found[left, right] = value
    return found


@pytest.mark.parametrize("shingle", [PROMPT_SHINGLE, ROW_SHINGLE])
def test_all_pairs_are_found_and_all_are_right(shingle: Shingle) -> None:
    """Against brute force: recall 1 at J >= .8 and .98 at J >= .7, every Jaccard exact.

    Nothing is said to be above the threshold that is below.
    """
    texts = generated(3, 140, 140)
    truth = above(texts, shingle, 0.7)
    found = near_duplicates(texts, shingle)
    pairs = map(tuple, found.pairs.tolist())
    reported = dict(zip(pairs, found.jaccard.tolist(), strict=True))
    assert len(truth) > 90
    assert min(reported.values()) < 0.7
    near = pairs_from(found, 0.7)
    assert near <= truth.keys()
    for pair in near:
        assert truth[pair] == pytest.approx(reported[pair])
    assert len(near) >= 0.98 * len(truth)
    assert {pair for pair, value in truth.items() if value >= 0.8} <= near
    assert not found.variant.any()


def test_copies_are_found_behind_a_shared_template() -> None:
    """Where 600 rows share four fifths of their words, so that buckets are large.

    Edited copies are still found.
    """
    random = Random(4)
    template = invented_words(random, 80)
    rows = [[*template, *invented_words(random, 20)] for _ in range(600)]
    rows += [edited(random, row, 1) for row in rows[:60]]
    found = near_duplicates(list(map(" ".join, rows)))
    pairs = pairs_from(found, 0.85)
    planted = {(number, 600 + number) for number in range(60)}
    assert len(planted & pairs) >= 59
    assert pairs <= planted


def test_clusters_larger_than_a_bucket_are_found() -> None:
    """Three clusters of 60 near-copies of one text fill buckets; all close pairs are found."""
    random = Random(9)
    base = invented_words(random, 300)
    families = [edited(random, base, 20) for _ in range(3)]
    texts = []
    for family in families:
        texts += [" ".join(edited(random, family, 1)) for _ in range(60)]
    truth = above(texts, ROW_SHINGLE, 0.8)
    pairs = pairs_from(near_duplicates(texts), 0.8)
    assert len(truth) == 3 * 60 * 59 / 2
    assert pairs <= truth.keys()
    assert len(pairs) >= 0.98 * len(truth)


def test_a_cluster_of_near_copies_becomes_one_star() -> None:
    """200 rows that each differ from the first in one word of 90 have one centre."""
    random = Random(8)
    base = invented_words(random, 90)
    texts = [" ".join(base)]
    texts += [" ".join(edited(random, base, 1)) for _ in range(199)]
    assert np.bincount(centres_of(near_duplicates(texts)))[0] >= 195


def test_many_equal_texts_are_one_cluster() -> None:
    """200 equal texts, more than a small bucket holds, become one star around the first."""
    texts = ["another one"] + ["the same text again and again"] * 200
    assert centres_of(near_duplicates(texts)).tolist() == [0] + [1] * 200


def test_short_and_empty_texts_do_not_collapse() -> None:
    """Texts shorter than a shingle match only texts that are equal when normalised.

    Wordless ones match only themselves.
    """
    texts = ["yes", "no", "18", "19", "", "?", "!", "Yes.", "hi", "h"]
    found = near_duplicates(texts, ROW_SHINGLE)
    assert found.pairs[found.jaccard >= 0.7].tolist() == [[0, 7]]
    assert centres_of(near_duplicates([])).tolist() == []
    assert centres_of(near_duplicates([""])).tolist() == [0]


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ("add 12 and 7", "add 7 and 12", True),
        ("FM 1506", "FM 1507", False),
        ("5 - 3", "5 + 3", False),
        ("costs 1,000", "costs 1.000", False),
        ("C++ code", "C# code", False),
        ("a well-known tale", "a well known tale", True),
        ("１２ eggs", "12 eggs", True),
    ],
)
def test_numbers(left: str, right: str, is_same: bool) -> None:
    """Numbers count with their signs and in any order; a hyphen between words does not."""
    assert (number_multiset(left) == number_multiset(right)) is is_same


def test_other_numbers_make_a_variant() -> None:
    """Texts that differ in numbers or arithmetic signs are variants, never in one star.

    Equal ones still are.
    """
    body = "a train leaves the station and travels on a straight line to the town for"
    texts = [
        f"{body} 1506 miles",
        f"{body} 1507 miles",
        f"{body} 1507 miles!",
        "5 - 3",
        "5 + 3",
        "5 + 3 =",
    ]
    found = near_duplicates(texts, PROMPT_SHINGLE)
    variants = set(map(tuple, found.pairs[found.variant].tolist()))
    assert {(0, 1), (3, 4)} <= variants
    assert centres_of(found).tolist() == [0, 1, 1, 3, 4, 5]


def test_stars_are_not_transitive() -> None:
    """A chain keeps its far end: who is dropped is paired with a row that is kept."""
    chain = np.array([[0, 1], [1, 2], [2, 3]])
    none = np.empty((0, 2), dtype=np.int64)
    assert star_centres(np.arange(5), chain).tolist() == [0, 0, 2, 2, 4]
    assert star_centres(np.arange(3), none).tolist() == [0, 1, 2]


def test_copies_of_a_dropped_row_are_dropped() -> None:
    """A row equal to one that is near to the centre goes, too.

    Only its first copy is compared with others.
    """
    near = (
        "the quick brown fox jumps over the lazy dog and then it runs far away into the dark green "
        "wood"
    )
    texts = [f"{near} tonight", near, near.upper(), f"{near}!", "something else"]
    assert centres_of(near_duplicates(texts)).tolist() == [0, 0, 0, 0, 4]


def test_every_dropped_row_is_near_to_a_kept_one() -> None:
    """In chains of edits each row that goes has J >= .7 to its centre, which is kept."""
    random = Random(5)
    chain = []
    for _ in range(12):
        row = invented_words(random, 60)
        for _ in range(12):
            chain.append(" ".join(row))
            row = edited(random, row, 3)
    centres = centres_of(near_duplicates(chain))
    assert 12 < len(set(centres.tolist())) < len(chain)
    for row, centre in enumerate(centres):
        assert centres[centre] == centre
        assert jaccard(chain[row], chain[centre], ROW_SHINGLE) >= 0.7


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs come out whether the texts go through in one chunk or in many."""
    texts = generated(6, 60, 60)
    whole = near_duplicates(texts)
    monkeypatch.setattr(shingles, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(similarity, "_CHUNK_PAIRS", 7)
    chunked = near_duplicates(texts)
    assert len(whole.pairs) > 20
    assert np.array_equal(whole.pairs, chunked.pairs)
    assert np.array_equal(whole.jaccard, chunked.jaccard)


def test_prompt_clusters() -> None:
    """Prompts that differ in form or a word share a cluster.

    Other numbers, other prompts and other scripts do not.
    """
    prompts = [
        "Explain why the sky looks blue during the day.",
        "How many eggs are in 12 boxes of 6 eggs each?",
        "explain why the sky looks blue during the day",
        "Please explain why the sky looks blue during the day!",
        "How many eggs are in 14 boxes of 6 eggs each?",
        "空はなぜ昼間に青く見えるのか説明してください。",
        "空はなぜ夕方に赤く見えるのか説明してください。",
        "空はなぜ昼間に青く見えるのか説明してください",
    ]
    assert prompt_clusters(prompts).tolist() == [0, 1, 0, 0, 4, 5, 6, 5]


def test_a_template_with_short_inputs_is_no_cluster() -> None:
    """300 prompts that share all but one word do not become one cluster.

    Equal and nearly equal ones stay together.
    """
    random = Random(10)
    template = "Classify the following word as positive or negative and answer with one word only"
    prompts = [f"{template}: {invented_words(random, 1)[0]}" for _ in range(300)]
    prompts += [prompt + "!" for prompt in prompts[:20]]
    assert np.bincount(centres_of(near_duplicates(prompts, PROMPT_SHINGLE))).max() > 200
    clusters = prompt_clusters(prompts)
    assert clusters[300:].tolist() == clusters[:20].tolist()
    assert np.bincount(clusters).max() < 10


def test_variants_are_thinned() -> None:
    """Of a row's many pairs with other numbers at most ten are kept; each later row is listed."""
    text = "A long enough question about the number {} and nothing else at all?"
    texts = [text.format(number) for number in range(100, 180)]
    found = near_duplicates(texts, PROMPT_SHINGLE)
    assert found.variant.all()
    listed = np.bincount(found.pairs[found.jaccard >= 0.7][:, 1], minlength=80)
    assert listed.max() == 10
    assert listed[1:].min() > 0
