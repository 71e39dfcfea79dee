"""Arguments and options of the commands, and recipe keys from the command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sft_recipes import __version__, run_folder
from sft_recipes.recipe import (
    DatasetSource,
    Recipe,
    launch_names,
    parse_overrides,
    parse_value,
)
from sft_recipes.recipe_keys import load_recipe

Precision = Literal["float32", "bfloat16", "float16"]

# What several commands share.
RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML)")]


def _run(path: Path) -> Path:
    run_folder.require_there(str(path), may_be_on_hub=False)
    return path


def _model(name: str | None) -> str | None:
    if name is not None:
        run_folder.require_there(name)
    return name


def _models(names: list[str] | None) -> list[str] | None:
    for name in names or ():
        run_folder.require_there(name)
    return names


RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run", callback=_run)]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sft-recipes {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", help="Print the version", callback=_print_version, is_eager=True),
]
DebugOption = Annotated[bool, typer.Option(help="Show the traceback of an error")]
ModelArgument = Annotated[
    str, typer.Argument(help="Run folder, model folder or Hub name", callback=_model)
]
DataArgument = Annotated[Path, typer.Argument(help="Recipe file, or a data file or folder")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]
LaunchOption = Annotated[
    str | None,
    typer.Option(help=f"How to launch: {', '.join(launch_names())}; or an accelerate config file"),
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(help="A run whose prepared rows are taken: nothing is tokenized again"),
]
ProcessesOption = Annotated[int | None, typer.Option("--num_processes", help="Processes to launch")]
KernelsOption = Annotated[
    bool,
    typer.Option("--allow_hub_kernels", help="Let attn_implementation download native code"),
]
NewTokensOption = Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens")]

# How data without a recipe is read.
TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer folder or Hub name, for data")]
TemplateOption = Annotated[
    str | None, typer.Option("--chat_template", help="Shipped name or .jinja file")
]
LengthOption = Annotated[int | None, typer.Option("--max_length", help="Longest row, in tokens")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Data format; detected if not given")
]
ColumnsOption = Annotated[str | None, typer.Option(help="Columns to read, as in '\\[messages]'")]
MappingOption = Annotated[
    str | None,
    typer.Option(
        "--column_mapping", help="Your columns, as in '{instruction: Question, output: Answer}'"
    ),
]
MessagesOption = Annotated[
    str | None,
    typer.Option(
        "--message_mapping", help="Your keys inside turns, as in '{role: from, content: value}'"
    ),
]
RolesOption = Annotated[
    str | None,
    typer.Option(
        "--role_mapping", help="Your names of roles, as in '{user: Customer, assistant: Clerk}'"
    ),
]
TurnsOption = Annotated[
    str | None, typer.Option("--consecutive_turns", help="error (default) or merge")
]

# init
ShippedArgument = Annotated[
    str | None, typer.Argument(help="Shipped recipe, such as quickstart/full")
]
OwnModelOption = Annotated[
    str | None, typer.Option(help="Your model: writes a recipe for it; needs --data")
]
OwnDataOption = Annotated[str | None, typer.Option(help="Your data: file, folder or Hub name")]
ForeignOption = Annotated[
    Path | None,
    typer.Option("--from", help="Config of axolotl, LLaMA-Factory, torchtune or TRL to start from"),
]
ToolOption = Annotated[
    str | None, typer.Option(help="Whose config --from is, where its keys do not say it")
]
NativeModelOption = Annotated[
    bool,
    typer.Option(
        "--trust_remote_code_is_not_needed",
        help="With --from: transformers has a class for the model, none of its own code is run",
    ),
]
RecipeFolderOption = Annotated[
    Path | None, typer.Option(help="Folder to write to (default: named after the recipe)")
]
OverwriteOption = Annotated[bool, typer.Option(help="Overwrite files that exist")]

OwnReplayOption = Annotated[
    str | None,
    typer.Option("--replay", help="Rows of `replay` (or other general ones) to mix in"),
]

FullOption = Annotated[
    bool, typer.Option("--full", help="Train all weights of your model instead of LoRA")
]

# replay
PromptsOption = Annotated[
    str, typer.Option(help="Data with prompts: file, folder or Hub name; answers are ignored")
]
DrawnOption = Annotated[int, typer.Option("--rows", help="Prompts to draw", min=1)]
ReplayFileOption = Annotated[Path, typer.Option(help="File to write, JSON Lines of messages")]

# check
MeasureOption = Annotated[
    int, typer.Option(help="Train this many steps, only to measure time and memory")
]
FixOption = Annotated[
    bool, typer.Option("--fix", help="First bring old and dead keys of the file up to date")
]

# inspect
RowsOption = Annotated[
    int | None, typer.Option(help="Input rows to show (default: 3; with --json all)")
]

# audit
HeldOutOption = Annotated[
    list[str] | None, typer.Option("--eval_data", help="Data that no row may repeat")
]
CleanOption = Annotated[
    Path | None, typer.Option(help="New folder for kept.jsonl and dropped.jsonl")
]
DropOption = Annotated[
    list[str] | None, typer.Option(help="Check whose rows --clean drops (default: see report)")
]
AuditFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of the report (default: run folder or ./)")
]

# train
ChangedOption = Annotated[
    list[str] | None,
    typer.Option("--allow_changed", help="Key that may differ from the run being resumed"),
]

# evaluate
EvaluatedDataOption = Annotated[
    str | None, typer.Option(help="Data to answer (default: the run's own eval rows)")
]
SplitOption = Annotated[str, typer.Option(help="Split of the data folder")]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Model, run or earlier evaluation folder to compare with", callback=_model),
]
MaxRowsOption = Annotated[int | None, typer.Option("--max_rows", help="Answer only the first rows")]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch_size", help="Prompts per batch (default: 64 on CUDA, else 32)"),
]
AnsweringOption = Annotated[
    Precision | None,
    typer.Option(help="Precision of the weights (default: bfloat16 where that is faster)"),
]
EvaluationFolderOption = Annotated[
    Path | None, typer.Option(help="Folder for metrics, samples and report")
]
ExamplesOption = Annotated[int, typer.Option(help="Answers to print side by side")]
EverythingOption = Annotated[bool, typer.Option("--all", help="Print every figure, not five")]
GateOption = Annotated[
    str | None, typer.Option(help="File with `gate:`, or `recipe`; sets the exit code")
]
TrainedRowsOption = Annotated[
    bool, typer.Option("--allow_trained_rows", help="Let the gate judge rows that were trained on")
]
OtherFormatsOption = Annotated[
    bool, typer.Option("--format_overfitting", help="Ask in other formats, too")
]
CompareOption = Annotated[
    list[str] | None,
    typer.Option(help="Run or evaluation of the same data; repeatable", callback=_models),
]
ShotsOption = Annotated[
    str,
    typer.Option(
        help="Training rows shown to the base in front of each prompt; auto: 0, 2, 4 or 8, chosen "
        "on training rows"
    ),
]
SafetyOption = Annotated[bool, typer.Option(help="Ask what should and should not be refused, too")]
SafetyDataOption = Annotated[
    str | None, typer.Option("--safety_data", help="Own such prompts: prompt, label")
]
RetentionOption = Annotated[
    bool,
    typer.Option(help="Ask general prompts, too, before and after tuning: what was forgotten?"),
]
RetentionDataOption = Annotated[
    str | None,
    typer.Option("--retention_data", help="Own such prompts: prompt, task_type, expected_format"),
]
SuspectsOption = Annotated[
    bool, typer.Option(help="List the training rows that the model finds hardest: wrong answers?")
]
BenchmarkOption = Annotated[
    str | None, typer.Option(help="Public benchmarks through lm-eval alone, as in ifeval,gsm8k")
]
BenchmarkDataOption = Annotated[
    Path | None, typer.Option("--benchmark_data", help="Folder with their rows: TASK/SPLIT.jsonl")
]

# chat
BesideOption = Annotated[
    str | None, typer.Option(help="Model that answers beside it", callback=_model)
]

# doctor
AnyRunArgument = Annotated[
    Path, typer.Argument(help="Run folder or checkpoint, of any tool", callback=_run)
]
BaseFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of the model before training (default: as the run says)")
]
MergedOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the merged model (default: merged/ or export/ in the run)"),
]

# export
ExportFolderOption = Annotated[Path | None, typer.Option(help="New folder (default: RUN/export)")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Precision of the file (default: as trained, merged float32)")
]
ReplaceOption = Annotated[bool, typer.Option(help="Replace an earlier export")]

# push
RepositoryOption = Annotated[str, typer.Option(help="Repository on the Hub, such as me/my-model")]
AdapterOnlyOption = Annotated[
    bool, typer.Option("--adapter_only", help="Push the adapter, not a merged model")
]
PublicOption = Annotated[bool, typer.Option("--public", help="Create a public repository")]
FailedGateOption = Annotated[
    bool, typer.Option("--allow_failed_gate", help="Push without a passed gate")
]
HubBaseOption = Annotated[
    str | None, typer.Option("--base_model", help="The adapter's base on the Hub")
]

# review
CandidateArgument = Annotated[Path, typer.Argument(help="Evaluation folder")]
BaselineArgument = Annotated[Path, typer.Argument(help="Evaluation folder on the same data")]
PageOption = Annotated[Path, typer.Option(help="Page to write; its key is written beside it")]
ItemsOption = Annotated[int, typer.Option(help="Most prompts on the page", min=1)]
SeedOption = Annotated[int, typer.Option(help="Decides prompts and order")]
KeyArgument = Annotated[Path, typer.Argument(help="Key that was written beside the page")]
VotesArgument = Annotated[
    list[Path], typer.Argument(help="Votes that the raters downloaded, one file each")
]

# Options of `evaluate` that say how rows are read or printed, or ask something else.
NOT_OF_THE_REQUEST = (
    "examples",
    "everything",
    "as_json",
    "format",
    "column_mapping",
    "benchmark",
    "benchmark_data",
)
_DATA_OPTIONS = (
    "format",
    "columns",
    "column_mapping",
    "message_mapping",
    "role_mapping",
    "consecutive_turns",
    "chat_template",
    "max_length",
)


def data_options(context: typer.Context, without: str = "") -> dict[str, Any]:
    """Recipe keys for data that a command was given, as options or as `--key value`.

    Lists and mappings among the options are YAML.
    """
    options = parse_overrides(context.args)
    for key in _DATA_OPTIONS:
        value = context.params.get(key)
        if value is not None and key != without:
            if isinstance(value, str) and value.startswith(("{", "[")):
                value = parse_value(value)
            options[key] = value
    return options


def opened_recipe(path: Path, context: typer.Context) -> Recipe:
    """The recipe with the overrides of the command line.

    Raises InputError for wrong keys, and for columns in which no row is found. To be called before
    anything heavy is imported, so that it does so at once.
    """
    from sft_recipes.data.first_rows import check_recipe_rows

    overrides = parse_overrides(context.args)
    check_recipe_rows(path, overrides)
    return load_recipe(path, overrides)


def held_out_sets(recipe: Recipe | None, paths: Iterable[str]) -> dict[str, DatasetSource]:
    """The data sets that no training row may repeat: those named, and the recipe's own."""
    sets = {path: DatasetSource(path) for path in paths}
    if recipe is not None and recipe.evaluation.data is not None:
        sets[recipe.evaluation.data.path] = recipe.evaluation.data
    return sets
