"""Mixtures as the alignment handbook and open-r1 write them, in the keys of this project.

Newer versions read `dataset_mixture`, a list of sets each with the share of its rows that is used; older ones read
`dataset_mixer`, a mapping of names to such shares, beside `dataset_splits` and `dataset_configs`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# What their keys of a set are called here.
_NAMES = {
    "id": "path",
    "config": "name",
    "split": "split",
    "columns": "columns",
    "weight": "weight",
}
# A handbook that is told no splits reads these two.
_SPLITS = ("train", "test")
# What is wrong with training on a split that is named as one for evaluation.
SEEN = "rows for evaluation are trained: what they measure later has been seen"
MIXER_KEYS = ("dataset_mixer", "dataset_splits", "dataset_configs")


def from_mixture(mixture: Any) -> dict[str, Any] | None:
    """Our keys for a `dataset_mixture`; None for one that is not of the documented form."""
    if not isinstance(mixture, Mapping) or not mixture.keys() <= {
        "datasets",
        "seed",
        "test_split_size",
    }:
        return None
    sources = []
    for entry in mixture.get("datasets") or []:
        if not isinstance(entry, Mapping) or "id" not in entry or not entry.keys() <= _NAMES.keys():
            return None
        sources.append({ours: entry.get(theirs) for theirs, ours in _NAMES.items()})
    keys: dict[str, Any] = {"datasets": _plain(sources)}
    if mixture.get("test_split_size") is not None:
        keys["eval_split"] = mixture["test_split_size"]
    # Their mixtures are drawn and shuffled with 0 where no seed is given.
    keys["data_seed"] = mixture.get("seed", 0)
    return keys if keys["datasets"] else None


def from_mixer(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our keys for `dataset_mixer`, `dataset_splits` and `dataset_configs` of a recipe; None where they do not fit
    one another, or have no counterpart.
    """
    mixer = values.get("dataset_mixer")
    splits = values.get("dataset_splits") or _SPLITS
    if mixer is None:
        return _beside_name(values)
    if not isinstance(mixer, Mapping):
        return None
    configs = values.get("dataset_configs") or [None] * len(mixer)
    # A split is trained if its name says so, and held out if it says that.
    trained = [split for split in splits if "train" in split]
    held_out = [split for split in splits if "train" not in split]
    if len(configs) != len(mixer) or len(trained) != 1 or len(held_out) > 1:
        return None
    sources = []
    for (path, weight), config in zip(mixer.items(), configs, strict=True):
        sources.append({"path": path, "name": config, "split": trained[0], "weight": weight})
    keys: dict[str, Any] = {"datasets": _plain(sources)}
    if held_out:
        keys["dataset_test_split"] = held_out[0]
    return keys


def _beside_name(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """`dataset_splits` and `dataset_configs` beside `dataset_name`, as our keys."""
    configs = values.get("dataset_configs") or []
    if len(configs) > 1 or not values.get("dataset_name"):
        return None
    keys = {}
    if configs:
        keys["dataset_config"] = configs[0]
    for split in values.get("dataset_splits") or []:
        key = "dataset_train_split" if "train" in split else "dataset_test_split"
        if key in keys:
            return None
        keys[key] = split
    return keys


def _plain(sources: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sets without what is not said, and without those of which no row is used."""
    plain = []
    for source in sources:
        entry = {key: value for key, value in source.items() if value is not None}
        weight = entry.get("weight", 1)
        if weight == 1:
            entry.pop("weight", None)
        if weight != 0:
            plain.append(entry)
    return plain


def trained_test_splits(sources: Iterable[Any]) -> list[str]:
    """The splits of a mixture that are named as if they were to be held out, each with its set."""
    names = []
    for source in sources:
        if isinstance(source, Mapping) and is_test_split(str(source.get("split", ""))):
            names.append(f"{source['split']} of {source.get('path')}")
    return names


def is_test_split(name: str) -> bool:
    """Whether a split's name says that it is for evaluation: test_sft, validation[:10%], eval."""
    first_word = name.partition("[")[0].partition("_")[0]
    return first_word.startswith(("test", "eval", "valid", "dev"))
