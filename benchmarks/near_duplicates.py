"""Near-duplicates among generated rows with planted edited copies: this project against datasketch, in one run.

    python -m benchmarks.near_duplicates [--rows 20000] [--rounds 3] [--data ROWS.jsonl] [--ours-only]

Both sides see the same rows, cut the same word 3-grams, use 128 permutations and verify every candidate by exact
Jaccard; each measurement runs in a process of its own, the sides in turn. datasketch (not a dependency of this
project: `pip install datasketch`) runs with the bands it chooses for the threshold and with ours. Up to 20,000 rows
recall is over all true pairs, found by a sparse matrix product; above, over the planted pairs, and ours runs alone.
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
from pathlib import Path
from typing import Any

import numpy as np

from sft_recipes.similarity import (
    ROW_SHINGLE,
    jaccard_of_pairs,
    near_duplicates,
    normalise,
    shingle_hashes,
)

THRESHOLD, SLOTS = 0.8, 128
COPY_SHARE, EDITS = 0.09, (0.0, 0.01, 0.02, 0.04, 0.08)
EXACT_TRUTH_ROWS = 20_000
Pair = tuple[int, int]


def generate(rows: int, seed: int = 0) -> tuple[list[str], list[Pair]]:
    """Rows of 60 to 130 words drawn by frequency; 9 % are copies of an earlier row with 0 to 8 % of the words replaced.

    Returns the texts and (original, copy) of each planted pair.
    """
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfw"))
    spelled = (
        "".join(letters[generator.integers(0, 16, size)])
        for size in generator.integers(2, 10, 30_000)
    )
    vocabulary = np.array(list(dict.fromkeys(spelled)), dtype=object)
    weights = np.cumsum(1 / (np.arange(len(vocabulary)) + 10))
    texts: list[str] = []
    planted = []
    first_copy = round(rows * (1 - COPY_SHARE))
    for row in range(rows):
        if row < first_copy:
            size = int(generator.integers(60, 131))
            chosen = vocabulary[np.searchsorted(weights, generator.random(size) * weights[-1])]
        else:
            original = int(generator.integers(0, first_copy))
            chosen = np.array(texts[original].split(" "), dtype=object)
            share = EDITS[row % len(EDITS)]
            places = generator.choice(len(chosen), round(share * len(chosen)), replace=False)
            chosen[places] = generator.choice(vocabulary, len(places))
            planted.append((original, row))
        texts.append(" ".join(chosen))
    return texts, planted


def read(path: Path, rows: int) -> list[str]:
    """The text of the first rows of a JSON Lines file: all string values of a row, joined."""
    with path.open(encoding="utf-8") as file:
        parsed = [json.loads(line) for _, line in zip(range(rows), file, strict=False)]
    return ["\n".join(value for value in row.values() if isinstance(value, str)) for row in parsed]


def run_ours(texts: Sequence[str]) -> set[Pair]:
    """Pairs at the threshold by this project; copies of one text stand in one pair each, with the first."""
    found = near_duplicates(texts, ROW_SHINGLE, THRESHOLD)
    return set(map(tuple, found.pairs[found.jaccard >= THRESHOLD].tolist()))


def run_datasketch(texts: Sequence[str], bands: Pair | None) -> set[Pair]:
    """Pairs at the threshold by datasketch and exact verification on sets, its bulk interfaces used."""
    from datasketch import MinHash, MinHashLSH

    grams = []
    for text in texts:
        words = normalise(text).split(" ")
        grams.append(
            {" ".join(words[at : at + 3]).encode() for at in range(max(1, len(words) - 2))}
        )
    signatures = MinHash.bulk(grams, num_perm=SLOTS)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=SLOTS, params=bands)
    with index.insertion_session() as session:
        for row, signature in enumerate(signatures):
            session.insert(row, signature, check_duplication=False)
    found = set()
    for row, signature in enumerate(signatures):
        for other in index.query(signature):
            if other > row:
                shared = len(grams[row] & grams[other])
                if shared >= THRESHOLD * (len(grams[row]) + len(grams[other]) - shared):
                    found.add((row, int(other)))
    return found


SIDES: dict[str, Callable[[Sequence[str]], set[Pair]]] = {
    "ours": run_ours,
    "datasketch, bands 32 x 4": lambda texts: run_datasketch(texts, (32, 4)),
    "datasketch, its own bands": lambda texts: run_datasketch(texts, None),
}


def measure(side: str, rows: int, data: Path | None) -> tuple[float, int, int, set[Pair]]:
    """Seconds, memory of the process in bytes with the rows alone and at its peak, pairs. Making rows is not timed."""
    texts = read(data, rows) if data else generate(rows)[0]
    # Neither are imports and tables that are made once.
    SIDES[side](texts[:100])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    pairs = SIDES[side](texts)
    seconds = time.perf_counter() - started
    return seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, pairs


def truth(texts: Sequence[str]) -> set[Pair]:
    """All pairs at the threshold, exactly."""
    from scipy.sparse import csr_matrix

    hashes, offsets, _ = shingle_hashes(texts, ROW_SHINGLE)
    _, column = np.unique(hashes, return_inverse=True)
    matrix = csr_matrix((np.ones(len(column), dtype=np.int32), column, offsets))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    shared = (matrix @ matrix.T).tocoo()
    sizes = np.diff(matrix.indptr)
    upper = shared.row < shared.col
    row, other, count = shared.row[upper], shared.col[upper], shared.data[upper]
    near = count >= THRESHOLD * (sizes[row] + sizes[other] - count)
    return set(zip(row[near].tolist(), other[near].tolist(), strict=True))


def joined(pairs: set[Pair], texts: Sequence[str]) -> set[Pair]:
    """Pairs with every text replaced by the first equal one, so that both ways to list equal texts count alike."""
    first: dict[str, int] = {}
    place = [first.setdefault(normalise(text), row) for row, text in enumerate(texts)]
    return {
        (min(place[a], place[b]), max(place[a], place[b])) for a, b in pairs if place[a] != place[b]
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    sides = list(SIDES)
    if arguments.ours_only or arguments.rows > EXACT_TRUTH_ROWS:
        sides = ["ours"]
    elif importlib.util.find_spec("datasketch") is None:
        print("datasketch is not installed: ours alone")
        sides = ["ours"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, list[Any]] = {}
    # Before this process makes the rows itself: a child's peak memory starts at what its parent held.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(arguments.rounds):
            for side in sides:
                spent, *results[side] = pool.apply(measure, (side, arguments.rows, arguments.data))
                seconds[side].append(spent)
    texts, planted = (
        (read(arguments.data, arguments.rows), []) if arguments.data else generate(arguments.rows)
    )
    exact = len(texts) <= EXACT_TRUTH_ROWS
    chosen = np.array(planted).reshape(-1, 2)
    near = chosen[jaccard_of_pairs(texts, chosen, ROW_SHINGLE) >= THRESHOLD]
    true = joined(truth(texts) if exact else set(map(tuple, near.tolist())), texts)
    megabytes = sum(map(len, texts)) / 1e6
    print(
        f"{len(texts):,} rows, {megabytes:,.0f} million characters, {len(true):,} true pairs at J >= {THRESHOLD}"
    )
    for side, (before, peak, pairs) in results.items():
        found = joined(pairs, texts)
        recall, precision = (len(found & true) / max(len(part), 1) for part in (true, found))
        ratio = statistics.median(seconds[side]) / statistics.median(seconds["ours"])
        each = ", ".join(f"{value:.2f}" for value in seconds[side])
        print(
            f"{side}: {each} s ({ratio:.1f} x ours), recall {recall:.4f}, {'precision' if exact else 'planted share'} "
            f"{precision:.4f}, memory {before / 1e9:.2f} GB with the rows, {peak / 1e9:.2f} GB at the peak"
        )


if __name__ == "__main__":
    main()
