"""`sft-recipes evaluate --benchmark`: public benchmarks on the folder that would be served."""

import sys
from pathlib import Path

import typer

from sft_recipes import run_folder
from sft_recipes.cli_output import print_json, speaking_on_stderr
from sft_recipes.errors import InputError, Problem

# Options of `evaluate` that mean something here; the others belong to an evaluation of rows.
_OPTIONS = {
    "model_or_run",
    "benchmark",
    "benchmark_data",
    "max_rows",
    "max_new_tokens",
    "shots",
    "batch_size",
    "output",
    "as_json",
}


def evaluate_benchmarks(context: typer.Context) -> None:
    """Export if need be, print the settings, let lm-eval ask and score, print its scores."""
    from sft_recipes.evaluation import public_benchmarks as benchmarks
    from sft_recipes.report.benchmark_report import results_text, settings_text

    asked = _asked(context)
    names = [name.strip() for name in str(asked["benchmark"]).split(",")]
    name = asked["model_or_run"]
    as_json = bool(asked.get("as_json"))
    with speaking_on_stderr(as_json):
        model = _servable(Path(name))
        request = benchmarks.BenchmarkRequest(
            model=model or name,
            benchmarks=names,
            folder=_folder(name, asked.get("output")),
            data=asked.get("benchmark_data"),
            system_prompt=_system_prompt(Path(name)),
            max_rows=asked.get("max_rows"),
            max_new_tokens=asked.get("max_new_tokens"),
            shots=asked.get("shots"),
            batch_size=asked.get("batch_size"),
        )
        settings = benchmarks.write_settings(request)
        print(f"lm-eval asks {', '.join(names)}")
        print(settings_text(settings))
        path = request.folder / benchmarks.WORK / benchmarks.SETTINGS
        print(f"the same by hand:  lm-eval run --config {path}\n", flush=True)
        code = benchmarks.ask(request)
        if code:
            raise typer.Exit(code)
        results = benchmarks.write_results(request, settings)
    if as_json:
        print_json({"folder": str(request.folder), "results": results})
    else:
        print(results_text(results))
        print(f"\nwritten to {request.folder}: report.html, and a JSON file for each benchmark")


def _asked(context: typer.Context) -> dict:
    """The options that were given. Raises InputError for one that benchmarks do not have."""
    asked = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            asked[name] = value
    for name in [*asked, *context.args]:
        if name not in _OPTIONS:
            option = f"--{name.lstrip('-')}"
            what = "means nothing to a public benchmark"
            fix = "leave it out, or evaluate rows with it in a call of its own"
            raise InputError(Problem("command line", option, what, fix))
    if "benchmark" not in asked:
        what = "holds rows for benchmarks, and none is named"
        raise InputError(
            Problem("command line", "--benchmark_data", what, "add --benchmark ifeval,gsm8k")
        )
    return asked


def _servable(run: Path) -> str | None:
    """The exported model of a run, exported now if it was not; None for what is no run.

    Raises InputError for an export that is older than the weights of the run.
    """
    from sft_recipes.release.export import FOLDER, export
    from sft_recipes.release.finished_run import EXPORT

    if not run_folder.is_run_folder(run) or (run / EXPORT).is_file():
        return None
    folder = run / FOLDER
    if not (folder / EXPORT).is_file():
        print(f"{folder} is not there yet: exporting, as `sft-recipes export {run}` does")
        export(run, progress=sys.stderr.isatty())
        return str(folder)
    weights = max(path.stat().st_mtime for path in run.glob("*.safetensors"))
    if weights > (folder / EXPORT).stat().st_mtime:
        what = "the export is older than the weights of the run"
        fix = f"sft-recipes export {run} --force"
        raise InputError(Problem(str(folder), "", what, fix))
    return str(folder)


def _system_prompt(model: Path) -> str | None:
    """The system prompt that a run was trained with."""
    if not run_folder.is_run_folder(model):
        return None
    from sft_recipes.recipe_keys import load_recipe

    return load_recipe(model / run_folder.RECIPE).labels.system_prompt


def _folder(name: str, output: Path | None) -> Path:
    """Where results are written."""
    if output is not None:
        return output
    return run_folder.evaluations_of(Path(name)) / run_folder.BENCHMARKS
