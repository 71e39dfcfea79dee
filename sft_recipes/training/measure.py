"""A few steps of a recipe, trained for nothing but their time and their memory."""

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from sft_recipes.data.labels import Labeller
from sft_recipes.data.prepared import PreparedData
from sft_recipes.recipe import Recipe
from sft_recipes.training.train import build_trainer

WARM_UP = 2


class _Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, with the device's work done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure_steps(
    recipe: Recipe, labeller: Labeller, data: PreparedData, steps: int, planned: int
) -> Mapping[str, Any]:
    """Train `steps` steps after two to warm up, in a folder that is thrown away; nothing of the run is touched.

    Returns seconds a step (mean), hours for the `planned` steps, and the peak bytes of the device (or of this process
    on a CPU), by the plan's names. Raises what training raises.
    """
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {
            "max_steps": steps + WARM_UP,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
        }
        quiet |= {
            "output_dir": folder,
            "disable_tqdm": True,
            "load_best_model_at_end": False,
            "eval_on_start": False,
        }
        short = dataclasses.replace(recipe, training={**recipe.training, **quiet})
        trainer = build_trainer(short, labeller, data)
        trainer.add_callback(clock)
        trainer.train()
    seconds = (clock.ends[-1] - clock.ends[WARM_UP - 1]) / steps
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:  # the kernel counts in KiB, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return {
        "measured seconds a step": f"{seconds:.3g}",
        "measured hours for all steps": f"{seconds * planned / 3600:.3g}",
        "bytes at peak, measured": peak,
    }
