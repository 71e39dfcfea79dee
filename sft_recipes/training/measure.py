"""A few steps of a recipe, trained for nothing but their time and their memory."""

import dataclasses
import gc
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sft_recipes.data.labels import Labeller
from sft_recipes.data.prepared import PreparedData
from sft_recipes.recipe import Recipe
from sft_recipes.training.train import build_trainer

WARM_UP = 2
_STATUS = Path("/proc/self/status")
# What this number does there: the peak is set to what is resident now.
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """The most memory that work takes: of the GPU, or by how much this process grows on Linux; elsewhere None.

    Growth is counted from where this was made, so what the libraries take is not in it.
    """

    def __init__(self) -> None:
        gc.collect()
        self._resident_before = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            self._resident_before = resident_bytes("VmRSS")
            _CLEAR.write_text(_RESET_PEAK)

    def bytes(self) -> int | None:
        """The peak since this was made."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self._resident_before:
            return None
        return resident_bytes("VmHWM") - self._resident_before


def resident_bytes(name: str) -> int:
    """Main memory of this process on Linux: VmRSS now, VmHWM at most since the last reset."""
    line = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.M)
    if line is None:
        raise RuntimeError(f"{_STATUS} has no {name}")
    return int(line[1]) * 1024


class _Clock(TrainerCallback):
    """When each optimizer step ended; `progress` says so at once."""

    def __init__(self, progress: bool) -> None:
        self.ends: list[float] = []
        self._progress = progress
        self._begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, with the device's work done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self._progress:
            number = len(self.ends)
            purpose = "to warm up" if number <= WARM_UP else "measured"
            took = self.ends[-1] - self._begin
            print(f"step {number} {purpose}: {took:.3g} s", file=sys.stderr, flush=True)


def measure_steps(
    recipe: Recipe,
    labeller: Labeller,
    data: PreparedData,
    steps: int,
    planned: int,
    progress: bool = False,
) -> Mapping[str, Any]:
    """Train `steps` steps after two to warm up, in a folder that is thrown away; nothing of the run is touched.

    Returns seconds a step (mean), hours for the `planned` steps, and the peak bytes of the device (on a CPU: by how
    much this process grew, where that can be seen), by the plan's names. Raises what training raises.
    """
    clock = _Clock(progress)
    memory = PeakMemory()
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
        peak = memory.bytes()
    seconds = (clock.ends[-1] - clock.ends[WARM_UP - 1]) / steps
    return {
        "measured seconds a step": f"{seconds:.3g}",
        "measured hours for all steps": f"{seconds * planned / 3600:.3g}",
        "bytes at peak, measured": peak or "not known on this system",
    }
