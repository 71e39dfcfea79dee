"""TRL's `SFTConfig` for a recipe: its keys verbatim, what it leaves open decided here and announced."""

import contextlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from trl import SFTConfig

from sft_recipes.devices import accelerator_has_bf16, computes_on_cpu
from sft_recipes.errors import InputError, Problem
from sft_recipes.plain_values import SHOWN_CHARACTERS
from sft_recipes.recipe import Recipe
from sft_recipes.training.context_parallel import row_multiple
from sft_recipes.training.processes import launched_batches, processes_a_batch

# Batches are put together beside the training process, where a device waits for them. On a CPU it computes itself.
LOADER_WORKERS = 2
# What libraries raise for arguments that they do not take.
REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    OSError,
    RuntimeError,
    re.error,
)


def sft_config(
    recipe: Recipe, processes: int | None = None, decided: Mapping[str, Any] | None = None
) -> SFTConfig:
    """Build `SFTConfig`. `decided` are keys that follow from the loaded model; what the recipe states goes before.

    `processes`: plan for this many that read batches of their own instead of those launched.
    """
    given: dict[str, Any] = dict(recipe.training)
    use_cpu = computes_on_cpu(recipe)
    packing = bool(given.get("packing", False))
    chosen: dict[str, Any] = {
        # TRL's default, stated by its new name: the old one warns.
        "activation_checkpointing": True,
        "bf16": accelerator_has_bf16(recipe) and not given.get("fp16", False),
        # A first loss is what tells within seconds that something is wrong.
        "logging_first_step": True,
        # A run is called in a tracker as its folder is, so that a resumed one goes on there.
        "run_name": recipe.output_dir.resolve().name,
        # Without it transformers would copy what trackio keeps here to a Space of the Hub.
        "trackio_static_space_id": False,
        "data_seed": given.get("seed", SFTConfig.seed),
        "dataloader_pin_memory": not use_cpu,
        "dataloader_num_workers": 0 if use_cpu else LOADER_WORKERS,
        **(decided or {}),
        **given,
        "use_cpu": use_cpu,
        # A loss that is not finite must show as such; RecipeTrainer stops there.
        "logging_nan_inf_filter": False,
        # Rows already fit; only packing needs to know the length of a pack.
        "max_length": recipe.labels.max_length if packing else None,
        "gradient_accumulation_steps": accumulation_steps(recipe, processes),
    }
    if processes_a_batch() > 1:
        chosen.setdefault("pad_to_multiple_of", row_multiple(processes_a_batch()))
    try:
        return SFTConfig(**chosen)
    except REFUSALS as error:
        raise _not_taken(recipe, chosen, error) from error


def _not_taken(recipe: Recipe, chosen: Mapping[str, Any], error: Exception) -> InputError:
    """What TRL and transformers say of keys that do not go together, under the keys that it is about."""
    keys = []
    for key in recipe.training:
        without = {name: value for name, value in chosen.items() if name != key}
        # A key is at fault if there is no refusal without it.
        with contextlib.suppress(*REFUSALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SFTConfig(**without)
            keys.append(key)
    if not keys:  # it is about this machine, or about several keys at once
        fix = "change what it names"
        return InputError(Problem(recipe.name, "TRL", reason(error), fix))
    fix = f"change {' or '.join(keys)}"
    return InputError(Problem(recipe.place(keys[0]), keys[0], reason(error), fix))


def reason(error: Exception) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split())
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}..."
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def batch_per_device(recipe: Recipe) -> int:
    """Rows of a micro-batch on one device."""
    stated = recipe.training.get("per_device_train_batch_size")
    return int(stated or SFTConfig.per_device_train_batch_size)


def accumulation_steps(recipe: Recipe, processes: int | None = None) -> int:
    """Accumulation as stated, or derived from `global_batch_size`, the batch per device and the processes that read
    batches of their own.
    """
    if recipe.global_batch_size is None:
        stated = recipe.training.get("gradient_accumulation_steps")
        return int(stated or SFTConfig.gradient_accumulation_steps)
    per_step = batch_per_device(recipe) * (processes or launched_batches())
    if recipe.global_batch_size % per_step:
        what = f"{recipe.global_batch_size} rows do not divide by {per_step} (batch per device x processes)"
        fix = "choose a multiple, or another per_device_train_batch_size"
        raise InputError(Problem(recipe.place("global_batch_size"), "global_batch_size", what, fix))
    return recipe.global_batch_size // per_step
