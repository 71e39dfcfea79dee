"""The `sft-recipes` command. Bodies are a few lines; torch and transformers are imported inside them.

Exit codes: 0 ok, 1 a check failed, 2 wrong input, 3 training fault.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sft_recipes.errors import InputError, Problem, SFTRecipesError
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings, parse_overrides

app = typer.Typer(
    name="sft-recipes",
    help="Supervised fine-tuning on TRL in which every step is checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML)")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]
FormatOption = Annotated[str | None, typer.Option("--format", help="Data format; detected if not given")]
TemplateOption = Annotated[str | None, typer.Option("--chat_template", help="Shipped name or .jinja file")]


@app.command()
def init(
    recipe: Annotated[str | None, typer.Argument(help="Shipped recipe, such as quickstart/full")] = None,
    model: Annotated[str | None, typer.Option(help="Your model: writes a recipe for it; needs --data")] = None,
    data: Annotated[str | None, typer.Option(help="Your data: file, folder or Hub name")] = None,
    format: FormatOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to (default: named after the recipe)")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite files that exist")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, copy one with everything that belongs to it, or write one for your model and data."""
    from sft_recipes.recipe_files import copy_recipe, shipped_recipes

    if model and data and not recipe:
        return _init_for(model, data, format, output or Path(Path(data).stem), force, as_json)
    if model or data:
        what = "a shipped recipe is copied as it is" if recipe else "--model and --data go together"
        raise InputError(Problem("command line", "init", what, "give --model M --data D and no RECIPE"))
    if recipe is None:
        recipes = shipped_recipes()
        if as_json:
            return _print_json([{"name": one.name, "summary": one.summary} for one in recipes])
        for one in recipes:
            print(f"{one.name:24} {one.summary}")
        return print("\ncopy one: sft-recipes init NAME\nyour own: sft-recipes init --model MODEL --data DATA")
    folder = output or Path(recipe.split("/")[0])
    files = copy_recipe(recipe, folder, force)
    return _print_next(folder / f"{recipe.split('/')[-1]}.yaml", [str(file) for file in files], as_json)


def _init_for(model: str, data: str, format: str | None, output: Path, force: bool, as_json: bool) -> None:
    from rich.console import Console

    from sft_recipes.data.inspection import coloured, summary_line
    from sft_recipes.training.new_recipe import write_recipe

    made = write_recipe(model, data, format, output, force)
    if not as_json:
        console = Console()
        for row in made.rows:
            console.rule(row.example.where, align="left", style="grey50")
            if row.labelled is not None:
                console.print(coloured(made.renderer, row.labelled), soft_wrap=True)
        console.print(f"\n{summary_line(made.rows)} (green = trained)\n", markup=False)
    _print_next(made.path, [str(made.path)], as_json)


def _print_next(path: Path, files: list[str], as_json: bool) -> None:
    if as_json:
        return _print_json({"files": files})
    print(f"wrote {len(files)} files to {path.parent}\n\nnext:")
    for verb in ("inspect", "check", "train"):
        print(f"  sft-recipes {verb} {path}")
    return None


