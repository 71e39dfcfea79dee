"""From a model's name to tokenizer, chat template and labeller, opened in one place."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.crash import is_network_down
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.first_rows import check_first_rows, check_recipe_rows
from sft_recipes.data.labels import Labeller
from sft_recipes.errors import HubUnavailable, InputError, Problem, SFTRecipesError
from sft_recipes.model_folder import ADAPTER_CONFIG, holds_tokenizer
from sft_recipes.plain_values import is_file, shown
from sft_recipes.recipe import Recipe, TemplateSettings
from sft_recipes.recipe_keys import DataRecipe, load_recipe, make_data_recipe
from sft_recipes.text_files import RESTORE, read_json


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a local folder or Hub name. Raises InputError if there is none to be had."""
    # Takes seconds, and some commands end before it is needed.
    from transformers import AutoTokenizer

    check_folder(name)
    revision = revision or "main"
    source = _tokenizer_of(name)
    with loading(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def _tokenizer_of(name: str) -> str:
    """Where the tokenizer of a model is: an adapter that was saved without one has its base's."""
    config = Path(name) / ADAPTER_CONFIG
    if not _is_folder(name) or not is_file(config) or holds_tokenizer(Path(name)):
        return name
    base = read_json(config, RESTORE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return name
    check_folder(base, f"put it there, or write where it is into {config}")
    print(f"no tokenizer was saved in {name}: that of its base is used, {base}", file=sys.stderr)
    return base


def open_renderer(
    name: str, template: TemplateSettings, revision: str | None = None
) -> ChatRenderer:
    """The renderer of a model's tokenizer with a chat template.

    Raises InputError or CheckFailed, see there.
    """
    return attach_chat_template(load_tokenizer(name, revision), template)


def open_labeller(recipe: Recipe, tokenizer: str | None = None) -> Labeller:
    """The labeller of a recipe; `tokenizer` names another tokenizer than the model's.

    Raises InputError for a tokenizer that cannot be used, CheckFailed for a template that would
    train the wrong thing.
    """
    revision = None
    if tokenizer is None:
        tokenizer = recipe.model_name
        check_base_folder(recipe)
        revision = recipe.model.get("model_revision")
    return Labeller(open_renderer(tokenizer, recipe.template, revision), recipe.labels)


@dataclass(frozen=True)
class OpenedData:
    """Settings of a recipe, or of data without one, where `recipe` is None.

    `labeller` is there where a tokenizer is known.
    """

    settings: Recipe | DataRecipe
    recipe: Recipe | None
    labeller: Labeller | None


def open_data(path: Path, tokenizer: str | None, options: Mapping[str, Any]) -> OpenedData:
    """What `inspect` and `audit` work on: a recipe file, or data with the tokenizer of a model.

    `options` are recipe keys that override the recipe's. Raises as `open_labeller` does.
    """
    if path.suffix in (".yaml", ".yml"):
        check_recipe_rows(path, options)
        recipe = load_recipe(path, options)
        return OpenedData(recipe, recipe, open_labeller(recipe, tokenizer))
    settings = make_data_recipe(str(path), options)
    check_first_rows(settings.data.datasets[0], settings.data)
    labeller = None
    if tokenizer is not None:
        labeller = Labeller(open_renderer(tokenizer, settings.template), settings.labels)
    return OpenedData(settings, None, labeller)


def check_base_folder(recipe: Recipe) -> None:
    """Raise InputError for a recipe's model that looks like a folder and is none, or an adapter's."""
    name = recipe.model_name
    check_folder(name, "check the path, or give it with --model_name_or_path FOLDER")
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file() or adapter.with_name("config.json").is_file():
        return
    base = read_json(adapter, RESTORE).get("base_model_name_or_path")
    fix = f"write model_name_or_path: {base}, adapter_name_or_path: {name} and use_peft: true"
    key = "model_name_or_path"
    what = f"{shown(name)} holds an adapter, not a model"
    raise InputError(Problem(recipe.place(key), key, what, fix))


def check_folder(name: str, fix: str = "check the path") -> None:
    """Raise InputError, with this fix, for a name that looks like a folder and is none."""
    if run_folder.looks_local(name) and not _is_folder(name):
        if name.startswith("."):
            fix += "; in a recipe ./ and ../ are relative to its file"
        raise InputError(Problem(shown(name), "model_name_or_path", "no such folder", fix))


def _is_folder(name: str) -> bool:
    """Whether there is such a folder; a name that no folder can have names none."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def loading(name: str, what: str, field: str = "model_name_or_path") -> Iterator[None]:
    """Turns what a library raises while it loads something into InputError.

    `what`: model, adapter, tokenizer, config or generation config; `field`: the key that names it.
    Of damaged files libraries raise whatever comes first, tokenizers a bare Exception, so all of
    them are taken; the reason is named. A Hub that does not answer is HubUnavailable.
    """
    try:
        yield
    except (SFTRecipesError, MemoryError):
        raise
    except Exception as error:
        raise not_loadable(name, what, error, field) from error


def not_loadable(name: str, what: str, error: Exception, field: str) -> InputError | HubUnavailable:
    """The error for what a library could not load, with the first line of its reason.

    `what`: model, tokenizer, config or generation config.
    """
    reason = type(error).__name__
    lines = str(error).strip().splitlines()
    if lines:
        reason = shown(lines[0])
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
    problem = f"the {what} could not be loaded ({reason})"
    fix = "check the name, or download it first and give the folder"
    if is_network_down(error):
        problem = f"the {what} is not here, and the Hub did not answer ({reason})"
        fix = "check the network and run it again, or download it and give the folder"
        return HubUnavailable(str(Problem(shown(name), field, problem, fix)))
    return InputError(Problem(shown(name), field, problem, fix))
