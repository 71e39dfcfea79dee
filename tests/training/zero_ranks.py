"""Run a recipe as `accelerate launch` would under DeepSpeed, and note what each rank had. Started by test_deepspeed.py.

Environment: BREAK_RANK names the rank whose losses become BREAK_WITH, `inf` (added, so that gradients stay finite) or
`nan` (multiplied, so that they do not).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from sft_recipes.errors import TrainingFault
from sft_recipes.training import train as page


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained weights, gathered from all ranks where they are partitioned."""
    trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: one.detach().clone() for name, one in trained.items()}


def note(trainer: Any, **more: Any) -> None:
    """Write rank0.json or rank1.json beside the run folder."""
    engine = trainer.deepspeed
    parameters = list(trainer.model.parameters())
    found = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage(),
        "world_size": trainer.args.world_size,
        "fast_loss": trainer.trained_positions_only,
        "elements": sum(getattr(one, "ds_numel", one.numel()) for one in parameters),
        "elements_held": sum(getattr(one, "ds_tensor", one).numel() for one in parameters),
        **more,
    }
    Path(trainer.args.output_dir).with_name(f"rank{os.environ['RANK']}.json").write_text(
        json.dumps(found)
    )


def main() -> int:
    """Takes the arguments of `sft_recipes.training.train`."""
    real_save, real_loss = page.save, page.RecipeTrainer.compute_loss
    real_norm = page.RecipeTrainer._get_grad_norm

    def save(recipe: Any, trainer: Any, renderer: Any) -> Path:
        total = sum(float(one.double().abs().sum()) for one in weights(trainer).values())
        note(trainer, weights=total)
        return real_save(recipe, trainer, renderer)

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, value = real_loss(self, *args, **kwargs), float(os.environ["BREAK_WITH"])
        return loss * value if value != value else loss + value

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return real_norm(self, *args, **kwargs)
        except TrainingFault:
            note(self, steps_of_engine=self.deepspeed.global_steps)
            raise

    page.save = save
    page.RecipeTrainer._get_grad_norm = watched  # type: ignore[method-assign]
    if os.environ.get("BREAK_RANK") == os.environ["RANK"]:
        page.RecipeTrainer.compute_loss = broken  # type: ignore[method-assign]
    return page.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
