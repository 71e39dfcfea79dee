"""Generation metrics inside `trainer.evaluate()`: the same evaluation as the command, on a few fixed prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.prepare import PreparedData
from sft_recipes.evaluation.evaluator import evaluate
from sft_recipes.evaluation.generation import check_prompts
from sft_recipes.messages import Example
from sft_recipes.recipe import Recipe
from sft_recipes.training.trainer import GenerationMetrics


def generation_metrics(
    recipe: Recipe, renderer: ChatRenderer, data: PreparedData, model: Any
) -> GenerationMetrics | None:
    """A function of the model for `RecipeTrainer`, or None where nothing is to be generated.

    Raises InputError for prompts that `model` has no room for: now, not at the first evaluation.
    """
    settings = recipe.evaluation
    wanted = settings.during_training and settings.rows > 0 and recipe.training.get("eval_strategy", "no") != "no"
    examples = _fixed_examples(recipe, renderer, data) if wanted else []
    if not examples:
        return None
    prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples]
    check_prompts(model, prompts, settings.max_new_tokens, [example.where for example in examples])

    def metrics(model: Any) -> Mapping[str, float]:
        evaluation = evaluate(
            model,
            renderer,
            examples,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            template_segments=renderer.template_segments,
            progress=False,
        )
        return {name: float(one.value) for name, one in evaluation.metrics.items() if one.value is not None}

    return metrics


def _fixed_examples(recipe: Recipe, renderer: ChatRenderer, data: PreparedData) -> Sequence[Example]:
    """The first `evaluation.rows` held-out conversations that end with an answer to generate."""
    labeller = Labeller(renderer, recipe.labels)
    found: Sequence[Example] = data.eval_examples
    if recipe.evaluation.data is not None:
        found = read_held_out([recipe.evaluation.data], recipe.data)
    answered = [example for example in found if example.text is None and example.messages[-1].get("content")]
    return [labeller.for_template(example) for example in answered[: recipe.evaluation.rows]]
