"""What a recipe asks for that would have no effect, or that this machine cannot do: refused before anything is read."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import DeepSpeedPlugin

from sft_recipes.data.chat_templates import load_chat_template
from sft_recipes.devices import accelerator_has_bf16, computes_on_cpu, has_accelerator
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.gate import parse_gate
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_checks import SWITCHED_OFF, states_of, switches_off
from sft_recipes.training.arguments import accumulation_steps
from sft_recipes.training.construction import check_construction
from sft_recipes.training.processes import launched_processes, launched_with

# transformers' name of a kernel on the Hub: owner/repository, perhaps @revision, perhaps :function.
_HUB_KERNEL = re.compile(r"[^/@:]+/[^/@:]+(?:@(?P<revision>[^:]+))?(?::.+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The package behind each flash attention. Without it transformers downloads and runs a kernel instead, if it can.
_FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}


def check_settings(
    recipe: Recipe,
    processes: int | None = None,
    zero3: bool | None = None,
    elsewhere: bool = False,
    allow_hub_kernels: bool = False,
) -> Any:
    """Raise InputError with everything that is wrong with the recipe's settings taken together, or with
    what is made of them. Returns the model that was made to see that, of shapes without weights;
    None in one of several processes, which ask `check_construction` once they have joined.

    `processes` and `zero3` (whether ZeRO-3 shards the weights) describe a planned launch instead of this one;
    `elsewhere`: it is planned for other machines, so what this one lacks is no fault.
    """
    if zero3 is None:
        zero3 = launched_with("DEEPSPEED") and DeepSpeedPlugin().zero_stage == 3
    problems = [*_data_problems(recipe), *_model_problems(recipe, zero3)]
    problems += _attention_problems(recipe, elsewhere, allow_hub_kernels)
    if not elsewhere:
        problems += _device_problems(recipe, processes or launched_processes())
    problems += dead_keys(recipe)
    problems += _output_problems(recipe)
    problems += _template_problems(recipe)
    if problems:
        raise InputError(problems)
    # Bounds stand before the run, so they are read before it.
    if recipe.values.get("gate") is not None:
        parse_gate(recipe.values["gate"], recipe.place("gate"))
    accumulation_steps(recipe, processes)
    if launched_processes() > 1:
        # TRL's arguments make the process group, which `join_processes` has to make first.
        return None
    return check_construction(recipe, processes, elsewhere)


def _data_problems(recipe: Recipe) -> Iterator[Problem]:
    has_eval_rows = recipe.data.test_split or recipe.data.eval_split
    if recipe.training.get("eval_strategy", "no") != "no" and not has_eval_rows:
        fix = "set eval_split, or remove it"
        yield Problem(recipe.place("eval_strategy"), "eval_strategy", "there are no eval rows", fix)
    if recipe.training.get("packing") and recipe.labels.max_length is None:
        yield Problem(
            recipe.place("max_length"), "max_length", "packing needs a length", "set max_length"
        )


def _output_problems(recipe: Recipe) -> Iterator[Problem]:
    """A run folder that cannot be made because a file stands in its way."""
    for path in (recipe.output_dir, *recipe.output_dir.parents):
        # Of os.path: these say no where a folder may not be looked into.
        if os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112
            what = f"{path} is a file, and the run needs a folder"
            yield Problem(recipe.place("output_dir"), "output_dir", what, "name another folder")


def _template_problems(recipe: Recipe) -> Iterator[Problem]:
    """A template that is named and is not there."""
    name = recipe.template.chat_template
    if name is None or name == "tokenizer":
        return
    try:
        load_chat_template(name)
    except InputError as error:
        for problem in error.problems:
            yield dataclasses.replace(problem, where=recipe.place("chat_template"))


def _model_problems(recipe: Recipe, zero3: bool) -> Iterator[Problem]:
    model = recipe.model
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if model.get(key)), "")
    if quantized and not model.get("use_peft"):
        what = "quantized weights cannot be trained, only LoRA on them"
        yield Problem(recipe.place(quantized), quantized, what, "set use_peft: true or remove it")
    if quantized and zero3:
        what = "ZeRO-3 does not shard quantized weights"
        yield Problem(recipe.name, "launch", what, "launch with ddp or fsdp2_qlora")
    stored_as = str(model.get("bnb_4bit_quant_storage"))
    if launched_with("FSDP") and model.get("load_in_4bit") and "float" not in stored_as:
        what = "FSDP shards 4-bit weights only if stored as floats"
        yield Problem(
            recipe.place("bnb_4bit_quant_storage"),
            "bnb_4bit_quant_storage",
            what,
            "set it to bfloat16",
        )
    if model.get("lora_target_parameters") and model.get("lora_dropout") != 0:
        what = "peft adapts parameters (lora_target_parameters) without dropout only"
        yield Problem(recipe.place("lora_dropout"), "lora_dropout", what, "set it to 0.0")


def _device_problems(recipe: Recipe, processes: int) -> Iterator[Problem]:
    training = recipe.training
    on_cpu = computes_on_cpu(recipe)
    has_bf16 = on_cpu or not has_accelerator() or accelerator_has_bf16(recipe)
    if training.get("bf16") and not has_bf16:
        fix = "remove it or set fp16: true"
        yield Problem(recipe.place("bf16"), "bf16", "this accelerator has no bfloat16", fix)
    if training.get("fp16") and not torch.cuda.is_available():
        yield Problem(recipe.place("fp16"), "fp16", "needs a CUDA device", "remove it")
    if training.get("activation_offloading") and on_cpu:
        key = "activation_offloading"
        what = "on a CPU there is no other memory to move activations to"
        yield Problem(recipe.place(key), key, what, "remove it")
    if launched_with("FSDP") and (on_cpu or not torch.cuda.is_available()):
        # accelerate would train it as plain data parallel without a word.
        fix = "launch with ddp_cpu, or on GPUs"
        yield Problem(recipe.name, "launch", "FSDP needs GPUs", fix)
    devices = torch.cuda.device_count()
    if devices > 1 and processes == 1 and not on_cpu:
        what = f"{devices} GPUs are visible to one process, which trains on one of them"
        fix = "use all with `sft-recipes train RECIPE --launch ddp`, or one with CUDA_VISIBLE_DEVICES=0"
        yield Problem("launch", "num_processes", what, fix)


def _attention_problems(
    recipe: Recipe, elsewhere: bool, allow_hub_kernels: bool
) -> Iterator[Problem]:
    name = str(recipe.model.get("attn_implementation"))
    if package := _FLASH_PACKAGES.get(name):
        if not elsewhere and importlib.util.find_spec(package) is None:
            what = f"{package} is not installed here"
            fix = f"pip install {package.replace('_', '-')}, or remove the key: torch has a kernel for packed rows"
            yield Problem(recipe.place("attn_implementation"), "attn_implementation", what, fix)
        return
    kernel = _HUB_KERNEL.fullmatch(name)
    if kernel is None:
        return
    if not _COMMIT.fullmatch(kernel["revision"] or ""):
        what = f"{name!r} is native code from the Hub, and no revision pins it"
        fix = "name the commit, OWNER/REPOSITORY@40_HEX_DIGITS, or remove the key"
        yield Problem(recipe.place("attn_implementation"), "attn_implementation", what, fix)
    elif not allow_hub_kernels:
        what = f"{name!r} is native code that would be downloaded and run"
        fix = "add --allow_hub_kernels to the command if you trust it, or remove the key"
        yield Problem(recipe.place("attn_implementation"), "attn_implementation", what, fix)
    elif not elsewhere and importlib.util.find_spec("kernels") is None:
        what = "kernels, which loads it, is not installed"
        yield Problem(
            recipe.place("attn_implementation"), "attn_implementation", what, "pip install kernels"
        )


def dead_keys(recipe: Recipe) -> list[Problem]:
    """Keys that other keys leave without effect. What is switched off in so many words is no mistake."""
    values: dict[str, Any] = {}
    for key, value in recipe.values.items():
        if value is not None:
            values[key] = value
    for key, value in values.get("evaluation", {}).items():
        if value is not None:
            values[f"evaluation.{key}"] = value
    problems = []
    for key, value in values.items():
        switches = [] if value in SWITCHED_OFF else switches_off(key, values)
        if switches:
            what = f"has no effect with {states_of(switches, values)}"
            fix = f"remove it, or change {' or '.join(switches)}"
            problems.append(Problem(recipe.place(key), key, what, fix))
    return problems
