"""What one process decides for all."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sft_recipes.errors import SFTRecipesError, TrainingFault


def on_main(call: Callable[[], Any]) -> Any:
    """Call on rank 0 and give every rank the result; if it refuses, no rank goes on. Every rank must ask."""
    result, refusal = None, None
    if PartialState().is_main_process:
        try:
            result = call()
        except SFTRecipesError as error:
            refusal = error
    result, refused = broadcast_object_list([result, refusal is not None])
    if refused:
        raise refusal or TrainingFault("the first process ended the run; its message says why")
    return result
