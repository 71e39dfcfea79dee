"""Generation metrics inside `trainer.evaluate()`: the same evaluation as the command, on a few fixed prompts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProgressCallback

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import read_held_out
from sft_recipes.data.mixture import data_set_names
from sft_recipes.data.prepared import PreparedData
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.evaluator import Evaluation, evaluate
from sft_recipes.evaluation.generation import check_prompts, default_batch_size
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.messages import Example
from sft_recipes.recipe import EvaluationSettings, Recipe
from sft_recipes.training.trainer import RecipeTrainer

# The longest answers of a rehearsal: long enough to run every kernel of a decoding step.
REHEARSED_TOKENS = 2
# What transformers adds to every evaluation.
TIME_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@dataclass(frozen=True)
class GenerationWhileTraining:
    """Answers fixed examples and scores the answers; every rank must call it."""

    renderer: ChatRenderer
    examples: Sequence[Example]
    settings: EvaluationSettings
    _answered: list[Mapping[str, Any]] = field(default_factory=list)

    def __call__(self, model: Any) -> Mapping[str, float]:
        """Metrics by name; those that nothing could be said of are left out."""
        evaluation = self._evaluate(model, self.examples, self.settings.max_new_tokens)
        self._answered[:] = evaluation.rows
        metrics = {}
        for name, metric in evaluation.metrics.items():
            if metric.value is not None:
                metrics[name] = float(metric.value)
        for name, exact_match in evaluation.data_sets.items():
            if exact_match.value is not None:
                metrics[f"{name}_exact_match"] = float(exact_match.value)
        return metrics

    def take_rows(self) -> Sequence[Mapping[str, Any]]:
        """The scored rows of the last evaluation, once."""
        rows = list(self._answered)
        self._answered.clear()
        return rows

    def rehearse(self, model: Any) -> Sequence[str]:
        """Answer one batch with two tokens each; returns the names of the metrics that will come."""
        batch = self.settings.batch_size or default_batch_size()
        names = list(self._evaluate(model, self.examples[:batch], REHEARSED_TOKENS).metrics)
        data_sets = {example.data_set for example in self.examples}
        if len(data_sets) > 1:
            names += [f"{name}_exact_match" for name in data_sets]
        return names

    def _evaluate(self, model: Any, examples: Sequence[Example], max_new_tokens: int) -> Evaluation:
        return evaluate(
            model,
            self.renderer,
            examples,
            max_new_tokens=max_new_tokens,
            batch_size=self.settings.batch_size,
            template_segments=self.renderer.template_segments,
            progress=False,
        )


def generation_metrics(
    recipe: Recipe, labeller: Labeller, data: PreparedData, model: Any
) -> GenerationWhileTraining | None:
    """What `RecipeTrainer` calls in `evaluate()`, or None where nothing is to be generated.

    Raises InputError for prompts that `model` has no room for: now, not at the first evaluation.
    """
    settings = recipe.evaluation
    evaluates = recipe.training.get("eval_strategy", "no") != "no"
    if not (evaluates and settings.during_training):
        return None
    examples = _fixed_examples(recipe, labeller, data)
    if not examples:
        return None
    renderer = labeller.renderer
    prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples]
    places = [example.where for example in examples]
    check_prompts(model, prompts, settings.max_new_tokens, places)
    return GenerationWhileTraining(renderer, examples, settings)


def rehearse_evaluation(trainer: RecipeTrainer) -> None:
    """One eval batch, and two tokens for one batch of prompts; the numbers are dropped, random numbers are put back.

    What would break the first evaluation, hours later, breaks here. Raises InputError for a `metric_for_best_model`
    that no evaluation gives.
    """
    names = set(TIME_METRICS)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        names |= _rehearse_loss(trainer)
        if isinstance(trainer.generation_metrics, GenerationWhileTraining):
            for name in trainer.generation_metrics.rehearse(trainer.model):
                names.add(f"eval_{name}")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            # Closes the bar of this evaluation.
            callback.on_predict(trainer.args, trainer.state, trainer.control)
    trainer.forget_evaluation()
    trainer.model_wrapped.train()
    require_metric(trainer.args.metric_for_best_model, names, "recipe")


def require_metric(asked: str | None, names: Collection[str], where: str) -> None:
    """Raise InputError for a `metric_for_best_model` that is none of the names."""
    best = "eval_" + (asked or "loss").removeprefix("eval_")
    if best not in names:
        what = f"no evaluation gives {best!r}"
        fix = f"use one of {', '.join(sorted(names))}"
        raise InputError(Problem(where, "metric_for_best_model", what, fix))


def possible_metrics(recipe: Recipe) -> set[str]:
    """The most that an evaluation inside training can give; what it does give depends on the rows."""
    names = {"eval_loss", *TIME_METRICS}
    if recipe.evaluation.during_training:
        names |= {f"eval_{name}" for name in METRICS}
    if len(recipe.data.datasets) > 1:
        for name in data_set_names(recipe.data.datasets):
            names |= {f"eval_{name}_loss", f"eval_{name}_exact_match"}
    return names


def _rehearse_loss(trainer: RecipeTrainer) -> set[str]:
    """Evaluate the loss of one batch for each rank; returns the names of what that gives."""
    rows: Any = trainer.eval_dataset
    count = min(len(rows), trainer.args.eval_batch_size * trainer.args.world_size)
    loader = trainer.get_eval_dataloader(rows.select(range(count)))
    output = trainer.evaluation_loop(loader, "rehearsal", prediction_loss_only=True)
    names = set(output.metrics or {})
    if trainer.data_set_losses is not None:  # one batch need not have rows of every data set
        names |= {f"eval_{name}_loss" for name in trainer.data_set_losses.names}
    return names


def _fixed_examples(recipe: Recipe, labeller: Labeller, data: PreparedData) -> Sequence[Example]:
    """The first `evaluation.rows` held-out conversations that end with an answer to generate."""
    held_out: Sequence[Example] = data.eval_examples
    if recipe.evaluation.data is not None:
        held_out = read_held_out([recipe.evaluation.data], recipe.data)
    answered = [example for example in held_out if _ends_with_an_answer(example)]
    return [labeller.for_template(example) for example in answered[: recipe.evaluation.rows]]


def _ends_with_an_answer(example: Example) -> bool:
    return example.text is None and bool(example.messages[-1].get("content"))
