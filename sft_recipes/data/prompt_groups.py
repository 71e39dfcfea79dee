"""Which rows have the same prompt: they share a `group`, a seeded hash of the prompt's text.

Groups of near-duplicate prompts join the smallest of them. A group is never divided between train
and eval (`splits.py`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from sft_recipes.data.row_table import Integers
from sft_recipes.messages import Example
from sft_recipes.shingles import folded
from sft_recipes.similarity import Signatures, prompt_clusters


def prompt_text(example: Example) -> str:
    """Everything but the assistant's turns, normalised (NFKC, case, whitespace)."""
    if example.text is not None:
        return folded(example.text)
    texts: list[str] = []
    for message in example.messages:
        if message["role"] != "assistant":
            texts.append(str(message.get("content")))
    return folded("\0".join(texts))


def prompt_group(prompt: str, seed: int) -> int:
    """A seeded 63-bit hash of a prompt's text."""
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(prompt.encode("utf-8"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1


def join_near_duplicates(
    groups: Integers, prompts: Sequence[str], signatures: Signatures | None = None
) -> Integers:
    """Which groups join which other one, from the prompt of each group and, if at hand, its signature.

    Returns (m, 2) pairs of a group and the group it joins, by the former, for the groups whose
    prompts are near-duplicates of others. What is one cluster is decided in
    `similarity.prompt_clusters`; it takes the smallest of its groups.
    """
    if not len(groups):
        return np.empty((0, 2), dtype=np.int64)
    clusters = prompt_clusters(prompts, signatures)
    smallest = np.full(len(groups), np.iinfo(np.int64).max)
    np.minimum.at(smallest, clusters, groups)
    joined = smallest[clusters]
    pairs = np.stack([groups, joined], axis=1)[groups != joined]
    return pairs[np.argsort(pairs[:, 0])]


def joined_groups(groups: Integers, joined: Integers) -> Integers:
    """The groups, each replaced by the one that it joins; `joined` as `join_near_duplicates` says."""
    if not len(joined):
        return groups
    place = np.searchsorted(joined[:, 0], groups).clip(max=len(joined) - 1)
    return np.where(joined[place, 0] == groups, joined[place, 1], groups)
