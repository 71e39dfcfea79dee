"""Which rows have the same prompt: they share a `group`, a seeded hash of the prompt's text.

Groups of near-duplicate prompts join the smallest of them. A group is never divided between train
and eval (`splits.py`).
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from sft_recipes.data.row_table import Integers
from sft_recipes.messages import Example
from sft_recipes.shingles import folded
from sft_recipes.similarity import prompt_clusters


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


def join_near_duplicates(prompts: Mapping[int, str]) -> Integers:
    """Which groups join which other one, from the prompt of each group.

    Returns (m, 2) pairs of a group and the group it joins, for the groups whose prompts are
    near-duplicates of others. What is one cluster is decided in `similarity.prompt_clusters`; it
    takes the smallest of its groups.
    """
    if not prompts:
        return np.empty((0, 2), dtype=np.int64)
    groups = np.fromiter(prompts, dtype=np.int64, count=len(prompts))
    clusters = prompt_clusters(list(prompts.values()))
    smallest = np.full(len(groups), np.iinfo(np.int64).max)
    np.minimum.at(smallest, clusters, groups)
    joined = smallest[clusters]
    return np.stack([groups, joined], axis=1)[groups != joined]
