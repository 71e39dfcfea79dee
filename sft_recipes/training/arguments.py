"""TRL's `SFTConfig` for a recipe: its keys verbatim, what it leaves open decided here and announced."""

import os
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from trl import SFTConfig

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.gate import parse_gate
from sft_recipes.models import supports_bf16
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import IDLE, NEEDS
from sft_recipes.release.hub import require_token


def has_accelerator() -> bool:
    """Whether this process computes on something else than the CPU."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def launched_processes() -> int:
    """How many processes the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sft_config(recipe: Recipe, flatten: bool, processes: int | None = None) -> SFTConfig:
    """Build `SFTConfig`. `flatten` runs TRL's padding-free batches, for models that keep rows apart in them.

    `processes`: plan for this many instead of those launched.
    """
    given: dict[str, Any] = dict(recipe.training)
    use_cpu = bool(given.get("use_cpu", not has_accelerator()))
    packing = bool(given.get("packing", False))
    chosen: dict[str, Any] = {
        # TRL's default, stated by its new name: the old one warns.
        "activation_checkpointing": True,
        "bf16": supports_bf16() and not use_cpu and not given.get("fp16", False),
        "data_seed": given.get("seed", 42),
        "dataloader_pin_memory": not use_cpu,
        **given,
        "use_cpu": use_cpu,
        # A loss that is not finite must show as such; RecipeTrainer stops there.
        "logging_nan_inf_filter": False,
        # Rows already fit; only packing needs to know the length of a pack.
        "max_length": recipe.labels.max_length if packing else None,
        "padding_free": bool(given.get("padding_free", flatten)) and not packing,
        "gradient_accumulation_steps": accumulation_steps(recipe, processes),
    }
    try:
        return SFTConfig(**chosen)
    except ValueError as error:  # TRL's own word on keys that do not go together
        problem = Problem(
            recipe.name, "TRL", " ".join(str(error).split()), "change one of the keys it names"
        )
        raise InputError(problem) from error


def accumulation_steps(recipe: Recipe, processes: int | None = None) -> int:
    """Accumulation as stated, or derived from `global_batch_size`, the batch per device and the processes."""
    if recipe.global_batch_size is None:
        return int(recipe.training.get("gradient_accumulation_steps", 1))
    per_step = int(recipe.training.get("per_device_train_batch_size", 8)) * (
        processes or launched_processes()
    )
    if recipe.global_batch_size % per_step:
        what = f"{recipe.global_batch_size} rows do not divide by {per_step} (batch per device x processes)"
        fix = "choose a multiple, or another per_device_train_batch_size"
        raise InputError(Problem(recipe.name, "global_batch_size", what, fix))
    return recipe.global_batch_size // per_step


def check_settings(recipe: Recipe, processes: int | None = None, zero3: bool | None = None) -> None:
    """Refuse, before anything is read, keys without effect and what this machine cannot do. Raises InputError.

    `processes` and `zero3` (whether ZeRO-3 shards the weights) describe a planned launch instead of this one.
    """
    training, model = recipe.training, recipe.model
    evaluates = training.get("eval_strategy", "no") != "no"
    has_eval_rows = bool(recipe.data.test_split or recipe.data.eval_split)
    no_length = training.get("packing") and recipe.labels.max_length is None
    no_bf16 = training.get("bf16") and has_accelerator() and not supports_bf16()
    dropped_out = model.get("lora_target_parameters") and model.get("lora_dropout") != 0
    only = "peft adapts parameters (lora_target_parameters) without dropout only"
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if model.get(key)), "")
    full = quantized and not model.get("use_peft")
    fsdp, zero = (
        os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")
    )
    zero3 = zero and DeepSpeedPlugin().zero_stage == 3 if zero3 is None else zero3
    on_cpu = training.get("use_cpu") or not torch.cuda.is_available()
    whole = (
        fsdp
        and model.get("load_in_4bit")
        and "float" not in str(model.get("bnb_4bit_quant_storage"))
    )
    not_here = "launch with ddp_cpu, or on GPUs"  # accelerate would train it as plain data parallel without a word
    faults = (
        (
            full,
            quantized,
            "quantized weights cannot be trained, only LoRA on them",
            "set use_peft: true or remove it",
        ),
        (
            evaluates and not has_eval_rows,
            "eval_strategy",
            "there are no eval rows",
            "set eval_split, or remove it",
        ),
        (no_length, "max_length", "packing needs a length", "set max_length"),
        (no_bf16, "bf16", "this accelerator has no bfloat16", "remove it or set fp16: true"),
        (dropped_out, "lora_dropout", only, "set it to 0.0"),
        (
            training.get("fp16") and not torch.cuda.is_available(),
            "fp16",
            "needs a CUDA device",
            "remove it",
        ),
        (fsdp and on_cpu, "launch", "FSDP needs GPUs", not_here),
        (
            zero3 and quantized,
            "launch",
            "ZeRO-3 does not shard quantized weights",
            "launch with ddp or fsdp2_qlora",
        ),
        (
            whole,
            "bnb_4bit_quant_storage",
            "FSDP shards 4-bit weights only if stored as floats",
            "set it to bfloat16",
        ),
    )
    problems = [
        Problem(recipe.name, key, what, fix) for wrong, key, what, fix in faults if wrong
    ] + _dead_keys(recipe)
    if problems:
        raise InputError(problems)
    if recipe.values.get("push_to_hub"):
        require_token()
    if (
        recipe.values.get("gate") is not None
    ):  # bounds stand before the run, so they are read before it
        parse_gate(recipe.values["gate"], recipe.name)
    accumulation_steps(recipe, processes)


def _dead_keys(recipe: Recipe) -> list[Problem]:
    """Keys that other keys leave without effect. What is switched off in so many words is no mistake."""
    off = (False, 0, "no", "none")
    values = {key: value for key, value in recipe.values.items() if value is not None}
    values |= {
        f"evaluation.{key}": value
        for key, value in values.get("evaluation", {}).items()
        if value is not None
    }
    problems = []
    for key in [key for key, value in values.items() if value not in off]:
        idle = [
            switch for switch, states in IDLE.get(key, {}).items() if values.get(switch) in states
        ]
        states = [(values.get(switch), wanted) for switch, wanted in NEEDS.get(key, {}).items()]
        needed = states and not any(
            state in off or (state in wanted if wanted else state) for state, wanted in states
        )
        if idle or needed:
            found = ", ".join(
                f"{switch}: {values.get(switch, 'not set')}" for switch in idle or NEEDS[key]
            )
            fix = f"remove it, or change {' or '.join(idle or NEEDS[key])}"
            problems.append(Problem(recipe.name, key, f"has no effect with {found.lower()}", fix))
    return problems
