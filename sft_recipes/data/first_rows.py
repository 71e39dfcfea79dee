"""A look at the data before anything heavy is imported: torch and its like take seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.data.loading import RejectLog, iter_examples, source_files
from sft_recipes.recipe import DatasetSource, DataSettings
from sft_recipes.recipe_keys import load_data_settings


def check_recipe_rows(path: Path, overrides: Mapping[str, Any]) -> None:
    """Raise InputError for data in whose columns a recipe finds no row, as training would.

    A recipe whose own keys are at fault is left to `load_recipe`, which lists all of them; so is data
    that is not there, since a recipe with that may have wrong keys, too.
    """
    settings = load_data_settings(path, overrides)
    if settings is not None:
        for source in settings.datasets:
            if Path(source.path).exists():
                check_first_rows(source, settings)


def check_first_rows(source: DatasetSource, settings: DataSettings) -> None:
    """Read a local source up to the first row that is an example; any other rows come later.

    Raises InputError where there is none, and for columns that fit no format.
    """
    if source_files(source):
        next(iter_examples(source, settings, RejectLog(settings)), None)
