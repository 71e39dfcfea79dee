"""Generation metrics inside `trainer.evaluate()`: the same evaluation as the command, on a few fixed prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ProgressCallback

from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.prepared import PreparedData
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.evaluator import evaluate
from sft_recipes.evaluation.generation import check_prompts, default_batch_size
from sft_recipes.messages import Example
from sft_recipes.recipe import Recipe
from sft_recipes.training.trainer import GenerationMetrics, RecipeTrainer


def generation_metrics(
    recipe: Recipe, labeller: Labeller, data: PreparedData, model: Any
) -> GenerationMetrics | None:
    """A function of the model for `RecipeTrainer`, or None where nothing is to be generated.

    Raises InputError for prompts that `model` has no room for: now, not at the first evaluation.
    """
    settings = recipe.evaluation
    wanted = (
        settings.during_training
        and settings.rows > 0
        and recipe.training.get("eval_strategy", "no") != "no"
    )
    examples = _fixed_examples(recipe, labeller, data) if wanted else []
    if not examples:
        return None
    renderer = labeller.renderer
    prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples]
    check_prompts(model, prompts, settings.max_new_tokens, [example.where for example in examples])

    one_batch = settings.batch_size or default_batch_size()

    def metrics(model: Any, rehearsal: bool = False) -> Mapping[str, float]:
        evaluation = evaluate(
            model,
            renderer,
            examples[:one_batch] if rehearsal else examples,
            max_new_tokens=2 if rehearsal else settings.max_new_tokens,
            batch_size=settings.batch_size,
            template_segments=renderer.template_segments,
            progress=False,
        )
        found = {name: one.value for name, one in evaluation.metrics.items()}
        return {
            name: float(value or 0)
            for name, value in found.items()
            if rehearsal or value is not None
        }

    return metrics


def rehearse_evaluation(trainer: RecipeTrainer) -> None:
    """One eval batch, and two tokens for one batch of prompts; the numbers are dropped, random numbers are put back.

    What would break the first evaluation, hours later, breaks here. Raises InputError for a `metric_for_best_model`
    that no evaluation gives.
    """
    rows: Any = trainer.eval_dataset
    some = rows.select(
        range(min(len(rows), trainer.args.eval_batch_size * trainer.args.world_size))
    )
    generate: Any = trainer.generation_metrics
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        loop = trainer.evaluation_loop(
            trainer.get_eval_dataloader(some), "rehearsal", prediction_loss_only=True
        )
        names = {
            *(loop.metrics or {}),
            "eval_runtime",
            "eval_samples_per_second",
            "eval_steps_per_second",
        }
        names |= (
            {f"eval_{name}" for name in generate(trainer.model, rehearsal=True)}
            if generate
            else set()
        )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_predict(
                trainer.args, trainer.state, trainer.control
            )  # closes the bar of this evaluation
    trainer.forget_evaluation()
    trainer.model_wrapped.train()
    best = "eval_" + str(trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in names:
        fix = f"use one of {', '.join(sorted(names))}"
        raise InputError(
            Problem("recipe", "metric_for_best_model", f"no evaluation gives {best!r}", fix)
        )


def _fixed_examples(recipe: Recipe, labeller: Labeller, data: PreparedData) -> Sequence[Example]:
    """The first `evaluation.rows` held-out conversations that end with an answer to generate."""
    found: Sequence[Example] = data.eval_examples
    if recipe.evaluation.data is not None:
        found = read_held_out([recipe.evaluation.data], recipe.data)
    answered = [
        example for example in found if example.text is None and example.messages[-1].get("content")
    ]
    return [labeller.for_template(example) for example in answered[: recipe.evaluation.rows]]
