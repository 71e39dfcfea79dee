"""What `init` asks a person, where a look at model and data leaves something open.

Only on a terminal; elsewhere the same is an error that says what to write, or a default with a note.
Every question has a default, and an option of `init` answers it beforehand.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.prompt import Prompt
from rich.text import Text

from sft_recipes.data.chat_templates import ChatRenderer, shipped_template_names
from sft_recipes.data.loading import open_rows
from sft_recipes.data.opening import open_renderer
from sft_recipes.data.reading.column_advice import likely_columns
from sft_recipes.errors import InputError
from sft_recipes.recipe import TemplateSettings
from sft_recipes.recipe_keys import make_data_recipe
from sft_recipes.training.new_recipe import (
    NewRecipe,
    RecipeRequest,
    is_small,
    parameter_count,
    reasons_for_full,
    write_recipe,
)

_NO_COLUMN = "none"
_SHOWN_CHARACTERS = 60


def can_ask() -> bool:
    """Whether a person sits at both ends of this program."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def write_asking(request: RecipeRequest, progress: bool = True) -> NewRecipe:
    """Write the recipe; on a terminal, and with `progress`, ask what is open first."""
    if not progress or not can_ask():
        return write_recipe(request, progress)
    console = Console(highlight=False)
    request = _with_template(console, request)
    request = _with_method(console, request)
    try:
        return write_recipe(request, progress)
    except InputError as error:
        fields = {problem.field for problem in error.problems}
        if not fields & {"format", "column_mapping"} or request.options.keys() & fields:
            raise
        columns = _first_row(request)
        if len(columns) < 2:
            raise
    return write_recipe(_with_columns(console, request, columns), progress)


def _with_template(console: Console, request: RecipeRequest) -> RecipeRequest:
    """Asked of a tokenizer that brings no template: how are its rows to be written?"""
    if "chat_template" in request.options:
        return request
    renderer: ChatRenderer = open_renderer(request.model, TemplateSettings())
    if renderer.has_own_template:
        return request
    names = [name for name in shipped_template_names() if name != "tokenizer"]
    console.print(
        "The tokenizer has no chat template. `instruction` is plain text and needs no new token; "
        "others have tokens that the base may not know."
    )
    chosen = _choice(console, "Chat template", names, "instruction")
    return replace(request, options={**request.options, "chat_template": chosen})


def _with_method(console: Console, request: RecipeRequest) -> RecipeRequest:
    """Asked of a small model: LoRA, or all weights?"""
    parameters = parameter_count(request.model)
    if request.full is not None or not is_small(parameters):
        return request
    console.print(Text(reasons_for_full(parameters)))
    chosen = _choice(console, "Train with", ["lora", "full"], "lora")
    return replace(request, full=chosen == "full")


def _with_columns(
    console: Console, request: RecipeRequest, columns: Mapping[str, Any]
) -> RecipeRequest:
    """Asked where columns could be several things, or none: which is the question, which the answer?"""
    console.print(Text(f"Which column of {request.data} is which? Its first row:"))
    for name, value in columns.items():
        text = " ".join(str(value).split())[:_SHOWN_CHARACTERS]
        console.print(Text(f"  {name}: {text}"))
    names = list(columns)
    likely = likely_columns(columns)
    question = _choice(console, "Question or instruction", names, likely.get("instruction"))
    names.remove(question)
    mapping = {"instruction": question}
    mapping["output"] = _choice(console, "Answer to be learned", names, likely.get("output"))
    names.remove(mapping["output"])
    if names:
        what = "Text that the question is about"
        context = _choice(console, what, [_NO_COLUMN, *names], likely.get("input"))
        if context != _NO_COLUMN:
            mapping["input"] = context
    options = {**request.options, "format": "instruction", "column_mapping": mapping}
    return replace(request, options=options)


def _choice(console: Console, what: str, choices: Sequence[str], default: str | None) -> str:
    """One of the choices; without a default that is among them the first, and nobody is asked for the only one."""
    preset = choices[0]
    if len(choices) == 1:
        console.print(Text(f"{what}: {preset}"))
        return preset
    if default is not None and default in choices:
        preset = default
    return Prompt.ask(Text(what), console=console, choices=list(choices), default=preset)


def _first_row(request: RecipeRequest) -> Mapping[str, Any]:
    """The first row of the data that can be read; empty if there is none."""
    source = make_data_recipe(request.data, request.options).data.datasets[0]
    for _, rows in open_rows(source, source.split):
        for row in rows:
            if isinstance(row.content, dict):
                return row.content
    return {}
