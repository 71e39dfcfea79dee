"""Near-duplicates among generated rows with planted edited copies: this project and datasketch.

    python -m benchmarks.near_duplicates [--rows 20000] [--rounds 3] [--data FILE] [--ours-only]

Both sides see the same rows, cut the same word 3-grams, use 128 permutations and verify every
candidate by exact Jaccard; each measurement runs in a process of its own, the sides in turn.
datasketch (not a dependency of this project: `pip install datasketch`) runs with the bands it
chooses for the threshold and with ours. Up to 20,000 rows recall is over all true pairs, found by a
sparse matrix product; above, over the planted pairs, and ours runs alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft_recipes.shingles import ROW_SHINGLE, jaccard_of_pairs, normalise, shingle_hashes
from sft_recipes.similarity import near_duplicates

THRESHOLD = 0.8
SLOTS = 128
COPY_SHARE = 0.09
EDITS = (0.0, 0.01, 0.02, 0.04, 0.08)
EXACT_TRUTH_ROWS = 20_000

# Positions of two rows, the earlier first.
Pair = tuple[int, int]


class Material(NamedTuple):
    """Texts, and (original, copy) of each planted pair."""

    texts: list[str]
    planted: list[Pair]


class Measurement(NamedTuple):
    """Seconds; bytes of the process with the rows alone and at its peak; pairs found."""

    seconds: float
    rows_bytes: int
    peak_bytes: int
    pairs: set[Pair]


def generate(rows: int, seed: int = 0) -> Material:
    """Rows of 60 to 130 words drawn by frequency.

    9 % are copies of an earlier row with 0 to 8 % of the words replaced.
    """
    generator = np.random.default_rng(seed)
    vocabulary = _vocabulary(generator)
    weights = np.cumsum(1 / (np.arange(len(vocabulary)) + 10))
    texts: list[str] = []
    planted = []
    first_copy = round(rows * (1 - COPY_SHARE))
    for row in range(rows):
        if row < first_copy:
            size = int(generator.integers(60, 131))
            drawn = generator.random(size) * weights[-1]
            words = vocabulary[np.searchsorted(weights, drawn)]
        else:
            original = int(generator.integers(0, first_copy))
            words = np.array(texts[original].split(" "), dtype=object)
            share = EDITS[row % len(EDITS)]
            places = generator.choice(len(words), round(share * len(words)), replace=False)
            words[places] = generator.choice(vocabulary, len(places))
            planted.append((original, row))
        texts.append(" ".join(words))
    return Material(texts, planted)


def _vocabulary(generator: np.random.Generator) -> np.ndarray:
    letters = np.array(list("etaoinshrdlucmfw"))
    words: dict[str, None] = {}
    for size in generator.integers(2, 10, 30_000):
        words["".join(letters[generator.integers(0, 16, size)])] = None
    return np.array(list(words), dtype=object)


def read(path: Path, rows: int) -> Material:
    """The text of the first rows of a JSON Lines file: all string values of a row, joined."""
    texts = []
    with path.open(encoding="utf-8") as file:
        for line in islice(file, rows):
            values = json.loads(line).values()
            texts.append("\n".join(value for value in values if isinstance(value, str)))
    return Material(texts, [])


def make(rows: int, data: Path | None) -> Material:
    """The rows of the file, or generated ones."""
    return generate(rows) if data is None else read(data, rows)


def run_ours(texts: Sequence[str]) -> set[Pair]:
    """Pairs at the threshold by this project.

    Copies of one text stand in one pair each, with the first.
    """
    duplicates = near_duplicates(texts, ROW_SHINGLE, THRESHOLD)
    pairs = duplicates.pairs[duplicates.jaccard >= THRESHOLD]
    return set(map(tuple, pairs.tolist()))


def run_datasketch(texts: Sequence[str], bands: Pair | None) -> set[Pair]:
    """Pairs at the threshold by datasketch and exact verification on sets.

    Its bulk interfaces are used.
    """
    from datasketch import MinHash, MinHashLSH

    grams = list(map(_word_grams, texts))
    signatures = MinHash.bulk(grams, num_perm=SLOTS)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=SLOTS, params=bands)
    with index.insertion_session() as session:
        for row, signature in enumerate(signatures):
            session.insert(row, signature, check_duplication=False)
    pairs = set()
    for row, signature in enumerate(signatures):
        for other in index.query(signature):
            if other > row:
                shared = len(grams[row] & grams[other])
                if shared >= THRESHOLD * (len(grams[row]) + len(grams[other]) - shared):
                    pairs.add((row, int(other)))
    return pairs


def _word_grams(text: str) -> set[bytes]:
    words = normalise(text).split(" ")
    starts = range(max(1, len(words) - 2))
    return {" ".join(words[start : start + 3]).encode() for start in starts}


def run_datasketch_with_our_bands(texts: Sequence[str]) -> set[Pair]:
    """See `run_datasketch`."""
    return run_datasketch(texts, (32, 4))


def run_datasketch_with_its_bands(texts: Sequence[str]) -> set[Pair]:
    """See `run_datasketch`."""
    return run_datasketch(texts, None)


SIDES: dict[str, Callable[[Sequence[str]], set[Pair]]] = {
    "ours": run_ours,
    "datasketch, bands 32 x 4": run_datasketch_with_our_bands,
    "datasketch, its own bands": run_datasketch_with_its_bands,
}


def measure(side: str, rows: int, data: Path | None) -> Measurement:
    """One run over the rows. Making them is not timed."""
    texts = make(rows, data).texts
    # Neither are imports and tables that are made once.
    SIDES[side](texts[:100])
    rows_bytes = _peak_bytes()
    started = time.perf_counter()
    pairs = SIDES[side](texts)
    seconds = time.perf_counter() - started
    return Measurement(seconds, rows_bytes, _peak_bytes(), pairs)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_all(
    sides: Sequence[str], arguments: argparse.Namespace
) -> dict[str, list[Measurement]]:
    """The measurements of each side, one a round."""
    measurements: dict[str, list[Measurement]] = {side: [] for side in sides}
    # Before this process makes the rows itself: a child's peak memory starts at what its parent
    # held.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(arguments.rounds):
            for side in sides:
                task = (side, arguments.rows, arguments.data)
                measurements[side].append(pool.apply(measure, task))
    return measurements


def all_pairs(texts: Sequence[str]) -> set[Pair]:
    """All pairs at the threshold, exactly."""
    from scipy.sparse import csr_matrix

    shingles = shingle_hashes(texts, ROW_SHINGLE)
    _, column = np.unique(shingles.hashes, return_inverse=True)
    ones = np.ones(len(column), dtype=np.int32)
    matrix = csr_matrix((ones, column, shingles.offsets))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    shared = (matrix @ matrix.T).tocoo()
    sizes = np.diff(matrix.indptr)
    union = sizes[shared.row] + sizes[shared.col] - shared.data
    near = (shared.row < shared.col) & (shared.data >= THRESHOLD * union)
    return set(zip(shared.row[near].tolist(), shared.col[near].tolist(), strict=True))


def near_planted(material: Material) -> set[Pair]:
    """The planted pairs that are still at the threshold after their edits."""
    pairs = np.array(material.planted).reshape(-1, 2)
    jaccard = jaccard_of_pairs(material.texts, pairs, ROW_SHINGLE)
    return set(map(tuple, pairs[jaccard >= THRESHOLD].tolist()))


def joined(pairs: set[Pair], texts: Sequence[str]) -> set[Pair]:
    """Pairs with every text replaced by the first equal one, however a side lists those."""
    first_of_text: dict[str, int] = {}
    first = [first_of_text.setdefault(normalise(text), row) for row, text in enumerate(texts)]
    result = set()
    for left, right in pairs:
        low, high = sorted((first[left], first[right]))
        if low != high:
            result.add((low, high))
    return result


def chosen_sides(arguments: argparse.Namespace) -> list[str]:
    """Which sides run."""
    if arguments.ours_only or arguments.rows > EXACT_TRUTH_ROWS:
        return ["ours"]
    if importlib.util.find_spec("datasketch") is None:
        print("datasketch is not installed: ours alone")
        return ["ours"]
    return list(SIDES)


def print_results(measurements: dict[str, list[Measurement]], material: Material) -> None:
    """A line for each side."""
    texts = material.texts
    is_exact = len(texts) <= EXACT_TRUTH_ROWS
    true = joined(all_pairs(texts) if is_exact else near_planted(material), texts)
    characters = sum(map(len, texts)) / 1e6
    print(
        f"{len(texts):,} rows, {characters:,.0f} million characters, "
        f"{len(true):,} true pairs at J >= {THRESHOLD}"
    )
    precision_name = "precision" if is_exact else "planted share"
    own_seconds = statistics.median(run.seconds for run in measurements["ours"])
    for side, runs in measurements.items():
        last = runs[-1]
        found = joined(last.pairs, texts)
        right = len(found & true)
        seconds = [run.seconds for run in runs]
        ratio = statistics.median(seconds) / own_seconds
        print(
            f"{side}: {', '.join(f'{value:.2f}' for value in seconds)} s ({ratio:.1f} x ours), "
            f"recall {right / max(len(true), 1):.4f}, "
            f"{precision_name} {right / max(len(found), 1):.4f}, "
            f"memory {last.rows_bytes / 1e9:.2f} GB with the rows, "
            f"{last.peak_bytes / 1e9:.2f} GB at the peak"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    measurements = measure_all(chosen_sides(arguments), arguments)
    print_results(measurements, make(arguments.rows, arguments.data))


if __name__ == "__main__":
    main()
