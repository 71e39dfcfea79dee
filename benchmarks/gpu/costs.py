"""What rows as arrays, workers and the counting of rows cost, one switched off at a time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.children import Setting
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    Rows,
    free_memory,
    llama_config,
    make_keys,
    our_trainer,
    random_model,
    rows_for,
    run_steps,
)
from benchmarks.gpu.shapes import Steps

# A step of the small model is short, and differences are shorter.
TIMES_THE_STEPS = 4
COLLATIONS = 10


@dataclass(frozen=True, slots=True)
class Switches:
    """A run's machinery: rows as arrays or lists, processes that load batches, rows counted."""

    numpy: bool = True
    workers: int = 2
    count: bool = True


ALL_ON = Switches()
ONE_OFF = {
    "lists instead of arrays": Switches(numpy=False),
    "no workers": Switches(workers=0),
    "rows not counted": Switches(count=False),
    "all on again, which is noise": ALL_ON,
}


def costs(setting: Setting, report: ItemReport) -> None:
    """Milliseconds of collating a batch, and of a training step of a small model."""
    shape = setting.shape
    steps = Steps(shape.steps.warm_up, shape.steps.measured * TIMES_THE_STEPS, rounds=1)
    rows = rows_for(shape.padded, steps.total, shape.shortest_row, shape.small.vocabulary)
    before = step_ms(setting, rows, steps, ALL_ON)
    report.number("step: arrays, 2 workers, rows counted", before, "ms")
    for name, switches in ONE_OFF.items():
        now = step_ms(setting, rows, steps, switches)
        report.number(f"step: {name}", now, "ms")
        report.number(f"step: {name}, difference", now - before, "ms")
    for packing in (False, True):
        for numpy in (False, True):
            kind = "arrays" if numpy else "lists"
            batching = "packed" if packing else "padded"
            value = collation_ms(setting, rows, steps, numpy, packing)
            report.number(f"collating {kind}, {batching}", value, "ms")


def step_ms(setting: Setting, rows: Rows, steps: Steps, switches: Switches) -> float:
    """Milliseconds of the median training step."""
    trainer = small_trainer(setting, rows, steps, switches, packing=False)
    value = run_steps(trainer, steps).step_ms
    del trainer
    free_memory()
    return value


def collation_ms(setting: Setting, rows: Rows, steps: Steps, numpy: bool, packing: bool) -> float:
    """Milliseconds of reading a batch's rows and putting them together, here; the median."""
    trainer = small_trainer(setting, rows, steps, Switches(numpy, 0, False), packing)
    dataset = trainer.train_dataset
    count = min(setting.shape.padded.rows, len(dataset))
    seconds = []
    for _ in range(COLLATIONS):
        started = time.perf_counter()
        trainer.data_collator([dataset[index] for index in range(count)])
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def small_trainer(
    setting: Setting, rows: Rows, steps: Steps, switches: Switches, packing: bool
) -> Any:
    """A trainer of the small model on padded batches, or on packs."""
    shape = setting.shape
    batching = {"packing": True} if packing else {"padding_free": False}
    keys = make_keys(
        setting.folder,
        shape.padded,
        steps,
        activation_checkpointing=False,
        dataloader_num_workers=switches.workers,
        **batching,
    )
    model = random_model(llama_config(shape.small), torch.float32)
    return our_trainer(model, rows, keys, numpy=switches.numpy, count=switches.count)
