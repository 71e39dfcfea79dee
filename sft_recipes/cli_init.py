"""`init`: a shipped recipe, one for your own model and data, or one from the config of another tool."""

from pathlib import Path

import typer

from sft_recipes import cli_options as opt
from sft_recipes.cli_options import data_options
from sft_recipes.cli_output import (
    list_shipped,
    say_foreign,
    say_new_recipe,
    say_written,
)
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe_copies import copy_recipe


def init(
    context: typer.Context,
    recipe: opt.ShippedArgument = None,
    model: opt.OwnModelOption = None,
    data: opt.OwnDataOption = None,
    from_config: opt.ForeignOption = None,
    tool: opt.ToolOption = None,
    format: opt.FormatOption = None,
    columns: opt.ColumnsOption = None,
    column_mapping: opt.MappingOption = None,
    message_mapping: opt.MessagesOption = None,
    role_mapping: opt.RolesOption = None,
    consecutive_turns: opt.TurnsOption = None,
    chat_template: opt.TemplateOption = None,
    replay: opt.OwnReplayOption = None,
    full: opt.FullOption = False,
    trust_remote_code_is_not_needed: opt.NativeModelOption = False,
    output: opt.RecipeFolderOption = None,
    force: opt.OverwriteOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """List the shipped recipes, copy one, or write one: for your model and data, or from another tool's config."""
    if from_config:
        from sft_recipes.foreign.new_recipe import ForeignRequest, write_foreign

        asked = ForeignRequest(
            config=from_config,
            output=output or Path(from_config.stem),
            tool=tool,
            model=model,
            data=data,
            chat_template=chat_template,
            remote_code_is_not_needed=trust_remote_code_is_not_needed,
            force=force,
        )
        written = write_foreign(asked)
        say_foreign(written, as_json)
        if not written.files:
            raise typer.Exit(2)
    elif model and data and not recipe:
        from sft_recipes.training.new_recipe import RecipeRequest
        from sft_recipes.training.recipe_questions import write_asking

        folder = output or Path(Path(data).stem)
        request = RecipeRequest(
            model, data, data_options(context), folder, force, replay, full or None
        )
        say_new_recipe(write_asking(request, progress=not as_json), as_json)
    elif model or data or replay or full:
        what = "--model and --data go together"
        if recipe:
            what = "a shipped recipe is copied as it is"
        fix = "give --model M --data D and no RECIPE"
        raise InputError(Problem("command line", "init", what, fix))
    elif recipe:
        folder = output or Path(recipe.split("/")[0])
        say_written(copy_recipe(recipe, folder, force), as_json)
    else:
        list_shipped(as_json)
