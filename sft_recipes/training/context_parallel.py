"""Context parallel (FSDP2 with `cp_size`): some processes share a batch, each with a part of every row's tokens.

accelerate takes every attention mask away then and torch computes plain causal attention over whole rows, in a ring of
the processes (TRL 1.16, transformers 5.23, accelerate 1.15, torch 2.13). What needs another mask would be trained
wrong or fail within the first step, so it is refused here. Labels are shifted by transformers before rows are cut, so
the token behind a cut is predicted, too, and `RecipeTrainer` leaves the loss to TRL, which takes shifted labels.
"""

from collections.abc import Iterator
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import Recipe

_ATTENTION = "sdpa"
# Keys that put rows one behind the other, kept apart by a mask alone.
_FLATTENING = ("packing", "eval_packing", "padding_free")
_OTHER_LAUNCH = "launch with fsdp2"


def row_multiple(processes: int) -> int:
    """What the length of a batch has to be a multiple of: each process gets two parts of a row, one near its beginning
    and one near its end, since later tokens look at more.
    """
    return 2 * processes


def check_context_parallel(recipe: Recipe, model: Any, processes: int) -> None:
    """Raise InputError for everything that `processes` that share a batch would train wrong or cannot train.

    `model` may be one of shapes alone. For one process there is nothing to say.
    """
    if processes == 1:
        return
    problems = [*_recipe_problems(recipe, processes), *_model_problems(recipe, model)]
    if problems:
        raise InputError(problems)


def _recipe_problems(recipe: Recipe, processes: int) -> Iterator[Problem]:
    for key in _FLATTENING:
        if recipe.training.get(key):
            what = "rows of one sequence would see one another under context parallel"
            yield Problem(recipe.place(key), key, what, f"remove it, or {_OTHER_LAUNCH}")
    key = "attn_implementation"
    if recipe.model.get(key) not in (None, _ATTENTION):
        what = f"context parallel is written for {_ATTENTION} alone"
        yield Problem(recipe.place(key), key, what, f"remove it, or {_OTHER_LAUNCH}")
    key = "pad_to_multiple_of"
    multiple = row_multiple(processes)
    stated = recipe.training.get(key)
    if stated is not None and (not isinstance(stated, int) or stated % multiple):
        what = f"{processes} processes that share a batch cut its rows into {multiple} parts"
        yield Problem(recipe.place(key), key, what, f"remove it, or set it to {multiple}")
    evaluates = recipe.training.get("eval_strategy", "no") != "no"
    if evaluates and recipe.evaluation.during_training:
        what = "answers would be generated without the mask over padded prompts"
        fix = "set evaluation: {during_training: false}, and evaluate the finished run"
        yield Problem(recipe.place("evaluation"), "evaluation", what, fix)


def _model_problems(recipe: Recipe, model: Any) -> Iterator[Problem]:
    key = "model_name_or_path"
    place = recipe.place(key)
    config = model.config.get_text_config()
    masked = _masked_layers(config)
    if masked:
        what = f"layers of {', '.join(masked)} need a mask, which context parallel drops"
        yield Problem(place, key, what, _OTHER_LAUNCH)
    if getattr(config, "_attn_implementation", _ATTENTION) not in (None, _ATTENTION):
        what = (
            f"its attention is {config._attn_implementation}, context parallel needs {_ATTENTION}"
        )
        yield Problem(place, key, what, _OTHER_LAUNCH)
    # accelerate takes the mask away from modules of this name; any other would fail or keep it.
    if not any(name.endswith("self_attn") for name, _ in model.named_modules()):
        what = "it has no layer called self_attn, by which accelerate prepares attention"
        yield Problem(place, key, what, _OTHER_LAUNCH)


def _masked_layers(config: Any) -> list[str]:
    """The kinds of layers that are no full attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sorted({*kinds} - {"full_attention"})
    if getattr(config, "sliding_window", None):
        return ["sliding_attention"]
    return []
