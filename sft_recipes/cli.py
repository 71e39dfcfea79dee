"""The `sft-recipes` command. Bodies are a few lines; torch and transformers are imported in them.

Exit codes: 0 ok, 1 a check or gate failed, 2 wrong input, 3 training fault or a Hub that does not
answer, 4 a gate decided nothing, 70 a fault of this program, 75 preempted, 130 Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from sft_recipes import cli_options as opt
from sft_recipes import crash, run_folder
from sft_recipes.cli_answers import chat, replay
from sft_recipes.cli_benchmark import evaluate_benchmarks
from sft_recipes.cli_doctor import doctor
from sft_recipes.cli_examples import add_examples
from sft_recipes.cli_init import init
from sft_recipes.cli_options import NOT_OF_THE_REQUEST, data_options, held_out_sets
from sft_recipes.cli_output import print_json, print_rows, speaking_on_stderr
from sft_recipes.cli_review import review
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe_rewrite import rewrite

app = typer.Typer(
    name="sft-recipes",
    help="Supervised fine-tuning on TRL in which every step is checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(review, name="review")
PIPE_CLOSED = 141  # what a shell says of a program that SIGPIPE ended
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def options(debug: opt.DebugOption = False, version: opt.VersionOption = False) -> None:
    """Supervised fine-tuning on TRL in which every step is checked."""
    # Read before the command line is, in `run`, so that it may stand behind a command, too.


app.command()(init)


@app.command(context_settings=OVERRIDES)
def check(
    context: typer.Context,
    recipe: opt.RecipeArgument,
    launch: opt.LaunchOption = None,
    num_processes: opt.ProcessesOption = None,
    measure: opt.MeasureOption = 0,
    fix: opt.FixOption = False,
    allow_hub_kernels: opt.KernelsOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Check keys, template, all labels, drops and the plan; `--key value` overrides a recipe's key."""
    with speaking_on_stderr(as_json):
        changes = rewrite(recipe) if fix else []
        for change in changes:
            print(change, flush=True)
        loaded = opt.opened_recipe(recipe, context)
        from sft_recipes.release.hub import check_push
        from sft_recipes.training.check import check_recipe, check_text
        from sft_recipes.upstream.quiet import quiet_libraries

        quiet_libraries()
        result = check_recipe(
            loaded,
            launch,
            num_processes,
            measure,
            progress=not as_json,
            allow_hub_kernels=allow_hub_kernels,
        )
    if not as_json:
        print(check_text(result))
    # Last: who looks at another's recipe has no token for its repository, and sees all the rest.
    check_push(loaded)
    if as_json:
        print_json({**result, "changes": changes})


