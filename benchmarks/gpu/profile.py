"""Where the time of a training step goes: is the device busy, and with what."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import TrainerCallback

from benchmarks.gpu.children import Setting
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    ON_CUDA,
    llama_config,
    make_keys,
    our_trainer,
    random_model,
    rows_for,
    synchronize,
)

SHOWN = 8
LONGEST_NAME = 60


class ProfiledStep(TrainerCallback):
    """Records the optimizer step behind `step` others, and how long it took."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seconds = 0.0
        activities = [ProfilerActivity.CPU]
        self.profiler = torch_profile(
            activities=[*activities, ProfilerActivity.CUDA] if ON_CUDA else activities
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start before the step."""
        if state.global_step == self.step:
            synchronize()
            self.profiler.start()
            self.seconds = -time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the device is done."""
        if state.global_step == self.step + 1:
            synchronize()
            self.seconds += time.perf_counter()
            self.profiler.stop()


def profile(setting: Setting, report: ItemReport) -> None:
    """One padded step of the 1B model: its time, how long the device computed, and in which kernels."""
    shape = setting.shape
    rows = rows_for(shape.padded, shape.steps.total, shape.shortest_row, shape.full.vocabulary)
    keys = make_keys(setting.folder, shape.padded, shape.steps, padding_free=False)
    trainer = our_trainer(random_model(llama_config(shape.full), torch.float32), rows, keys)
    recorded = ProfiledStep(shape.steps.warm_up)
    trainer.add_callback(recorded)
    trainer.train()
    wanted = DeviceType.CUDA if ON_CUDA else DeviceType.CPU
    spent: dict[str, float] = {}
    for event in recorded.profiler.key_averages():
        if event.device_type == wanted:
            taken = event.self_device_time_total if ON_CUDA else event.self_cpu_time_total
            spent[event.key] = spent.get(event.key, 0.0) + taken / 1e3
    busy = sum(spent.values())
    report.number("a step, profiled", 1000 * recorded.seconds, "ms")
    report.number("device computing", busy, "ms")
    report.number("device computing, share", busy / (10 * recorded.seconds), "%")
    slowest = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
    for name in slowest:
        report.number(name[:LONGEST_NAME], spent[name], "ms")
    report.require(busy > 0, "the profiler saw nothing")
