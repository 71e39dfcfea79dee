"""The `sft-recipes` command. Bodies are a few lines; torch and transformers are imported inside them.

Exit codes: 0 ok, 1 a check or gate failed, 2 wrong input, 3 training fault, 4 a gate decided nothing, 75 preempted.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sft_recipes import run_folder
from sft_recipes.cli_options import (
    ColumnsOption,
    DataArgument,
    FormatOption,
    JsonOption,
    KernelsOption,
    LaunchOption,
    LengthOption,
    MappingOption,
    MessagesOption,
    ProcessesOption,
    RecipeArgument,
    RolesOption,
    RunArgument,
    TemplateOption,
    TokenizerOption,
    TurnsOption,
    data_options,
)
from sft_recipes.errors import InputError, Problem, SFTRecipesError
from sft_recipes.recipe import DatasetSource, parse_overrides
from sft_recipes.recipe_files import copy_recipe, shipped_recipes
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.recipe_rewrite import rewrite

app = typer.Typer(
    name="sft-recipes",
    help="Supervised fine-tuning on TRL in which every step is checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(
    review := typer.Typer(help="Blind human A/B review of two evaluations."), name="review"
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def init(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="Shipped recipe, such as quickstart/full")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Your model: writes a recipe for it; needs --data")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your data: file, folder or Hub name")] = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    column_mapping: MappingOption = None,
    message_mapping: MessagesOption = None,
    role_mapping: RolesOption = None,
    consecutive_turns: TurnsOption = None,
    chat_template: TemplateOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to (default: named after the recipe)")
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite files that exist")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, copy one with everything that belongs to it, or write one for your model and data."""
    if model and data and not recipe:
        from sft_recipes.data.inspection import show_rows
        from sft_recipes.training.new_recipe import RecipeRequest, write_recipe

        options = data_options(context)
        folder = output or Path(Path(data).stem)
        made = write_recipe(
            RecipeRequest(model, data, options, folder, force), progress=not as_json
        )
        files = [made.path]
        if not as_json:
            show_rows(made.renderer, made.rows)
            print(*made.notes, sep="\n", end="\n\n")
    elif model or data:
        what = "a shipped recipe is copied as it is" if recipe else "--model and --data go together"
        raise InputError(
            Problem("command line", "init", what, "give --model M --data D and no RECIPE")
        )
    elif recipe:
        files = copy_recipe(recipe, output or Path(recipe.split("/")[0]), force)
    else:
        recipes = shipped_recipes()
        if as_json:
            return _print_json([{"name": one.name, "summary": one.summary} for one in recipes])
        lines = [f"{one.name:24} {one.summary}" for one in recipes]
        return print(
            *lines,
            "\ncopy one: sft-recipes init NAME\nyour own: sft-recipes init --model M --data D",
            sep="\n",
        )
    if as_json:
        return _print_json({"files": [str(file) for file in files]})
    path = files[0]
    commands = [f"  sft-recipes {verb} {path}" for verb in ("inspect", "check", "train")]
    written = path if len(files) == 1 else f"{len(files)} files to {path.parent}"
    return print(f"wrote {written}\n\nnext:", *commands, sep="\n")


