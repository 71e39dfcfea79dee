"""What the commands print."""

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.recipe import shipped_recipes

if TYPE_CHECKING:
    from sft_recipes.data.chat_templates import ChatRenderer
    from sft_recipes.data.inspection import InspectedRow
    from sft_recipes.data.loading import RejectLog
    from sft_recipes.foreign.new_recipe import ForeignRecipe
    from sft_recipes.training.new_recipe import NewRecipe


def speaking_on_stderr(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """With --json nothing but the result stands on stdout."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(content: Any, indent: int | None = 2) -> None:
    """Plain data on stdout."""
    print(json.dumps(content, ensure_ascii=False, indent=indent))


def list_shipped(as_json: bool) -> None:
    """The shipped recipes, a line each, and how to get one."""
    recipes = shipped_recipes()
    if as_json:
        print_json([{"name": recipe.name, "summary": recipe.summary} for recipe in recipes])
        return
    for recipe in recipes:
        print(f"{recipe.name:24} {recipe.summary}")
    print("\ncopy one: sft-recipes init NAME")
    print("your own: sft-recipes init --model M --data D")


def say_written(files: Sequence[Path], as_json: bool) -> None:
    """Name the files that `init` wrote, the recipe first, and what to do with it."""
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return
    recipe = files[0]
    if len(files) == 1:
        print(f"wrote {recipe}")
    else:
        print(f"wrote {len(files)} files to {recipe.parent}")
    say_next(files)


def say_foreign(written: "ForeignRecipe", as_json: bool) -> None:
    """What `init --from` read and wrote."""
    if as_json:
        print_json(written.as_json())
        return
    written.print_text()
    if written.files:
        say_next(written.files, written.launch)


def say_next(files: Sequence[Path], launch: str | None = None) -> None:
    """What to do with a recipe that was written, and how it is to be launched."""
    recipe = files[0]
    print("\nnext:")
    print(f"  sft-recipes inspect {recipe}")
    print(f"  sft-recipes check {recipe}")
    print(f"  sft-recipes train {recipe}" + (f" --launch {launch}" if launch else ""))


def say_new_recipe(new: "NewRecipe", as_json: bool) -> None:
    """Show rows of a recipe that `init` wrote, what has to be known of it, and what comes next."""
    from sft_recipes.data.inspection import show_rows

    if not as_json:
        show_rows(new.renderer, new.rows)
        for note in new.notes:
            print(f"{note}\n")
    say_written([new.path], as_json)


def print_rows(
    renderer: "ChatRenderer", rows: Iterable["InspectedRow"], rejects: "RejectLog"
) -> None:
    """One line of JSON a row, those behind the others that were rejected while they were read.

    Dropped ones are named on stderr.
    """
    from sft_recipes.data.inspection import rejected_json, row_json
    from sft_recipes.data.labels import DroppedRow

    for row in rows:
        if isinstance(row.result, DroppedRow):
            why = f"{row.result.reason}: {row.result.detail}"
            print(f"{row.example.where}: dropped, {why}", file=sys.stderr)
        else:
            print_json(row_json(renderer, row.example, row.result), indent=None)
    for reject in rejects.rows:
        print_json(rejected_json(reject), indent=None)
    if rejects.total:
        print(f"{rejects.total} rows rejected", file=sys.stderr)
