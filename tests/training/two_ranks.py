"""Run a recipe as `accelerate launch` would, and note what every rank ended with. Started by test_two_processes.py."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sft_recipes.training import train as page
from tests.training.killable import Fault


def main() -> int:
    """Takes the arguments of `sft_recipes.training.train`; writes rank0.json and rank1.json beside the run folder.

    BREAK_RANK in the environment names the rank whose losses are made infinite, KILL_RANK the one that kills itself in
    its forward pass number KILL_STEP.
    """
    rank = os.environ["RANK"]
    real_save = page.save

    def save(recipe: Any, trainer: Any, renderer: Any) -> Path:
        model = trainer.accelerator.unwrap_model(trainer.model)
        digest = hashlib.sha256()
        for _, tensor in sorted(model.state_dict().items()):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        found = {
            "weights": digest.hexdigest(),
            "world_size": trainer.args.world_size,
            "fast_loss": trainer.trained_positions_only,
        }
        recipe.output_dir.with_name(f"rank{rank}.json").write_text(json.dumps(found))
        return real_save(recipe, trainer, renderer)

    page.save = save
    if os.environ.get("BREAK_RANK") == rank:
        real_loss = page.RecipeTrainer.compute_loss

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            # An added constant leaves all gradients finite: only the other rank's verdict can stop this one.
            return real_loss(self, *args, **kwargs) + float("inf")

        page.RecipeTrainer.compute_loss = broken  # type: ignore[method-assign]
    if os.environ.get("KILL_RANK") == rank:
        Fault(
            "forward", nth=int(os.environ["KILL_STEP"]), before=True, signal=signal.SIGKILL
        ).install()
    return page.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
