"""What `check` says a run will take of the device's memory, and what it takes.

For CPUs `benchmarks/memory.py` measures more closely.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.children import Setting
from benchmarks.gpu.lora import frozen_base, lora_keys, lora_rows
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    ON_CUDA,
    Rows,
    free_memory,
    llama_config,
    make_keys,
    our_trainer,
    random_model,
    rows_for,
    run_steps,
)
from benchmarks.gpu.shapes import ModelShape, Steps
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.check import largest_batch, plan_layout, quantized_width
from sft_recipes.training.construction import meta_model
from sft_recipes.training.memory import estimate_memory

# The optimizer's states are there from the second step on.
STEPS = Steps(warm_up=1, measured=1, rounds=1)
WANTED_WITHIN = 0.25
GIGA = 1e9
STATUS = Path("/proc/self/status")


def memory(setting: Setting, report: ItemReport) -> None:
    """The estimate beside the peak, for the shapes of the items `padded` and `lora`."""
    shape = replace(setting.shape, steps=STEPS)
    setting = replace(setting, shape=shape)
    keys = make_keys(setting.folder, shape.padded, STEPS, padding_free=False)
    rows = rows_for(shape.padded, STEPS.total, shape.shortest_row, shape.full.vocabulary)
    rows = one_batch(rows, shape.padded.rows)
    model = random_model(llama_config(shape.full), torch.float32)
    _compare(report, "1B, full, padded", model, shape.full, rows, keys)
    del model
    free_memory()
    keys = lora_keys(setting)
    model = frozen_base(shape, keys, report, "8B, LoRA, packed")
    _compare(report, "8B, LoRA, packed", model, shape.lora, lora_rows(shape), keys)


def one_batch(rows: Rows, count: int) -> Rows:
    """The first rows only: every step trains the same batch then, the longest row in it."""
    dataset = rows.dataset.select(range(count))
    longest = max(len(ids) for ids in dataset["input_ids"])
    return Rows(dataset, rows.fingerprints[:count], longest)


def _compare(
    report: ItemReport,
    name: str,
    model: Any,
    shape: ModelShape,
    rows: Rows,
    keys: Mapping[str, Any],
) -> None:
    """Train for two steps and report the peak beside the estimate."""
    llama_config(shape).save_pretrained(keys["model_name_or_path"])  # `check` reads no more of it
    estimate = estimated_peak(keys, rows)
    report.number(f"{name}, estimate of check", estimate / GIGA, "GB")
    before = resident_bytes("VmRSS")
    peak = run_steps(our_trainer(model, rows, keys), STEPS).peak_bytes
    if ON_CUDA:
        report.number(f"{name}, measured peak", peak / GIGA, "GB")
        report.near(f"{name}, estimate / peak", estimate, peak, WANTED_WITHIN)
    elif before is None:
        report.note(f"{name}, measured peak", "not on this device")
    else:
        grown = (resident_bytes("VmHWM") or before) - before
        report.number(f"{name}, growth (no comparison)", grown / GIGA, "GB")


def estimated_peak(keys: Mapping[str, Any], rows: Rows) -> int:
    """Bytes of a device at the peak, as `check` plans them."""
    recipe = make_recipe(keys)
    config = sft_config(recipe)
    model = meta_model(recipe)
    batch = largest_batch(rows.dataset, rows.longest, config, plan_layout(recipe, model))
    return estimate_memory(model, config, batch, quantized=quantized_width(recipe)).peak


def resident_bytes(name: str) -> int | None:
    """Main memory of this process: VmRSS now, VmHWM at most; None where the kernel is silent."""
    if not STATUS.is_file():
        return None
    line = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.M)
    return int(line[1]) * 1024 if line else None