@app.command(context_settings=OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipeArgument,
    launch: LaunchOption = None,
    num_processes: ProcessesOption = None,
    measure: Annotated[
        int, typer.Option(help="Train this many steps, only to measure time and memory")
    ] = 0,
    fix: Annotated[
        bool, typer.Option("--fix", help="First rewrite old key names in the file")
    ] = False,
    allow_hub_kernels: KernelsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything before a GPU is touched: keys, template, labels of all rows, what is dropped, the plan."""
    from sft_recipes.training.check import check_recipe, check_text

    with _speaking_on_stderr(as_json):
        changes = rewrite(recipe) if fix else []
        for change in changes:
            print(change, flush=True)
        loaded = load_recipe(recipe, parse_overrides(context.args))
        result = check_recipe(
            loaded,
            launch,
            num_processes,
            measure,
            progress=not as_json,
            allow_hub_kernels=allow_hub_kernels,
        )
    return _print_json({**result, "changes": changes}) if as_json else print(check_text(result))


@app.command(context_settings=OVERRIDES)
def inspect(
    context: typer.Context,
    recipe_or_data: DataArgument,
    tokenizer: TokenizerOption = None,
    chat_template: TemplateOption = None,
    max_length: LengthOption = None,
    format: FormatOption = None,
    column_mapping: MappingOption = None,
    rows: Annotated[
        int | None, typer.Option(help="Input rows to show (default: 3; with --json all)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows exactly as the trainer sees them; trained tokens are green. `--key value` sets a key of a recipe."""
    from sft_recipes.data.inspection import inspect_rows, row_json, show_rows
    from sft_recipes.data.labels import DroppedRow
    from sft_recipes.data.loading import RejectLog
    from sft_recipes.data.opening import open_data

    options = data_options(context)
    opened = open_data(recipe_or_data, tokenizer, options)
    if opened.labeller is None:
        fix = "add --tokenizer DIR_OR_ID"
        raise InputError(Problem("command line", "--tokenizer", "is needed to inspect data", fix))
    rejects = RejectLog(opened.settings.data)
    shown = 3 if rows is None and not as_json else rows
    inspected = inspect_rows(opened.labeller, opened.settings.data, rejects, shown)
    renderer = opened.labeller.renderer
    if not as_json:
        show_rows(renderer, list(inspected))
        print(*rejects.lines(), sep="\n")
        return
    for row in inspected:
        if isinstance(row.result, DroppedRow):
            print(
                f"{row.example.where}: dropped, {row.result.reason}: {row.result.detail}",
                file=sys.stderr,
            )
        else:
            _print_json(row_json(renderer, row.example, row.result), indent=None)
    print(*rejects.lines(), sep="\n", file=sys.stderr)


@app.command(context_settings=OVERRIDES)
def audit(
    context: typer.Context,
    recipe_or_data: DataArgument,
    tokenizer: TokenizerOption = None,
    chat_template: TemplateOption = None,
    max_length: LengthOption = None,
    format: FormatOption = None,
    column_mapping: MappingOption = None,
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval_data", help="Data that no row may repeat")
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(help="New folder for kept.jsonl and dropped.jsonl")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Check whose rows --clean drops (default: see report)")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report (default: run folder or ./)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with a data set, row by row, in an HTML report; --clean writes the rows without it."""
    from sft_recipes.audit.audit import REPORT, AuditRequest, run_audit
    from sft_recipes.data.opening import open_data
    from sft_recipes.report.page import macros

    options = data_options(context)
    opened = open_data(recipe_or_data, tokenizer, options)
    recipe, settings = opened.recipe, opened.settings
    evals = {path: DatasetSource(path) for path in eval_data or []}
    if recipe is not None and recipe.evaluation.data is not None:
        evals[recipe.evaluation.data.path] = recipe.evaluation.data
    folder = (
        recipe.output_dir / run_folder.AUDIT
        if recipe is not None
        else Path(f"audit-{recipe_or_data.stem}")
    )
    folder = output or folder
    renderer = None if opened.labeller is None else opened.labeller.renderer
    request = AuditRequest(
        name=str(recipe_or_data),
        data=settings.data,
        labels=settings.labels,
        output=folder,
        renderer=renderer,
        eval_data=evals,
        clean=clean,
        drop=drop or (),
        progress=not as_json,
    )
    content = run_audit(request)
    if as_json:
        _print_json(content)
    else:
        print(macros("audit.txt").verdict(content, folder / REPORT))
    raise typer.Exit(int(any(finding["severity"] == "error" for finding in content["findings"])))


@app.command(context_settings=OVERRIDES)
def prepare(context: typer.Context, recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Tokenize a recipe's data once into its run folder; training and all ranks then load it."""
    from sft_recipes.data.ledger import ledger_lines
    from sft_recipes.data.opening import open_labeller
    from sft_recipes.data.prepare import prepare as prepare_data

    loaded = load_recipe(recipe, parse_overrides(context.args))
    folder = loaded.output_dir / run_folder.PREPARED
    data = prepare_data(loaded, open_labeller(loaded), folder, progress=not as_json)
    if as_json:
        return _print_json(data.summary)
    print("\n".join(ledger_lines(data.summary["sources"])))
    return print(f"\nprepared in {data.folder}\nnext: sft-recipes train {recipe}")


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipeArgument,
    launch: LaunchOption = None,
    num_processes: ProcessesOption = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option("--allow_changed", help="Key that may differ from the run being resumed"),
    ] = None,
    allow_hub_kernels: KernelsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe, or resume it. `--key value` overrides a key of the recipe."""
    allowed = allow_changed or []
    flags = ["--allow_hub_kernels"] if allow_hub_kernels else []
    with _speaking_on_stderr(as_json):  # stdout then holds the state the run ended in
        if launch is not None:
            from sft_recipes.training.launch import launch_training

            code = launch_training(recipe, launch, num_processes, context.args, flags, allowed)
        else:
            from sft_recipes.training.train import main as train_main

            code = train_main(
                [
                    "--config",
                    str(recipe),
                    *context.args,
                    *flags,
                    "--allow_changed",
                    ",".join(allowed),
                ]
            )
    if as_json:
        folder = load_recipe(recipe, parse_overrides(context.args)).output_dir
        _print_json({"output_dir": str(folder), **run_folder.read_state(folder)})
    raise typer.Exit(code)


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    model_or_run: Annotated[str, typer.Argument(help="Run folder, model folder or Hub name")],
    data: Annotated[
        str | None, typer.Option(help="Data to answer (default: the run's own eval rows)")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data folder")] = "test",
    format: FormatOption = None,
    column_mapping: MappingOption = None,
    base: Annotated[
        str | None, typer.Option(help="Model, run or earlier evaluation folder to compare with")
    ] = None,
    chat_template: TemplateOption = None,
    max_rows: Annotated[
        int | None, typer.Option("--max_rows", help="Answer only the first rows")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest answer, in tokens")
    ] = 256,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch_size", help="Prompts per batch (default: 64 on CUDA, else 32)"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics, samples and report")
    ] = None,
    examples: Annotated[int, typer.Option(help="Answers to print side by side")] = 3,
    gate: Annotated[
        str | None, typer.Option(help="File with `gate:`, or `recipe`; sets the exit code")
    ] = None,
    format_overfitting: Annotated[
        bool, typer.Option("--format_overfitting", help="Ask in other formats, too")
    ] = False,
    compare: Annotated[
        list[str] | None, typer.Option(help="Run or evaluation of the same data; repeatable")
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Training rows shown to the base in front of each prompt", min=0)
    ] = 0,
    safety: Annotated[
        bool, typer.Option(help="Ask what should and should not be refused, too")
    ] = False,
    safety_data: Annotated[
        str | None, typer.Option("--safety_data", help="Own such prompts: prompt, label")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate answers, score them, compare with others, write metrics, samples and an HTML report.

    `--key value` sets a recipe's key for the data.
    """
    from sft_recipes.evaluation.standalone import EvaluationRequest, evaluate_standalone

    elsewhere = ("examples", "as_json", "format", "column_mapping")
    asked = {key: value for key, value in context.params.items() if key not in elsewhere}
    options = data_options(context, without="chat_template")
    result = evaluate_standalone(
        EvaluationRequest(data_options=options, **asked), progress=not as_json
    )
    if as_json and result.is_main:
        _print_json(result.as_json())
    elif result.is_main:
        result.print(examples)
    raise typer.Exit(result.extra["gate"]["exit_code"] if gate else 0)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="Run folder, model folder or Hub name")],
    base: Annotated[str | None, typer.Option(help="Model that answers beside it")] = None,
    chat_template: TemplateOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest answer, in tokens")
    ] = 256,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model: a line is a turn, /reset starts again, /quit ends; --json prints one object per answer."""
    from sft_recipes.evaluation.chat import chat as converse

    converse(run, base, chat_template, max_new_tokens, as_json)


@app.command("export")
def export_run(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="New folder (default: RUN/export)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the file (default: as trained, merged float32)")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge, save, lint and compare: one folder with the whole model that a server loads."""
    from sft_recipes.release.export import as_text, export

    with _speaking_on_stderr(as_json):
        found = export(run, output, dtype, force, progress=not as_json)
    return _print_json(found) if as_json else print(as_text(found, run))