@app.command(context_settings=OVERRIDES)
def check(context: typer.Context, recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Check everything before a GPU is touched: keys, template, labels of all rows, what is dropped, the plan."""
    from sft_recipes.recipe_keys import load_recipe
    from sft_recipes.training.check import check_recipe

    result = check_recipe(load_recipe(recipe, parse_overrides(context.args)), progress=not as_json)
    if as_json:
        return _print_json(result.as_json())
    return print("\n".join(result.lines()))


@app.command(context_settings=OVERRIDES)
def inspect(
    context: typer.Context,
    recipe_or_data: Annotated[Path, typer.Argument(help="Recipe file, or a data file or folder")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or Hub name, for data")] = None,
    chat_template: TemplateOption = None,
    max_length: Annotated[int | None, typer.Option("--max_length", help="Longest row, in tokens")] = None,
    format: FormatOption = None,
    rows: Annotated[int | None, typer.Option(help="Input rows to show (default: 3; with --json all)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows exactly as the trainer sees them; trained tokens are green."""
    from rich.console import Console

    from sft_recipes.data.inspection import coloured, inspect_rows, summary_line

    renderer, data, labels = _inspection(context, recipe_or_data, tokenizer, chat_template, max_length, format)
    if as_json:
        for row in inspect_rows(renderer, data, labels, rows):
            if row.labelled is not None:
                _print_json(row.as_json(renderer.tokenizer), indent=None)
            elif row.dropped is not None:
                print(f"{row.example.where}: dropped, {row.dropped.reason}: {row.dropped.detail}", file=sys.stderr)
        return
    console = Console()
    shown = list(inspect_rows(renderer, data, labels, 3 if rows is None else rows))
    for row in shown:
        console.rule(f"{row.example.where}", align="left", style="grey50")
        if row.labelled is not None:
            console.print(coloured(renderer, row.labelled), soft_wrap=True)
        elif row.dropped is not None:
            console.print(f"dropped, {row.dropped.reason}: {row.dropped.detail}", style="red", markup=False)
    console.print(f"\n{summary_line(shown)} (green = trained)", markup=False)


def _inspection(
    context: typer.Context,
    path: Path,
    tokenizer: str | None,
    chat_template: str | None,
    max_length: int | None,
    format: str | None,
) -> tuple[Any, DataSettings, LabelSettings]:
    """Renderer and settings from a recipe, or from a data path and a tokenizer."""
    from sft_recipes.data.chat_templates import attach_chat_template
    from sft_recipes.models import load_tokenizer
    from sft_recipes.recipe_keys import load_recipe

    if path.suffix in (".yaml", ".yml"):
        overrides = parse_overrides(context.args)
        options = {"chat_template": chat_template, "max_length": max_length, "format": format}
        overrides |= {key: value for key, value in options.items() if value is not None}
        recipe = load_recipe(path, overrides)
        loaded = load_tokenizer(tokenizer or recipe.model_name, recipe.model.get("model_revision"))
        return attach_chat_template(loaded, recipe.template), recipe.data, recipe.labels
    if context.args:
        raise InputError(Problem("command line", context.args[0], "unknown option", "see sft-recipes inspect --help"))
    if tokenizer is None:
        raise InputError(
            Problem("command line", "--tokenizer", "is needed to inspect data", "add --tokenizer DIR_OR_ID")
        )
    renderer = attach_chat_template(load_tokenizer(tokenizer), TemplateSettings(chat_template))
    source = DatasetSource(path=str(path), format=format)
    return renderer, DataSettings(datasets=(source,)), LabelSettings(max_length=max_length)


@app.command(context_settings=OVERRIDES)
def prepare(context: typer.Context, recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Tokenize a recipe's data once into its run folder; training and all ranks then load it."""
    from sft_recipes import run_folder
    from sft_recipes.data.chat_templates import attach_chat_template
    from sft_recipes.data.ledger import ledger_lines
    from sft_recipes.data.prepare import prepare as prepare_data
    from sft_recipes.models import load_tokenizer
    from sft_recipes.recipe_keys import load_recipe

    loaded = load_recipe(recipe, parse_overrides(context.args))
    tokenizer = load_tokenizer(loaded.model_name, loaded.model.get("model_revision"))
    renderer = attach_chat_template(tokenizer, loaded.template)
    data = prepare_data(loaded, renderer, loaded.output_dir / run_folder.PREPARED, progress=not as_json)
    if as_json:
        return _print_json(data.summary)
    print("\n".join(ledger_lines(data.summary["sources"])))
    return print(f"\nprepared in {data.folder}\nnext: sft-recipes train {recipe}")


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipeArgument,
    launch: Annotated[str | None, typer.Option(help="Accelerate config to launch with, such as ddp")] = None,
    num_processes: Annotated[int | None, typer.Option("--num_processes", help="Processes to launch")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe, or resume it. `--key value` overrides a key of the recipe."""
    import contextlib

    # With --json the run speaks on stderr, and stdout holds the state it ended in.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if launch is not None:
            from sft_recipes.training.launch import launch_training

            code = launch_training(recipe, launch, num_processes, context.args)
        else:
            from sft_recipes.training.train import main as train_main

            code = train_main(["--config", str(recipe), *context.args])
    if as_json:
        from sft_recipes import run_folder
        from sft_recipes.recipe_keys import load_recipe

        folder = load_recipe(recipe, parse_overrides(context.args)).output_dir
        state = folder / run_folder.RUN_STATE
        _print_json({"output_dir": str(folder), **(run_folder.read_json(state) if state.is_file() else {})})
    raise typer.Exit(code)


@app.command()
def evaluate(
    model_or_run: Annotated[str, typer.Argument(help="Run folder, model folder or Hub name")],
    data: Annotated[str | None, typer.Option(help="Data to answer (default: the run's own eval rows)")] = None,
    split: Annotated[str, typer.Option(help="Split of the data folder")] = "test",
    format: FormatOption = None,
    base: Annotated[str | None, typer.Option(help="Model, run or earlier evaluation folder to compare with")] = None,
    chat_template: TemplateOption = None,
    max_rows: Annotated[int | None, typer.Option("--max_rows", help="Answer only the first rows")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens")] = 256,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Prompts per batch")] = 32,
    output: Annotated[Path | None, typer.Option(help="Folder for metrics, samples and report")] = None,
    examples: Annotated[int, typer.Option(help="Answers to print side by side")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Generate answers, score them, compare with a base, write metrics, samples and an HTML report."""
    from sft_recipes.evaluation.standalone import EvaluationRequest, evaluate_standalone

    request = EvaluationRequest(
        model_or_run, data, split, format, base, chat_template, max_rows, max_new_tokens, batch_size, output
    )
    result = evaluate_standalone(request, progress=not as_json)
    if as_json:
        return _print_json(result.as_json())
    return result.print(examples)


def _print_json(content: Any, indent: int | None = 2) -> None:
    import json

    print(json.dumps(content, ensure_ascii=False, indent=indent))


def main() -> None:
    """Run the command line; every intended error becomes its message and its exit code."""
    try:
        app(standalone_mode=True)
    except SFTRecipesError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
