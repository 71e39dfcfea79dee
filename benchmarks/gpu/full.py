"""Full fine-tuning of a 1B-shaped Llama: padded beside stock TRL, packed under three attentions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.ceilings import Peak, peak_of_device
from benchmarks.gpu.children import Setting
from benchmarks.gpu.flops import FORMULA, mfu
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    LOSS_TOLERANCE,
    ON_CUDA,
    Trajectory,
    free_memory,
    largest_difference,
    llama_config,
    make_keys,
    our_trainer,
    random_model,
    report_memory,
    rows_for,
    run_steps,
    stock_trainer,
    work_of,
)
from benchmarks.gpu.shapes import Batch
from sft_recipes.errors import InputError
from sft_recipes.training.varlen_attention import VARLEN, supports_varlen, use_varlen

FLEX = "flex_attention"
# Kernels add up in other orders, which a gradient's norm shows more than a loss.
NORM_TOLERANCE_OF_KERNELS = 5e-2
GOAL_MFU = 40.0


@dataclass(frozen=True, slots=True)
class PackedCase:
    """Packs of one shape under one kind of attention."""

    batch: Batch
    attention: str

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.attention}, {self.batch.rows} x {self.batch.length}"


def padded(setting: Setting, report: ItemReport) -> None:
    """Ours and stock TRL in turns on the same rows and weights, which must agree."""
    shape = setting.shape
    rows = rows_for(shape.padded, shape.steps.total, shape.shortest_row, shape.full.vocabulary)
    keys = make_keys(setting.folder, shape.padded, shape.steps, padding_free=False)
    sides: dict[str, Callable[..., Any]] = {"ours": our_trainer, "stock TRL": stock_trainer}
    runs: dict[str, list[Trajectory]] = {name: [] for name in sides}
    for _ in range(shape.steps.rounds):
        for name, build in sides.items():
            model = random_model(llama_config(shape.full), torch.float32)
            trainer = build(model, rows, keys)
            runs[name].append(run_steps(trainer, shape.steps))
            del model, trainer
            free_memory()
    rates = {}
    for name, trajectories in runs.items():
        rates[name] = max(run.tokens_per_second for run in trajectories)
        report.number(f"{name}, best of {len(trajectories)}", rates[name], "tokens/s")
    report.goal("ours / stock TRL", rates["ours"] / rates["stock TRL"], "x", at_least=1.0)
    ours, stock = runs["ours"][0], runs["stock TRL"][0]
    report_memory(report, "ours", ours)
    report_memory(report, "stock TRL", stock)
    _bound(report, "losses off stock TRL's", ours.losses, stock.losses, LOSS_TOLERANCE)
    norms = "gradient norms off stock TRL's"
    _bound(report, norms, ours.gradient_norms, stock.gradient_norms, LOSS_TOLERANCE)


def packed(setting: Setting, report: ItemReport) -> None:
    """Packs under each attention, on the same rows and weights; sdpa is the reference.

    flex_attention comes last, since it is compiled first, which can take a minute.
    """
    peak = peak_of_device(setting.shape.matmul)
    report.note("MFU counts", FORMULA)
    report.note("MFU is a share of", peak.source)
    references: dict[Batch, Trajectory] = {}
    for attention in ("sdpa", VARLEN, FLEX):
        for batch in setting.shape.packed:
            case = PackedCase(batch, attention)
            run = _packed_run(setting, report, case, peak)
            if run is None:
                continue
            reference = references.setdefault(batch, run)
            if run is not reference:
                _agree_with_sdpa(report, case, run, reference)


def _packed_run(
    setting: Setting, report: ItemReport, case: PackedCase, peak: Peak
) -> Trajectory | None:
    """A run, or None where this attention cannot run here, which is said."""
    if case.attention == FLEX and not ON_CUDA:
        report.note(case.name, "not on this device: torch has no backward pass of it on CPUs")
        return None
    loaded = FLEX if case.attention == FLEX else "sdpa"
    model = random_model(llama_config(setting.shape.full), torch.float32, loaded)
    if case.attention == VARLEN:
        if why := supports_varlen(model):
            report.note(case.name, f"not on this device: {why}")
            return None
        use_varlen(model)
    try:
        return _measure_packed(setting, report, case, peak, model)
    except Exception as error:
        if case.attention != FLEX or isinstance(error, InputError):
            raise
        # Recipes may ask for it, and never get it unasked.
        text = " ".join(str(error).split())
        report.note(case.name, f"not on this device: {text[:200]}")
        return None
    finally:
        del model
        free_memory()


def _measure_packed(
    setting: Setting, report: ItemReport, case: PackedCase, peak: Peak, model: Any
) -> Trajectory:
    """Train on packs and report speed, memory and MFU.

    The trainer itself raises InputError where rows of a pack see one another.
    """
    shape = setting.shape
    steps, vocabulary = shape.steps, shape.full.vocabulary
    rows = rows_for(
        case.batch, steps.total, shape.shortest_row, vocabulary, longest=shape.padded.length
    )
    trainer = our_trainer(model, rows, make_keys(setting.folder, case.batch, steps, packing=True))
    run = run_steps(trainer, steps)
    report.number(case.name, run.tokens_per_second, "tokens/s")
    report_memory(report, case.name, run)
    share = mfu(work_of(trainer, rows, shape.full), run.tokens_per_second, peak.rate)
    report.goal(f"{case.name}, MFU", share, "%", GOAL_MFU)
    return run


def _agree_with_sdpa(
    report: ItemReport, case: PackedCase, run: Trajectory, sdpa: Trajectory
) -> None:
    _bound(report, f"{case.name}, losses off sdpa's", run.losses, sdpa.losses, LOSS_TOLERANCE)
    _bound(
        report,
        f"{case.name}, gradient norms off sdpa's",
        run.gradient_norms,
        sdpa.gradient_norms,
        NORM_TOLERANCE_OF_KERNELS,
    )


def _bound(
    report: ItemReport,
    name: str,
    values: Sequence[float],
    references: Sequence[float],
    tolerance: float,
) -> None:
    """Report the largest difference; one above the tolerance is wrong."""
    difference = largest_difference(values, references)
    report.number(name, difference, "relative")
    report.require(difference <= tolerance, f"{name}: {difference:.1e}, more than {tolerance}")
