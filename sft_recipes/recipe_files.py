"""The recipes and launch configs that ship with the package: list them, find them, copy them. No torch here."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.errors import InputError, Problem, suggest

_PACKAGE = Path(__file__).resolve().parent
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9_-]*")


def _shipped(folder: str) -> Path:
    """A folder that travels inside the wheel; in a checkout it stands beside the package."""
    inside = _PACKAGE / "shipped" / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A shipped recipe: `name` is model/kind, `summary` the first comment line of its file."""

    name: str
    path: Path
    summary: str


def shipped_recipes() -> list[ShippedRecipe]:
    """All shipped recipes, by name."""
    root = _shipped("recipes")
    found = []
    for path in sorted(root.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found.append(ShippedRecipe(path.relative_to(root).with_suffix("").as_posix(), path, first.lstrip("# ")))
    return found


def launch_config(name: str) -> Path:
    """The accelerate config called `name`, or the file if `name` is one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = {file.stem: file for file in sorted(_shipped("accelerate_configs").glob("*.yaml"))}
    if name in known:
        return known[name]
    fix = f"use one of {', '.join(known)}, or a file"
    raise InputError(Problem("command line", "--launch", f"there is no accelerate config {name!r}", fix))


def copy_recipe(name: str, output: Path, force: bool = False) -> list[Path]:
    """Copy a shipped recipe and what belongs to it into `output`; returns the files written.

    Raises InputError, with nothing written, for an unknown or unsafe name and for files that exist already.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if not _NAME.fullmatch(name) or name not in recipes:
        what = f"there is no shipped recipe {name!r}"
        raise InputError(Problem("command line", "RECIPE", what, suggest(name, recipes)))
    chosen = recipes[name].path
    extra = [path for path in chosen.parent.iterdir() if path.is_dir() or path.name == "README.md"]
    files = [chosen, *[file for path in extra for file in ([path] if path.is_file() else sorted(path.rglob("*")))]]
    pairs = [(file, output / file.relative_to(chosen.parent)) for file in files if file.is_file()]
    for _, target in pairs:
        if not target.resolve().is_relative_to(output.resolve()) or target.is_symlink():
            raise InputError(Problem(str(target), "", "lies outside the output folder", "choose another --output"))
        if target.exists() and not force:
            raise InputError(Problem(str(target), "", "exists already", "choose another --output, or add --force"))
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return [target for _, target in pairs]
