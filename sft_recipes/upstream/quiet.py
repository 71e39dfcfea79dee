"""What libraries say while they work and nobody asked: their own bars, and news of their next version."""

import os
import warnings

from transformers.utils import logging

from sft_recipes.crash import DEBUG

# Of TRL's and transformers' own making: nothing in a recipe makes them come or go.
_NOISE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def quiet_libraries() -> None:
    """Leave out transformers' bars for loading and saving, and warnings of deprecation; not under `--debug`.

    Downloads keep their bars: those are the Hub client's.
    """
    if os.environ.get(DEBUG):
        return
    logging.disable_progress_bar()
    for category in _NOISE:
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
