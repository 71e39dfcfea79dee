"""The loss of a run's held-out rows under the tuned model, by data set of its mixture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_recipes import run_folder
from sft_recipes.data.prepared import MANIFEST, PreparedData, load_prepared
from sft_recipes.data.splits import KEPT_EVAL_EXAMPLES
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.evaluation.open_run import OpenedRun
from sft_recipes.evaluation.row_losses import row_losses
from sft_recipes.statistics import Estimate, by_group, ratio_estimate


def losses_of_run(
    request: EvaluationRequest, run: OpenedRun, model: Any, progress: bool
) -> dict[str, Estimate]:
    """The losses where the run's own eval rows are asked, and they are of a mixture; else none."""
    folder = Path(request.model_or_run) / run_folder.PREPARED
    recipe = run.recipe
    if recipe is None or request.data or recipe.evaluation.data is not None:
        return {}
    if len(recipe.data.datasets) == 1 or not (folder / MANIFEST).is_file():
        return {}
    return data_set_losses(model, load_prepared(recipe, folder), request.max_rows, progress)


def data_set_losses(
    model: Any, data: PreparedData, max_rows: int | None, progress: bool = False
) -> dict[str, Estimate]:
    """Loss a trained token by data set, over prompts as every estimate; none for rows of one set.

    Of many rows the first thousand are taken, in the order in which prompts are held out.
    """
    if data.held_out is None or data.eval is None:
        return {}
    order = np.argsort(data.held_out.groups, kind="stable")
    chosen = order[: max_rows or KEPT_EVAL_EXAMPLES]
    rows = data.eval.select(chosen)
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    losses = row_losses(model, rows, lengths, "loss of held-out rows", progress)
    numbers = data.held_out.numbers[chosen]
    groups = data.held_out.groups[chosen]
    estimates: dict[str, Estimate] = {}
    for number, name in data.held_out.present().items():
        own = numbers == number
        prompts = groups[own].tolist()
        totals = by_group(losses.sums[own].tolist(), prompts, sum)
        tokens = by_group(losses.tokens[own].tolist(), prompts, sum)
        estimate = ratio_estimate(totals, tokens, unit="nats a token")
        estimates[name] = replace(estimate, higher_is_better=False)
    return dict(sorted(estimates.items()))