@app.command(context_settings=OVERRIDES)
def inspect(
    context: typer.Context,
    recipe_or_data: opt.DataArgument,
    tokenizer: opt.TokenizerOption = None,
    chat_template: opt.TemplateOption = None,
    max_length: opt.LengthOption = None,
    format: opt.FormatOption = None,
    column_mapping: opt.MappingOption = None,
    rows: opt.RowsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Show rows exactly as the trainer sees them; trained tokens are green.

    `--key value` sets a key of a recipe.
    """
    from sft_recipes.data.opening import open_data

    opened = open_data(recipe_or_data, tokenizer, data_options(context))
    from sft_recipes.data.inspection import inspect_rows, show_rows
    from sft_recipes.data.loading import RejectLog

    if opened.labeller is None:
        fix = "add --tokenizer DIR_OR_ID"
        raise InputError(Problem("command line", "--tokenizer", "is needed to inspect data", fix))
    rejects = RejectLog(opened.settings.data)
    if rows is None and not as_json:
        rows = 3
    inspected = inspect_rows(opened.labeller, opened.settings.data, rejects, rows)
    if as_json:
        print_rows(opened.labeller.renderer, inspected, rejects)
        print(*rejects.lines(), sep="\n", file=sys.stderr)
    else:
        show_rows(opened.labeller.renderer, list(inspected), rejects)
        print(*rejects.lines(), sep="\n")


@app.command(context_settings=OVERRIDES)
def audit(
    context: typer.Context,
    recipe_or_data: opt.DataArgument,
    tokenizer: opt.TokenizerOption = None,
    chat_template: opt.TemplateOption = None,
    max_length: opt.LengthOption = None,
    format: opt.FormatOption = None,
    column_mapping: opt.MappingOption = None,
    eval_data: opt.HeldOutOption = None,
    clean: opt.CleanOption = None,
    drop: opt.DropOption = None,
    output: opt.AuditFolderOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say what is wrong with a data set, row by row; --clean writes the rows without it."""
    from sft_recipes.data.opening import open_data

    opened = open_data(recipe_or_data, tokenizer, data_options(context))
    from sft_recipes.audit.audit import REPORT, AuditRequest, run_audit
    from sft_recipes.report.audit_report import verdict

    folder = Path(f"audit-{recipe_or_data.stem}")
    if opened.recipe is not None:
        folder = opened.recipe.output_dir / run_folder.AUDIT
    request = AuditRequest(
        name=str(recipe_or_data),
        data=opened.settings.data,
        labels=opened.settings.labels,
        output=output or folder,
        renderer=opened.labeller.renderer if opened.labeller else None,
        eval_data=held_out_sets(opened.recipe, eval_data or ()),
        clean=clean,
        drop=drop or (),
        progress=not as_json,
    )
    content = run_audit(request)
    if as_json:
        print_json(content)
    else:
        print(verdict(content, request.output / REPORT))
    has_errors = any(finding["severity"] == "error" for finding in content["findings"])
    raise typer.Exit(int(has_errors))


@app.command(context_settings=OVERRIDES)
def prepare(
    context: typer.Context,
    recipe: opt.RecipeArgument,
    reuse: opt.ReuseOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Tokenize a recipe's data once into its run folder; `--key value` overrides a recipe's key."""
    loaded = opt.opened_recipe(recipe, context)
    from sft_recipes.data.ledger import ledger_lines
    from sft_recipes.data.opening import open_labeller
    from sft_recipes.data.prepare import prepare as prepare_data
    from sft_recipes.data.reuse import reuse_prepared
    from sft_recipes.training.run_lock import run_lock

    folder = loaded.output_dir / run_folder.PREPARED
    labeller = open_labeller(loaded)
    with run_lock(loaded.output_dir):
        if reuse is not None:
            reuse_prepared(loaded, labeller.renderer, reuse, folder)
        data = prepare_data(loaded, labeller, folder, progress=not as_json)
    if as_json:
        print_json(data.summary)
    else:
        print(*ledger_lines(data.summary), sep="\n")
        print(f"\nprepared in {data.folder}\nnext: sft-recipes train {recipe}")


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: opt.RecipeArgument,
    launch: opt.LaunchOption = None,
    num_processes: opt.ProcessesOption = None,
    allow_changed: opt.ChangedOption = None,
    allow_hub_kernels: opt.KernelsOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Train a recipe, or resume it; `--key value` overrides a recipe's key."""
    loaded = opt.opened_recipe(recipe, context)
    changed = []
    for names in allow_changed or ():
        changed += names.split(",")
    with speaking_on_stderr(as_json):  # stdout then holds the state the run ended in
        if launch is None:
            from sft_recipes.training.train import run

            code = run(loaded, changed, allow_hub_kernels)
        else:
            from sft_recipes.training.launch import launch_training

            flags = []
            if allow_hub_kernels:
                flags.append("--allow_hub_kernels")
            code = launch_training(recipe, launch, num_processes, context.args, flags, changed)
    if as_json:
        state = run_folder.read_state(loaded.output_dir)
        print_json({"output_dir": str(loaded.output_dir), **state})
    raise typer.Exit(code)


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    model_or_run: opt.ModelArgument,
    data: opt.EvaluatedDataOption = None,
    split: opt.SplitOption = "test",
    format: opt.FormatOption = None,
    column_mapping: opt.MappingOption = None,
    base: opt.BaseOption = None,
    chat_template: opt.TemplateOption = None,
    max_rows: opt.MaxRowsOption = None,
    max_new_tokens: opt.NewTokensOption = 256,
    batch_size: opt.BatchOption = None,
    dtype: opt.AnsweringOption = None,
    output: opt.EvaluationFolderOption = None,
    examples: opt.ExamplesOption = 3,
    gate: opt.GateOption = None,
    allow_trained_rows: opt.TrainedRowsOption = False,
    format_overfitting: opt.OtherFormatsOption = False,
    compare: opt.CompareOption = None,
    shots: opt.ShotsOption = "0",
    safety: opt.SafetyOption = False,
    safety_data: opt.SafetyDataOption = None,
    retention: opt.RetentionOption = False,
    retention_data: opt.RetentionDataOption = None,
    suspects: opt.SuspectsOption = False,
    benchmark: opt.BenchmarkOption = None,
    benchmark_data: opt.BenchmarkDataOption = None,
    everything: opt.EverythingOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Generate answers, score them, compare with others, write metrics, samples and an HTML report.

    `--key value` sets a recipe's key for the data.
    """
    if benchmark or benchmark_data:
        evaluate_benchmarks(context)
        return
    from sft_recipes.evaluation.evaluate_command import run_evaluation
    from sft_recipes.evaluation.evaluation_request import EvaluationRequest
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    asked = {key: context.params[key] for key in context.params if key not in NOT_OF_THE_REQUEST}
    request = EvaluationRequest(data_options=data_options(context, "chat_template"), **asked)
    result = run_evaluation(request, progress=not as_json)
    if as_json and result.is_main:
        print_json(result.as_json())
    elif result.is_main:
        result.print(examples, everything)
    raise typer.Exit(result.extra["gate"]["exit_code"] if gate else 0)


app.command()(chat)
app.command(context_settings=OVERRIDES)(replay)
app.command()(doctor)


@app.command("export")
def export_run(
    run: opt.RunArgument,
    output: opt.ExportFolderOption = None,
    dtype: opt.PrecisionOption = None,
    force: opt.ReplaceOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Merge, save, lint and compare: one folder with the whole model that a server loads."""
    from sft_recipes.release.export import export
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    with speaking_on_stderr(as_json):
        exported = export(run, output, dtype, force, progress=not as_json)
    if as_json:
        print_json(exported.as_json())
    else:
        print(exported.as_text(run))


@app.command("push")
def push_run(
    run: opt.RunArgument,
    repo: opt.RepositoryOption,
    adapter_only: opt.AdapterOnlyOption = False,
    public: opt.PublicOption = False,
    allow_failed_gate: opt.FailedGateOption = False,
    base_model: opt.HubBaseOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Upload a finished run with its model card to the Hub; private unless asked.

    Run again, it goes on.
    """
    from sft_recipes.release.hub import push
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    with speaking_on_stderr(as_json):
        pushed = push(
            run, repo, adapter_only, public, allow_failed_gate, base_model, progress=not as_json
        )
    if as_json:
        print_json(pushed.as_json())
    else:
        print(pushed.as_text())


add_examples(app)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Every error becomes its message and its code."""
    if "--debug" in arguments:
        os.environ[crash.DEBUG] = "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as ending:
        if isinstance(ending.__context__, BrokenPipeError):  # nobody reads on, as behind `| head`
            return PIPE_CLOSED
        if isinstance(ending.__context__, typer.Abort):
            return crash.INTERRUPTED
        return ending.code if isinstance(ending.code, int) else 0
    except Exception as error:  # noqa: BLE001 - the last place where an error can be told as a line
        return crash.tell(error)
    return 0


def main() -> None:
    """Run the command line of this process, and end the process."""
    sys.exit(run(sys.argv[1:]))
