"""Normalisation, shingles, exact Jaccard, near-duplicate pairs and stars, against answers by hand and brute force."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from sft_recipes import similarity
from sft_recipes.similarity import (
    PROMPT_SHINGLE,
    ROW_SHINGLE,
    Duplicates,
    Shingle,
    jaccard_of_pairs,
    near_duplicates,
    normalise,
    number_multiset,
    prompt_clusters,
    shingle_hashes,
    star_centres,
    words,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def some_words(random: Random, count: int, vocabulary: int = 3000) -> list[str]:
    """Words of a small language, the same for the same numbers."""
    return [
        "".join(Random(random.randrange(vocabulary)).choices(LETTERS, k=6)) for _ in range(count)
    ]


def edited(random: Random, old: list[str], changes: int) -> list[str]:
    """A copy with some words replaced."""
    new = list(old)
    for place in random.sample(range(len(new)), changes):
        new[place] = "".join(random.choices(LETTERS, k=6))
    return new


def shingle_set(text: str, shingle: Shingle) -> set[object]:
    """The definition, slowly."""
    plain = normalise(text)
    units = list(plain) if shingle.unit == "char" else words(text)
    if len(units) < shingle.size:
        return {plain} if plain else set()
    return {tuple(units[at : at + shingle.size]) for at in range(len(units) - shingle.size + 1)}


def jaccard(one: set[object], other: set[object]) -> float:
    """The definition, with two empty sets equal."""
    return len(one & other) / len(one | other) if one | other else 1.0


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
    """Case, forms and punctuation go; letters and vowel signs of every script stay; scripts without spaces divide."""
    assert normalise(text) == normal
    assert words(text) == split


@pytest.mark.parametrize(
    "shingle", [PROMPT_SHINGLE, ROW_SHINGLE, Shingle("char", 1), Shingle("word", 1)]
)
def test_texts_do_not_touch_in_a_batch(shingle: Shingle) -> None:
    """Many texts at once give each what it gets alone, empty, wordless and broken neighbours included."""
    texts = ["a, b.", "", "...", "..c", "d..", " ", "é?", "!\n?", "x", "日本 y", ""]
    hashes, offsets, whole = shingle_hashes(texts, shingle)
    for number, part in enumerate(np.split(hashes, offsets[1:-1])):
        alone, _, (value,) = shingle_hashes(texts[number : number + 1], shingle)
        assert part.tolist() == alone.tolist() and whole[number] == value


@pytest.mark.parametrize(
    "shingle", [PROMPT_SHINGLE, ROW_SHINGLE, Shingle("word", 1), Shingle("word", 8)]
)
def test_shingles_are_those_of_the_definition(shingle: Shingle) -> None:
    """Each text has the shingles of the definition, two hashes are equal exactly if the shingles are."""
    random = Random(1)
    texts = [
        "",
        "abc",
        "abcd e",
        "?!",
        "日本語のテキスト",
        *(" ".join(some_words(random, n, 30)) for n in range(40)),
    ]
    hashes, offsets, _ = shingle_hashes(texts, shingle)
    meaning: dict[int, object] = {}
    for text, part in zip(texts, np.split(hashes, offsets[1:-1]), strict=True):
        expected = shingle_set(text, shingle)
        assert len(set(part.tolist())) == len(expected)
        plain = normalise(text)
        units = list(plain) if shingle.unit == "char" else words(text)
        ordered = [
            tuple(units[at : at + shingle.size]) for at in range(len(units) - shingle.size + 1)
        ]
        for value, gram in zip(part.tolist(), ordered or [plain], strict=False):
            assert meaning.setdefault(value, gram) == gram
    assert len(set(meaning.values())) == len(meaning)


def test_whole_text_hash_sees_the_normalised_text_only() -> None:
    """Whole-text hashes are equal exactly for texts that are equal when normalised, wherever they stand."""
    _, _, whole = shingle_hashes(["A b!", "", "c", "a  B", "a b c"], ROW_SHINGLE)
    assert whole[0] == whole[3]
    assert len(set(whole.tolist())) == 4


@pytest.mark.parametrize("shingle", [PROMPT_SHINGLE, ROW_SHINGLE])
def test_jaccard_is_exact(shingle: Shingle) -> None:
    """The Jaccard of each pair is that of the definition on sets, empty and short texts included."""
    random = Random(2)
    texts = [
        "",
        "",
        "ab",
        "AB!",
        "abc",
        *(" ".join(some_words(random, n, 12)) for n in range(2, 30)),
    ]
    pairs = np.array([(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))])
    expected = [
        jaccard(shingle_set(texts[i], shingle), shingle_set(texts[j], shingle)) for i, j in pairs
    ]
    assert jaccard_of_pairs(texts, pairs, shingle).tolist() == pytest.approx(expected)


def centres_of(found: Duplicates) -> npt.NDArray[np.int64]:
    """The star centre of each text by its duplicates."""
    return star_centres(
        found.first, found.pairs[~found.variant & (found.jaccard >= similarity.THRESHOLD)]
    )


def generated(seed: int, rows: int, copies: int) -> list[str]:
    """Rows of 40 to 90 words, and copies with up to four words replaced."""
    random = Random(seed)
    made = [some_words(random, random.randint(40, 90)) for _ in range(rows)]
    made += [edited(random, random.choice(made), random.randint(1, 4)) for _ in range(copies)]
    return [" ".join(row) for row in made]


def above(texts: list[str], shingle: Shingle, threshold: float) -> dict[tuple[int, int], float]:
    """All pairs from a threshold on, by comparing everything with everything."""
    sets = [shingle_set(text, shingle) for text in texts]
    values = (
        (i, j, jaccard(sets[i], sets[j]))
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    )
    return {(i, j): value for i, j, value in values if value >= threshold}


@pytest.mark.parametrize("shingle", [PROMPT_SHINGLE, ROW_SHINGLE])
def test_all_pairs_are_found_and_all_are_right(shingle: Shingle) -> None:
    """Against brute force: recall 1 at J >= .8 and .98 at J >= .7, every Jaccard exact, nothing above that is below."""
    texts = generated(3, 140, 140)
    truth = above(texts, shingle, 0.7)
    found = near_duplicates(texts, shingle)
    reported = {
        (i, j): value
        for (i, j), value in zip(found.pairs.tolist(), found.jaccard.tolist(), strict=True)
    }
    certain = {pair: value for pair, value in reported.items() if value >= 0.7}
    assert len(truth) > 90 and any(value < 0.7 for value in reported.values())
    assert all(truth[pair] == pytest.approx(value) for pair, value in certain.items())
    assert len(certain) >= 0.98 * len(truth)
    assert {pair for pair, value in truth.items() if value >= 0.8} <= certain.keys()
    assert not found.variant.any()


def test_copies_are_found_behind_a_shared_template() -> None:
    """Where 600 rows share four fifths of their words, so that buckets are large, edited copies are still found."""
    random = Random(4)
    template = some_words(random, 80)
    rows = [[*template, *some_words(random, 20)] for _ in range(600)]
    rows += [edited(random, row, 1) for row in rows[:60]]
    found = near_duplicates([" ".join(row) for row in rows])
    pairs = {tuple(pair) for pair in found.pairs[found.jaccard >= 0.85].tolist()}
    planted = {(number, 600 + number) for number in range(60)}
    assert len(planted & pairs) >= 59
    assert pairs <= planted


def test_clusters_larger_than_a_bucket_are_found() -> None:
    """Three clusters of 60 near-copies on one text: buckets are too large, yet all close pairs are found."""
    random = Random(9)
    base = some_words(random, 300)
    families = [edited(random, base, 20) for _ in range(3)]
    texts = [" ".join(edited(random, family, 1)) for family in families for _ in range(60)]
    truth = above(texts, ROW_SHINGLE, 0.8)
    found = near_duplicates(texts)
    pairs = {tuple(pair) for pair in found.pairs[found.jaccard >= 0.8].tolist()}
    assert len(truth) == 3 * 60 * 59 / 2
    assert pairs <= truth.keys() and len(pairs) >= 0.98 * len(truth)


def test_a_cluster_of_near_copies_becomes_one_star() -> None:
    """200 rows that each differ from the first in one word of 90 have one centre, though buckets are too large."""
    random = Random(8)
    base = some_words(random, 90)
    texts = [" ".join(row) for row in [base, *(edited(random, base, 1) for _ in range(199))]]
    assert np.bincount(centres_of(near_duplicates(texts)))[0] >= 195


def test_many_equal_texts_are_one_cluster() -> None:
    """200 equal texts, more than a bucket is searched for, become one star with the first as its centre."""
    texts = ["another one"] + ["the same text again and again"] * 200
    assert centres_of(near_duplicates(texts)).tolist() == [0] + [1] * 200


def test_short_and_empty_texts_do_not_collapse() -> None:
    """Texts shorter than a shingle match only texts that are equal when normalised; wordless ones only themselves."""
    texts = ["yes", "no", "18", "19", "", "?", "!", "Yes.", "hi", "h"]
    found = near_duplicates(texts, ROW_SHINGLE)
    assert found.pairs[found.jaccard >= 0.7].tolist() == [[0, 7]]
    assert centres_of(near_duplicates([])).tolist() == []
    assert centres_of(near_duplicates([""])).tolist() == [0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
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
def test_numbers(one: str, other: str, same: bool) -> None:
    """Numbers count with their signs and in any order; a hyphen between words does not."""
    assert (number_multiset(one) == number_multiset(other)) is same


def test_other_numbers_make_a_variant() -> None:
    """Texts that differ in numbers or arithmetic signs are variants, never in one star; equal ones still are."""
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
    variants = {tuple(pair) for pair in found.pairs[found.variant].tolist()}
    assert {(0, 1), (3, 4)} <= variants
    assert centres_of(found).tolist() == [0, 1, 1, 3, 4, 5]


def test_stars_are_not_transitive() -> None:
    """A chain keeps its far end: who is dropped is paired with a row that is kept."""
    assert star_centres(np.arange(5), np.array([[0, 1], [1, 2], [2, 3]])).tolist() == [
        0,
        0,
        2,
        2,
        4,
    ]
    assert star_centres(np.arange(3), np.empty((0, 2), dtype=np.int64)).tolist() == [0, 1, 2]


def test_copies_of_a_dropped_row_are_dropped() -> None:
    """A row equal to one that is near to the centre goes, too, though only its first copy is compared with others."""
    near = "the quick brown fox jumps over the lazy dog and then it runs far away into the dark green wood"
    texts = [f"{near} tonight", near, near.upper(), f"{near}!", "something else"]
    assert centres_of(near_duplicates(texts)).tolist() == [0, 0, 0, 0, 4]


def test_every_dropped_row_is_near_to_a_kept_one() -> None:
    """In generated rows with chains of edits, each row that is not kept has J >= .7 to its centre, which is kept."""
    random, chain = Random(5), []
    for _ in range(12):
        row = some_words(random, 60)
        for _ in range(12):
            chain.append(" ".join(row))
            row = edited(random, row, 3)
    centres = centres_of(near_duplicates(chain))
    assert 12 < len(set(centres.tolist())) < len(chain)
    sets = [shingle_set(text, ROW_SHINGLE) for text in chain]
    assert all(centres[centre] == centre for centre in centres)
    assert all(jaccard(sets[row], sets[centre]) >= 0.7 for row, centre in enumerate(centres))


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(similarity, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(similarity, "_CHUNK_PAIRS", 7)
    yield


def test_pieces_change_nothing(request: pytest.FixtureRequest) -> None:
    """The same pairs come out whether the texts go through in one piece or in many."""
    texts = generated(6, 60, 60)
    whole = near_duplicates(texts)
    request.getfixturevalue("_small_pieces")
    pieces = near_duplicates(texts)
    assert len(whole.pairs) > 20
    assert np.array_equal(whole.pairs, pieces.pairs) and np.array_equal(
        whole.jaccard, pieces.jaccard
    )


def test_prompt_clusters() -> None:
    """Prompts that differ in form or a word share a cluster; other numbers, other prompts and other scripts do not."""
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
    """300 prompts that share all but one word do not become one cluster; equal and nearly equal ones stay together."""
    random = Random(10)
    template = "Classify the following word as positive or negative and answer with one word only"
    prompts = [f"{template}: {' '.join(some_words(random, 1))}" for _ in range(300)]
    prompts += [prompt + "!" for prompt in prompts[:20]]
    assert np.bincount(centres_of(near_duplicates(prompts, PROMPT_SHINGLE))).max() > 200
    clusters = prompt_clusters(prompts)
    assert clusters[300:].tolist() == clusters[:20].tolist()
    assert np.bincount(clusters).max() < 10


def test_variants_are_thinned() -> None:
    """Of a row's many pairs with other numbers at most ten are kept; here each later row is still listed."""
    texts = [
        f"A long enough question about the number {number} and nothing else at all?"
        for number in range(100, 180)
    ]
    found = near_duplicates(texts, PROMPT_SHINGLE)
    assert found.variant.all()
    listed = np.bincount(found.pairs[found.jaccard >= 0.7][:, 1], minlength=80)
    assert listed.max() == 10 and (listed[1:] > 0).all()
