"""What stands at the paths of a recipe, by content: a run and its inputs may be moved between two
starts.

`contents.json` in the run folder holds a fingerprint for each path of the recipe. Paths themselves
are hints.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from sft_recipes import run_folder
from sft_recipes.recipe import Recipe, map_paths, rebase_paths
from sft_recipes.text_files import interpreting

Contents = Mapping[str, str]

# Of a larger file so many parts are read: a model's shards of many gigabytes are told apart by
# their sizes, their headers and any of these parts.
_WHOLE_BYTES = 2**28
_PARTS = 64
_PART_BYTES = 2**20
_CONFIGS = ("config.json", "adapter_config.json")
_MODEL_FILE = re.compile(r"(adapter_)?config\.json|.*\.safetensors|.*\.safetensors\.index\.json")
_FIX = "delete it: paths are then compared as they are written"


def record_contents(recipe: Recipe) -> None:
    """Write the fingerprints of what is there now; of what is not there, those of before stay."""
    known = read_contents(recipe.output_dir)
    contents = path_contents(recipe)
    for key in _paths(recipe):
        if key in known:
            contents.setdefault(key, known[key])
    path = recipe.output_dir / run_folder.CONTENTS
    run_folder.write_json(path, {"contents": contents})


def read_contents(folder: Path) -> Contents:
    """The fingerprints that a run folder holds, by key; none in that of an earlier version."""
    path = folder / run_folder.CONTENTS
    if not path.is_file():
        return {}
    content = run_folder.read_json(path, _FIX)
    contents: dict[str, str] = {}
    with interpreting(str(path), _FIX):
        for key, recorded in content.get("contents", {}).items():
            contents[key] = str(recorded)
    return contents


def path_contents(recipe: Recipe) -> dict[str, str]:
    """The fingerprint of each path of the recipe that is there, by key."""
    contents = {}
    for key, path in _paths(recipe).items():
        if path.exists():
            contents[key] = fingerprint(path)
    return contents


def by_content(values: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """A recipe's keys with the fingerprint in the place of each path that has one."""
    return map_paths(values, lambda key, path: contents.get(key, path))


def _paths(recipe: Recipe) -> dict[str, Path]:
    """What may be a path in the recipe, by key, as seen from the working directory."""
    paths: dict[str, Path] = {}

    def note(key: str, path: str) -> str:
        if key != "output_dir" and "\0" not in path:
            paths[key] = Path(path)
        return path

    map_paths(rebase_paths(recipe.values, recipe.path.parent if recipe.path else None), note)
    return paths


def fingerprint(path: Path) -> str:
    """Of a file its size and content; of a folder the names and contents of its files, of the folder
    of a model or an adapter those that make it.
    """
    if not path.is_dir():
        digest = xxhash.xxh3_128()
        _add_file(digest, path)
        return f"xxh3_128:{digest.hexdigest()}"
    files = sorted(file for file in path.iterdir() if file.is_file())
    if any((path / name).is_file() for name in _CONFIGS):
        files = [file for file in files if _MODEL_FILE.fullmatch(file.name)]
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        _add_file(digest, file)
    return f"xxh3_128:{digest.hexdigest()}"


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8))
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_PART_BYTES):
                digest.update(block)
            return
        for number in range(_PARTS):
            file.seek((size - _PART_BYTES) * number // (_PARTS - 1))
            digest.update(file.read(_PART_BYTES))
