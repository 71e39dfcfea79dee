"""Rows that another run prepared, taken for a run that has the same rows: nothing is tokenized again."""

import shutil
from pathlib import Path

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.prepared import MANIFEST, UNFINISHED, check_files, read_manifest
from sft_recipes.data.prepared_inputs import changed_inputs
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import Recipe


def reuse_prepared(recipe: Recipe, renderer: ChatRenderer, run: Path, folder: Path) -> None:
    """Copy the prepared rows of `run` (or of a prepared folder) to `folder`.

    Weights, shares, `max_rows` and the size of `eval_split` may be others: they are drawn when rows
    are loaded. Raises InputError where the rows themselves would be others, and where `folder` has
    rows already.
    """
    option = "--reuse"
    source = run if (run / MANIFEST).is_file() else run / run_folder.PREPARED
    if not (source / MANIFEST).is_file():
        fix = "name a run folder that was prepared or trained"
        raise InputError(Problem(str(run), option, "there are no prepared rows", fix))
    changed = changed_inputs(recipe, renderer, read_manifest(source))
    if changed:
        what = f"its rows are others: {', '.join(changed)} changed since they were prepared"
        raise InputError(Problem(str(source), option, what, f"prepare without {option}"))
    if (folder / MANIFEST).is_file():
        if folder.samefile(source):
            return
        what = "has prepared rows already"
        fix = f"remove {folder}, or leave {option} out"
        raise InputError(Problem(str(folder), option, what, fix))
    # Not what `datasets` has kept beside the rows, packs of another run.
    not_rows = shutil.ignore_patterns("cache-*", UNFINISHED)
    shutil.copytree(source, folder, ignore=not_rows, dirs_exist_ok=True)


def link_prepared(recipe: Recipe, renderer: ChatRenderer, source: Path, folder: Path) -> None:
    """Let `folder` have the files of a prepared folder, by links, where they hold for this recipe.

    What is written beside them stays in `folder`. Raises InputError for a damaged folder.
    """
    if not (source / MANIFEST).is_file():
        return
    manifest = read_manifest(source)
    if changed_inputs(recipe, renderer, manifest):
        return
    # Here, where a damaged file is named by its own folder.
    check_files(source, manifest, whole=True)
    for name in [*manifest["files"], MANIFEST]:
        (folder / name).symlink_to((source / name).resolve())
