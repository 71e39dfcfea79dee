"""Arguments and options that several commands share, and recipe keys from the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sft_recipes.recipe import parse_overrides, parse_value

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML)")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]
LaunchOption = Annotated[
    str | None, typer.Option(help="Accelerate config to launch with, such as ddp")
]
KernelsOption = Annotated[
    bool,
    typer.Option("--allow_hub_kernels", help="Let attn_implementation download native code"),
]
ProcessesOption = Annotated[int | None, typer.Option("--num_processes", help="Processes to launch")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Data format; detected if not given")
]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run")]
DataArgument = Annotated[Path, typer.Argument(help="Recipe file, or a data file or folder")]
TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer folder or Hub name, for data")]
LengthOption = Annotated[int | None, typer.Option("--max_length", help="Longest row, in tokens")]
ColumnsOption = Annotated[str | None, typer.Option(help="Columns to read, as in '[messages]'")]
_MAPPING = "Your columns, as in '{instruction: Question, output: Answer}'"
MappingOption = Annotated[str | None, typer.Option("--column_mapping", help=_MAPPING)]
_MESSAGES = "Your keys inside turns, as in '{role: from, content: value}'"
MessagesOption = Annotated[str | None, typer.Option("--message_mapping", help=_MESSAGES)]
_ROLES = "Your names of roles, as in '{user: Customer, assistant: Clerk}'"
RolesOption = Annotated[str | None, typer.Option("--role_mapping", help=_ROLES)]
TurnsOption = Annotated[
    str | None, typer.Option("--consecutive_turns", help="error (default) or merge")
]
TemplateOption = Annotated[
    str | None, typer.Option("--chat_template", help="Shipped name or .jinja file")
]


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
    """Recipe keys for data that a command was given, as options or as `--key value`; lists and mappings are YAML."""
    stated: dict[str, Any] = {}
    for key in _DATA_OPTIONS:
        value = context.params.get(key)
        if value is not None and key != without:
            is_yaml = isinstance(value, str) and value.startswith(("{", "["))
            stated[key] = parse_value(value) if is_yaml else value
    return {**parse_overrides(context.args), **stated}