@app.command("push")
def push_run(
    run: RunArgument,
    repo: Annotated[str, typer.Option(help="Repository on the Hub, such as me/my-model")],
    adapter_only: Annotated[
        bool, typer.Option("--adapter_only", help="Push the adapter, not a merged model")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository")] = False,
    allow_failed_gate: Annotated[
        bool, typer.Option("--allow_failed_gate", help="Push without a passed gate")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="The adapter's base on the Hub")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a finished run with its model card to the Hub; private unless asked. Run again, it goes on."""
    from sft_recipes.release.hub import push

    with _speaking_on_stderr(as_json):
        pushed = push(
            run, repo, adapter_only, public, allow_failed_gate, base_model, progress=not as_json
        )
    end = f"\npushed: {pushed['url']} (private: {pushed['private']})\nnext: read the card there, as others will"
    return _print_json(pushed) if as_json else print(*pushed["files"], end, sep="\n")


@review.command("build")
def review_build(
    candidate: Annotated[Path, typer.Argument(help="Evaluation folder")],
    baseline: Annotated[Path, typer.Argument(help="Evaluation folder on the same data")],
    output: Annotated[
        Path, typer.Option(help="Page to write; its key is written beside it")
    ] = Path("review.html"),
    rows: Annotated[int, typer.Option(help="Most prompts on the page", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Decides prompts and order")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write one page on which people compare the answers of two evaluations without knowing whose they are."""
    from sft_recipes.evaluation.review import build

    made = build(candidate, baseline, output, rows, seed)
    text = "page: {output}, {items} items; {answered_alike} answered alike were left out\nkey, not for raters: {key}"
    return _print_json(made) if as_json else print(text.format(**made))


@review.command("score")
def review_score(
    key: Annotated[Path, typer.Argument(help="Key that was written beside the page")],
    votes: Annotated[
        list[Path], typer.Argument(help="Votes that the raters downloaded, one file each")
    ],
    as_json: JsonOption = False,
) -> None:
    """Resolve the votes: win rate, agreement, consistency, position and length."""
    from sft_recipes.evaluation.review import score
    from sft_recipes.report.page import macros

    result = score(key, votes)
    return _print_json(result) if as_json else print(macros("review.txt").result(result))


def _speaking_on_stderr(as_json: bool) -> Any:
    """With --json nothing but the result stands on stdout."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _print_json(content: Any, indent: int | None = 2) -> None:
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
