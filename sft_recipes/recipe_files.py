"""The recipes and launch configs that ship with the package: list them, find them, copy them. No torch here."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.errors import InputError, Problem, suggest

_PACKAGE = Path(__file__).resolve().parent
GATE = "gate.yaml"  # the bounds that belong to the recipes of a folder


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
    for path in sorted(set(root.rglob("*.yaml")) - set(root.rglob(GATE))):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found.append(
            ShippedRecipe(
                path.relative_to(root).with_suffix("").as_posix(), path, first.lstrip("# ")
            )
        )
    return found


def launch_config(name: Path | str) -> Path:
    """The accelerate config called `name`, or the file if `name` is one."""
    name, path = str(name), Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = {file.stem: file for file in sorted(_shipped("accelerate_configs").glob("*.yaml"))}
    if name in known:
        return known[name]
    fix = f"use one of {', '.join(known)}, or a file"
    raise InputError(
        Problem("command line", "--launch", f"there is no accelerate config {name!r}", fix)
    )


def copy_recipe(name: str, output: Path, force: bool = False) -> list[Path]:
    """Copy a shipped recipe and what belongs to it into `output`; returns the files written.

    Raises InputError, with nothing written, for an unknown or unsafe name and for files that exist already.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in recipes:
        what = f"there is no shipped recipe {name!r}"
        raise InputError(Problem("command line", "RECIPE", what, suggest(name, recipes)))
    chosen = recipes[name].path
    others = {recipe.path for recipe in recipes.values()}
    beside = [
        file for file in sorted(chosen.parent.rglob("*")) if file.is_file() and file not in others
    ]
    pairs = [(file, output / file.relative_to(chosen.parent)) for file in (chosen, *beside)]
    for _, target in pairs:
        if not target.resolve().is_relative_to(output.resolve()) or target.is_symlink():
            raise InputError(
                Problem(
                    str(target), "", "lies outside the output folder", "choose another --output"
                )
            )
        if target.exists() and not force:
            raise InputError(
                Problem(
                    str(target), "", "exists already", "choose another --output, or add --force"
                )
            )
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return [target for _, target in pairs]
