"""Which prepared rows are trained and which are held out: seeded, before any rank sees them, rows never straddling.

Rows with the same prompt share a `group` (a hash of the normalised prompt), near-duplicate prompts share the smallest
of theirs, and a group is never divided between train and eval.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource
from sft_recipes.similarity import folded, prompt_clusters

Indices = npt.NDArray[np.int64]


def prompt_text(example: Example) -> str:
    """Everything but the assistant's turns, normalised (NFKC, case, whitespace)."""
    if example.text is not None:
        text = example.text
    else:
        text = "\0".join(
            str(message.get("content"))
            for message in example.messages
            if message["role"] != "assistant"
        )
    return folded(text)


def prompt_group(prompt: str, seed: int) -> int:
    """A seeded 63-bit hash of a prompt's text."""
    key = seed.to_bytes(8, "little", signed=True)
    return (
        int.from_bytes(
            hashlib.blake2b(prompt.encode("utf-8"), digest_size=8, key=key).digest(), "little"
        )
        >> 1
    )


def join_near_duplicates(prompts: Mapping[int, str]) -> Indices:
    """(m, 2) pairs of a group and the group it joins, for the groups whose prompts are near-duplicates of others.

    What is one cluster is decided in `similarity.prompt_clusters`; it takes the smallest of its groups.
    """
    groups = np.fromiter(prompts, dtype=np.int64, count=len(prompts))
    clusters = prompt_clusters(list(prompts.values()))
    smallest = np.full(len(groups), np.iinfo(np.int64).max)
    np.minimum.at(smallest, clusters, groups)
    joined = smallest[clusters]
    return np.stack([groups, joined], axis=1)[groups != joined]


def split_eval(groups: Indices, eval_split: float) -> tuple[Indices, Indices]:
    """Indices of (train, eval) rows: whole groups in the order of their hash until `eval_split` is reached.

    `eval_split` below 1 is a share of the rows, from 1 on a count. The hash is seeded, so the draw is, too. A group of
    more than half the rows wanted stays in train if there are smaller ones: it would be most of the evaluation.
    """
    wanted = round(eval_split * len(groups)) if eval_split < 1 else int(eval_split)
    if wanted <= 0 or not len(groups):
        return np.arange(len(groups)), np.empty(0, dtype=np.int64)
    names, sizes = np.unique(groups, return_counts=True)
    small = sizes <= max(wanted / 2, 1)
    small |= ~small.any()
    enough = int(np.searchsorted(np.cumsum(sizes[small]), wanted)) + 1
    held_out = np.isin(groups, names[small][:enough])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def mix(
    sources: Sequence[DatasetSource], source_of_row: Indices, seed: int, max_rows: int | None
) -> Indices:
    """Indices of the rows to train, with repeats where a `weight` above 1 asks for them.

    `fraction` is a share of the final mixture: the largest mixture that oversamples nothing, as in TRL, but drawn by
    seed instead of taking the first rows. `max_rows` then draws that many of the result.
    """
    generator = np.random.default_rng(seed)
    by_source = [np.flatnonzero(source_of_row == number) for number in range(len(sources))]
    if any(source.fraction is not None for source in sources):
        shares = np.array([source.fraction or 0.0 for source in sources])
        shares = shares / shares.sum()
        total = min(
            len(rows) / share for rows, share in zip(by_source, shares, strict=True) if share > 0
        )
        parts = [
            _draw(rows, round(share * total), generator)
            for rows, share in zip(by_source, shares, strict=True)
        ]
    else:
        parts = [
            _weighted(rows, source.weight, generator)
            for rows, source in zip(by_source, sources, strict=True)
        ]
    chosen = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    if max_rows is not None and max_rows < len(chosen):
        chosen = _draw(chosen, max_rows, generator)
    return chosen


def _weighted(rows: Indices, weight: float, generator: np.random.Generator) -> Indices:
    """Every row `floor(weight)` times plus a seeded share of the rows once more."""
    whole = int(weight)
    extra = _draw(rows, round((weight - whole) * len(rows)), generator)
    return np.concatenate([np.tile(rows, whole), extra]).astype(np.int64)


def _draw(rows: Indices, count: int, generator: np.random.Generator) -> Indices:
    """`count` of the rows, in their own order."""
    return rows[np.sort(generator.permutation(len(rows))[:count])]
