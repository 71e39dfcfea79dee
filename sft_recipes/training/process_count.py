"""Whether a run may go on with another number of processes than it was stopped with.

It may where the same rows go into the same steps and every process holds the whole model: then the losses and weights
are those of the run that was never stopped, up to the order in which numbers are added. Otherwise it is refused, with
the reason.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.training.checkpoints import MANIFEST
from sft_recipes.training.processes import launched_with


def require_same_steps(trainer: Any, checkpoint: Path | None, allowed: Sequence[str] = ()) -> None:
    """Raise InputError where the number of processes changed and the run would not go on exactly."""
    if checkpoint is None or "world_size" in allowed:
        return
    before = run_folder.read_json(checkpoint / MANIFEST).get("world_size")
    now = trainer.args.world_size
    if before == now:
        return
    reason = why_not_exact(trainer, checkpoint)
    if reason:
        what = f"{before} processes wrote it, {now} would go on: {reason}"
        fix = (
            f"launch {before} processes, use --output_dir NEW for a new run, or resume a run that cannot be "
            "repeated with --allow_changed world_size"
        )
        raise InputError(Problem(str(checkpoint), "world_size", what, fix))
    if trainer.is_world_process_zero():
        print(f"goes on with {now} processes instead of {before}: the same rows in the same steps")


def why_not_exact(trainer: Any, checkpoint: Path) -> str:
    """What keeps another number of processes from going on exactly; empty if nothing does."""
    for strategy in ("DEEPSPEED", "FSDP"):
        if launched_with(strategy):
            return f"under {strategy} every process holds a part of the optimizer"
    if not (checkpoint / "optimizer.pt").is_file():
        return "its optimizer is saved in parts, one for each process"
    args = trainer.args
    # Every process draws numbers of its own.
    if _has_dropout(trainer.model) or args.neftune_noise_alpha:
        return "dropout and noise are drawn by each process for itself"
    rows = len(trainer.train_dataset)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if rows % step:
        # The last batches of an epoch are filled up with its first rows, as many as there are processes.
        return (
            f"{rows:,} rows are no whole number of steps of {step}, so an epoch's last step differs"
        )
    return ""


def _has_dropout(model: torch.nn.Module) -> bool:
    """Whether anything of the model is dropped at random in training, in layers or inside attention."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return True
        inside = getattr(module, "attention_dropout", 0)
        if isinstance(inside, float) and inside > 0:
            return True
    return False
