"""LoRA on an 8B-shaped Llama with a frozen bfloat16 base, and on one of four bits a weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.ceilings import Peak, peak_of_device
from benchmarks.gpu.children import Setting
from benchmarks.gpu.flops import FORMULA, mfu
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    DEVICE,
    ON_CUDA,
    Rows,
    Trajectory,
    free_memory,
    llama_config,
    make_keys,
    our_trainer,
    random_model,
    report_memory,
    rows_for,
    run_steps,
    work_of,
)
from benchmarks.gpu.shapes import Shape
from sft_recipes.models import keep_4bit_layers_in_place
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.training.batching import set_attention

BASE_DTYPE = "bfloat16" if ON_CUDA else "float32"
LORA_KEYS: Mapping[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "dtype": BASE_DTYPE,
    "packing": True,
}
# NeMo Automodel, Llama-3-8B, LoRA, one H100, 4,096 tokens. torchtitan trains all weights of an 8B
# model at 33 to 39 % MFU there.
ANCHOR_DEVICE = "H100"
ANCHOR_TOKENS_PER_SECOND = 12_473
ANCHOR_MFU = 41
GOAL_TOKENS_PER_SECOND = 0.95 * ANCHOR_TOKENS_PER_SECOND
GOAL_MFU = 40.0


def lora(setting: Setting, report: ItemReport) -> None:
    """Packs of one length, with and without activation checkpointing, beside the published rate."""
    peak = peak_of_device(setting.shape.matmul)
    published = f"{ANCHOR_TOKENS_PER_SECOND:,} tokens/s, {ANCHOR_MFU} % MFU"
    report.note(f"published, {ANCHOR_DEVICE}, NeMo Automodel", published)
    report.note("MFU counts", FORMULA)
    report.note("MFU is a share of", peak.source)
    rates = []
    for checkpointing in (True, False):
        how = f"checkpointing {'on' if checkpointing else 'off'}"
        try:
            rates.append(_lora_run(setting, report, how, checkpointing, peak))
        except torch.cuda.OutOfMemoryError:
            report.note(how, "out of memory")
        free_memory()
    report.require(bool(rates), "neither fits into memory")
    if rates and ON_CUDA and ANCHOR_DEVICE in torch.cuda.get_device_name():
        report.goal("the faster of both", max(rates), "tokens/s", GOAL_TOKENS_PER_SECOND)


def _lora_run(
    setting: Setting, report: ItemReport, how: str, checkpointing: bool, peak: Peak
) -> float:
    """Tokens a second."""
    shape = setting.shape
    keys = lora_keys(setting, activation_checkpointing=checkpointing)
    model = frozen_base(shape, keys, report, how)
    rows = lora_rows(shape)
    trainer = our_trainer(model, rows, keys)
    run = run_steps(trainer, shape.steps)
    report.number(how, run.tokens_per_second, "tokens/s")
    share = mfu(work_of(trainer, rows, shape.lora), run.tokens_per_second, peak.rate)
    report.goal(f"{how}, MFU", share, "%", GOAL_MFU)
    _finish(report, how, run)
    return run.tokens_per_second


def qlora(setting: Setting, report: ItemReport) -> None:
    """The same shape in bitsandbytes' NF4, with activation checkpointing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        report.skip("not installed: bitsandbytes")
        return
    keys = lora_keys(setting, activation_checkpointing=True)
    model = frozen_base(setting.shape, keys, report, "QLoRA")
    report.number("layers of 4 bits a weight", to_nf4(model))
    free_memory()  # the peak is to be that of training, not of making the weights
    trainer = our_trainer(model, lora_rows(setting.shape), keys)
    run = run_steps(trainer, setting.shape.steps)
    report.number("QLoRA", run.tokens_per_second, "tokens/s")
    _finish(report, "QLoRA", run)


def _finish(report: ItemReport, how: str, run: Trajectory) -> None:
    report_memory(report, how, run)
    report.require(run.gradient_norms[0] > 0, f"{how}: no gradient reaches the adapter")


def lora_keys(setting: Setting, **others: Any) -> dict[str, Any]:
    """The keys of a LoRA run on packs; `others` are more of them."""
    shape = setting.shape
    return make_keys(setting.folder, shape.lora_batch, shape.steps, **LORA_KEYS, **others)


def lora_rows(shape: Shape) -> Rows:
    """Rows for a LoRA run."""
    steps, vocabulary = shape.steps.total, shape.lora.vocabulary
    return rows_for(
        shape.lora_batch, steps, shape.shortest_row, vocabulary, longest=shape.padded.length
    )


def frozen_base(shape: Shape, keys: Mapping[str, Any], report: ItemReport, how: str) -> Any:
    """The base, with the attention that a recipe of these keys gets here."""
    model = random_model(llama_config(shape.lora), getattr(torch, BASE_DTYPE))
    set_attention(make_recipe(keys), model)
    report.note(f"{how}, attention", model.config._attn_implementation)
    return model


def to_nf4(model: Any) -> int:
    """Quantize the linear layers in place, as a load in 4 bits does: all but the output layer.

    Returns how many there are.
    """
    import bitsandbytes as bnb

    linear = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    ]
    for name in linear:
        layer = model.get_submodule(name)
        replacement = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=getattr(torch, BASE_DTYPE),
            quant_type="nf4",
            device="meta",
        )
        weight: Any = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        replacement.weight = weight.to(DEVICE)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    keep_4bit_layers_in_place(model)
    model.is_loaded_in_4bit = True  # by this TRL and PEFT know
    return len(linear)
