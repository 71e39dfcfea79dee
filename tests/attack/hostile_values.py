"""Values that no key should take in silence, and keys of a recipe that a tiny base trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# By name, as Python values; a test writes them into a recipe or hands them over as they are.
VALUES: Mapping[str, Any] = {
    "minus one": -1,
    "minus five": -5,
    "zero": 0,
    "small negative": -0.5,
    "one and a half": 1.5,
    "large": 10**12,
    "beyond 32 bits": 2**32,
    "beyond 63 bits": 2**63 + 1,
    "5,000 digits": 10**5000,
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "not a number": float("nan"),
    "largest float": 1.7e308,
    "empty text": "",
    "blank text": " \n ",
    "text": "no such thing",
    "NUL": "a\0b",
    "half a surrogate": "a\ud800b",
    "very long text": "x" * 100_000,
    "up": "../../../../etc/passwd",
    "truth": True,
    "empty list": [],
    "list of nothing": [None],
    "deep list": nested(3000),
    "mapping of numbers": {1: 2},
    "infinite inside": {"a": [float("inf")]},
}
# What a recipe holds beside the key that is tried.
MINIMAL: Mapping[str, Any] = {
    "model_name_or_path": "./base",
    "dataset_name": "./train.jsonl",
    "output_dir": "./run",
    "max_length": 128,
    "use_cpu": True,
}
