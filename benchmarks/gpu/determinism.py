"""Whether a run gives the same weights again, and when it is resumed at half."""

from __future__ import annotations

import hashlib
import shutil
from typing import Any

import torch

from benchmarks.gpu.children import Setting
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
)
from benchmarks.gpu.shapes import Steps

STEPS = Steps(warm_up=0, measured=8, rounds=1)
# So that the state of random numbers matters.
DROPOUT = 0.1


def determinism(setting: Setting, report: ItemReport) -> None:
    """With the settings that a recipe has."""
    _compare(setting, report, full=False)


def full_determinism(setting: Setting, report: ItemReport) -> None:
    """With kernels that are slower and always add up in the same order."""
    _compare(setting, report, full=True)


def _compare(setting: Setting, report: ItemReport, full: bool) -> None:
    rows = rows_for(
        setting.shape.padded,
        STEPS.total,
        setting.shape.shortest_row,
        setting.shape.small.vocabulary,
    )
    hashes = {}
    for name in ("first", "second"):
        shutil.rmtree(setting.folder / name, ignore_errors=True)
        trainer = _trainer(setting, rows, name, full)
        trainer.train()
        hashes[name] = weights_hash(trainer.model)
        del trainer
        free_memory()
    trainer = _trainer(setting, rows, "resumed", full)
    half = setting.folder / "first" / f"checkpoint-{STEPS.total // 2}"
    trainer.train(resume_from_checkpoint=str(half))
    hashes["resumed"] = weights_hash(trainer.model)
    start = weights_hash(random_model(_config(setting), torch.float32))
    for name, value in hashes.items():
        report.note(f"sha256 of the weights, {name}", value[:16])
    same = hashes["second"] == hashes["first"]
    resumed = hashes["resumed"] == hashes["first"]
    report.equal("a second run", same)
    report.equal("resumed at half", resumed)
    report.require(start not in hashes.values(), "training changed no weight")
    if not ON_CUDA:  # there it is promised
        report.require(same, "two runs on a CPU differ")
        report.require(resumed, "a resumed run on a CPU differs")


def _config(setting: Setting) -> Any:
    return llama_config(setting.shape.small, attention_dropout=DROPOUT)


def _trainer(setting: Setting, rows: Rows, name: str, full: bool) -> Any:
    """A trainer that writes one checkpoint, at half of its steps, into a folder called `name`."""
    keys = make_keys(
        setting.folder,
        setting.shape.padded,
        STEPS,
        output_dir=str(setting.folder / name),
        padding_free=False,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=STEPS.total // 2,
        full_determinism=full,
    )
    return our_trainer(random_model(_config(setting), torch.float32), rows, keys)


def weights_hash(model: Any) -> str:
    """sha256 over all weights, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
