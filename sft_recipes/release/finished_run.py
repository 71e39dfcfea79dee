"""A finished run: what a release starts from."""

from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe

ADAPTER = "adapter_model.safetensors"
EXPORT = "export.json"  # what the export of a run found, beside the exported model


def finished_run(run: Path) -> Recipe:
    """The recipe of a finished run. Raises InputError for any other folder."""
    if not run_folder.is_run_folder(run):
        fix = "name the output_dir of a finished run"
        raise InputError(Problem(str(run), "", "this is no run folder", fix))
    state = run_folder.read_state(run).get("state")
    if state != "finished":
        where = str(run / run_folder.RUN_STATE)
        fix = f"let it finish: sft-recipes train {run / run_folder.RECIPE}"
        raise InputError(Problem(where, "state", f"the run is {state}, not finished", fix))
    return load_recipe(run / run_folder.RECIPE)


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The run's evaluations by name, the newest first: the content of their `metrics.json`."""
    paths = list(run.glob(f"{run_folder.EVALUATIONS}/*/metrics.json"))
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent.name: run_folder.read_json(path) for path in paths}
