"""Run a recipe as `accelerate launch` would, and note what each rank really ran. Started by test_strategies.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from sft_recipes.training import train as page


def note(recipe: Any, trainer: Any) -> None:
    """Write rankN.json beside the run folder."""
    parameters = list(trainer.model.parameters())
    # FSDP2 keeps its part of a parameter behind `to_local`, ZeRO-3 in `ds_tensor`.
    held = [
        one.to_local() if hasattr(one, "to_local") else getattr(one, "ds_tensor", one)
        for one in parameters
    ]
    engine = getattr(trainer, "deepspeed", None)
    found = {
        "device": trainer.args.device.type,
        "world_size": trainer.args.world_size,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "fsdp": any(hasattr(one, "to_local") for one in parameters),
        "zero": engine.zero_optimization_stage() if engine is not None else None,
        "attention": trainer.model.config._attn_implementation,
        "workers": trainer.args.dataloader_num_workers,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "autocast": "bf16" if trainer.args.bf16 else None,
        "four_bit": bool(getattr(trainer.model, "is_loaded_in_4bit", False)),
        "share_held": sum(one.numel() for one in held)
        / sum(getattr(one, "ds_numel", one.numel()) for one in parameters),
    }
    recipe.output_dir.with_name(f"rank{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(found)
    )


def main() -> int:
    """Takes the arguments of `sft_recipes.training.train`."""
    real_save = page.save

    def save(recipe: Any, trainer: Any, *rest: Any) -> Path:
        note(recipe, trainer)
        return real_save(recipe, trainer, *rest)

    page.save = save
    return page.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
