"""A copied recipe works where it was copied to, and so does what its README says."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from sft_recipes import cli
from sft_recipes.recipe import shipped_recipes
from sft_recipes.recipe_copies import copy_recipe
from sft_recipes.recipe_keys import load_recipe
from tests.documents import blocks_of

NAMES = [recipe.name for recipe in shipped_recipes()]
# Options of commands that name a file or a folder.
PATHS = ("--data", "--base", "--gate")


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_keeps_everything_beside_itself(name: str, tmp_path: Path) -> None:
    """Its run goes beside it, its data and base are those of the copy, and all else is as it was."""
    shipped = {recipe.name: recipe.path for recipe in shipped_recipes()}
    copy = load_recipe(copy_recipe(name, tmp_path / "copy")[0])
    original = load_recipe(shipped[name])
    assert copy.output_dir == tmp_path / "copy" / "run"
    changed = [key for key in copy.values if copy.values[key] != original.values[key]]
    assert changed == ["output_dir"]
    for key in ("model_name_or_path", "dataset_name"):
        if str(copy.values[key]).startswith("./"):
            assert (tmp_path / "copy" / copy.values[key]).exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_copied_readme_work_from_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command is one of `sft-recipes`, is taken by its parser, and names files that are there or that a
    command before it writes. No text speaks of the place that the recipe was copied from.
    """
    folder = tmp_path / "copy"
    copy_recipe(name, folder)
    monkeypatch.chdir(folder)
    commands = typer.main.get_command(cli.app)
    written = {"run"}
    seen = 0
    for block in blocks_of(folder / "README.md"):
        for line in block.commands:
            program, verb, target, *options = shlex.split(line)
            assert program == "sft-recipes"
            context = typer.Context(commands)
            parsed = commands.get_command(context, verb).make_context(verb, [target, *options])  # type: ignore[attr-defined]
            assert Path(target).exists() or target in written
            if verb in ("train", "check"):
                overrides = dict(zip(parsed.args[::2], parsed.args[1::2], strict=True))
                assert load_recipe(target).output_dir.resolve() == folder.resolve() / "run"
                written.add(overrides.get("--output_dir", "run"))
                # What `train` would write: a run that is not there is refused by the commands after it.
                Path(overrides.get("--output_dir", "run")).mkdir(parents=True, exist_ok=True)
            for option, value in pairwise(options):
                if option in PATHS and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                    assert Path(value).exists()
            seen += 1
    assert seen
    for path in (*folder.glob("*.md"), *folder.glob("*.yaml")):
        assert f"recipes/{name.split('/')[0]}" not in path.read_text(encoding="utf-8")
