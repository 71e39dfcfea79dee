"""Opens what is evaluated: how a run renders its conversations, and a base of the same ids."""

from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import models, run_folder
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import check_folder, load_tokenizer
from sft_recipes.errors import InputError, Problem
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.recipe import LabelSettings, Recipe, TemplateSettings
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.text_files import RESTORE, read_json


class OpenedRun(NamedTuple):
    """The recipe of a run folder, None for any other model, and how conversations are rendered."""

    recipe: Recipe | None
    labeller: Labeller


def open_run(name: str, tokenizer: Any, chat_template: str | None) -> OpenedRun:
    """Open a run folder, or any other model of that name, with the tokenizer that came with it.

    A finished run carries its template in its tokenizer; only the arguments it was rendered with
    are in the recipe.
    """
    if not run_folder.is_run_folder(Path(name)):
        renderer = attach_chat_template(tokenizer, TemplateSettings(chat_template))
        return OpenedRun(None, Labeller(renderer, LabelSettings()))
    recipe = load_recipe(Path(name) / run_folder.RECIPE)
    arguments = recipe.template.chat_template_kwargs
    renderer = attach_chat_template(tokenizer, TemplateSettings(chat_template, arguments))
    return OpenedRun(recipe, Labeller(renderer, recipe.labels))


def base_model(base: str, tokenizer: Any, dtype: str | None = None) -> Any:
    """A base to be asked in the ids of `tokenizer`, in the precision `dtype`.

    Raises InputError if it has no embedding for some of them.
    """
    model = models.load_for_inference(base, dtype, "--base").model
    models.check_vocabulary(model, tokenizer, base, "--base")
    return model


def model_before(name: str, recipe: Recipe | None, asked_by: str) -> str:
    """The model that a run was tuned from: its recipe's, or that of an adapter.

    Raises InputError, which names the option `asked_by`, where that is not known, or not here any
    more.
    """
    fix = "name the model before tuning: add --base MODEL"
    adapter = Path(name) / ADAPTER_CONFIG
    before = None
    if recipe is not None:
        before = recipe.model_name
    elif adapter.is_file():
        before = read_json(adapter, RESTORE).get("base_model_name_or_path")
    if not isinstance(before, str):
        what = "the model before tuning is not known"
        raise InputError(Problem(name, asked_by, what, fix))
    check_folder(before, fix)
    return before


def native_template(base: str, tokenizer: Any) -> str | None:
    """The base's own chat template, if it has one.

    The base is asked with the tuned model's ids. Raises InputError if they mean something else to
    it.
    """
    own = load_tokenizer(base)
    different = {*tokenizer.get_vocab().items()} ^ {*own.get_vocab().items()}
    if different:
        what = (
            "its tokenizer has another vocabulary than the tuned model's "
            f"({len(different)} entries differ)"
        )
        fix = "evaluate it by itself on the same data, then give that evaluation's folder as --base"
        raise InputError(Problem(base, "--base", what, fix))
    return own.chat_template if isinstance(own.chat_template, str) else None
