"""Folders of this machine: taken out of what is published, and what tells them from other text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.recipe import Recipe

_TEXTS = (
    "system_prompt",
    "system_instruction",
    "chat_template_kwargs",
)  # may begin with a slash and are no paths
# Where people keep files; a path elsewhere that is not one of this run is not told from text.
_FOLDERS = (
    "home|Users|root|mnt|media|tmp|var|opt|srv|data|scratch|workspaces?|nfs|fsx|gpfs|lustre|work"
    "|Volumes|private|kaggle|dbfs|storage|efs|cluster"
)
_NAME = r"[\w.@+-][^\s\"'`)\],;<>]*"
LOCAL_PATH = re.compile(
    rf"(?<![\w./])(?:file://)?/(?:{_FOLDERS})\d*(?:[-_][\w-]*)?/{_NAME}"
    # Three folders in quotes are a path wherever it begins, but for those that every machine has.
    r"|(?<=[\"'])/(?!path/|your|usr/|etc/|dev/|bin/|api/|v\d)[\w.-]+(?:/[\w.@+-]+){2,}(?=[\"'])"
    # A home folder; what begins with a dot there is the same on every machine.
    rf"|(?<![\w/~.])~\w*/\w[\w.-]*/{_NAME}"
    # Windows: in JSON a single backslash begins an escape, as in `Q:\n`.
    r"|\b[A-Za-z]:(?:\\\\\w|\\(?![nrtbfu])\w|[\\/](?i:users|temp|tmp|repos|runs)[\\/])[^\s\"'`]*"
)
_HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|csv|parquet|arrow)$)\w[\w.-]*(?:/[\w.-]+)?")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as it is published: its keys as set, without the folders of this machine."""
    values = {**public(recipe.values), "output_dir": "./"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def is_hub_name(name: str) -> bool:
    """Whether this names something on the Hub, not a folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def public(value: Any) -> Any:
    """Plain data of ours without this machine's folders: `/a/b/c` and `../b/c` become `./c`."""
    if isinstance(value, Mapping):
        shown = dict(value)
        for key in shown.keys() - set(_TEXTS):
            shown[key] = public(shown[key])
        return shown
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if isinstance(value, str) and re.match(r"(~|[A-Za-z]:)?[/\\]+\w|\.\.?[/\\]", value):
        return "./" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
