"""What the device can do at best: copying memory, and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.children import Setting
from benchmarks.gpu.flops import published_peak
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import DEVICE, ON_CUDA, synchronize

REPEATS = 10


def ceilings(setting: Setting, report: ItemReport) -> None:
    """Copy bandwidth and matrix product, the product beside what the vendor's data sheet says."""
    report.number("copy, read and written", copy_bandwidth(setting.shape.copy_bytes) / 1e9, "GB/s")
    rate = matmul_rate(setting.shape.matmul)
    kind = "bf16" if ON_CUDA else "float32"
    report.number(f"{setting.shape.matmul}^3 {kind} product", rate / 1e12, "TFLOP/s")
    peak = published_peak(torch.cuda.get_device_name()) if ON_CUDA else None
    if peak is not None:
        report.number("share of the data sheet's peak", 100 * rate / peak, "%")


@dataclass(frozen=True, slots=True)
class Peak:
    """Operations a second at best, and where the number is from."""

    rate: float
    source: str


def peak_of_device(side: int) -> Peak:
    """What MFU is counted against."""
    peak = published_peak(torch.cuda.get_device_name()) if ON_CUDA else None
    if peak is not None:
        return Peak(peak, f"{peak / 1e12:.0f} TFLOP/s, the vendor's data sheet")
    rate = matmul_rate(side)
    return Peak(rate, f"{rate / 1e12:.2f} TFLOP/s, a {side}^3 product measured here")


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes on the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def matmul_rate(side: int) -> float:
    """Operations a second of a square matrix product in the precision that is trained in."""
    dtype = torch.bfloat16 if ON_CUDA else torch.float32
    left = torch.randn(side, side, dtype=dtype, device=DEVICE)
    right = torch.randn(side, side, dtype=dtype, device=DEVICE)
    return 2 * side**3 / best_seconds(lambda: left @ right)


def best_seconds(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ten calls, after one that sets it up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
