"""A stopped run goes on with another number of processes where that is exact, and only there."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_recipes.training.process_count import why_not_exact
from tests.conftest import instruction_rows
from tests.training.killable import Fault, finish, start
from tests.training.tiny import logged, trainer_for

# 40 rows in steps of 8: five whole steps an epoch.
EXACT = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "save_steps": 2,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def stop_and_go_on(path: Path, before: int, now: int, forward: int) -> str:
    """Stop a run of `before` processes by SIGTERM in a forward pass; what `now` processes print when they go on."""
    faults = [Fault("forward", nth=forward, signal=signal.SIGTERM)]
    stopped = start(path, faults=faults, ranks=before)
    assert stopped.wait() == [75] * before, stopped.text()[-3000:]
    return finish(path, ranks=now)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now", "forward"), [(2, 1, 3), (1, 2, 5), (2, 1, 7)])
@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_goes_on_as_if_it_had_not_been_stopped(
    before: int,
    now: int,
    forward: int,
    keys: dict[str, Any],
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Two processes to one, one to two, in the first epoch and the second: losses within 1e-5, weights within 5e-5."""
    write_rows(instruction_rows(40))
    path = write_recipe(**EXACT, **keys)
    printed = stop_and_go_on(path, before, now, forward)
    assert f"goes on with {now} processes instead of {before}" in printed
    finish(path, "--output_dir", str(tmp_path / "whole"))
    losses = logged(tmp_path / "whole")
    assert len(losses) == 10
    assert logged(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    (name,) = [file.name for file in (tmp_path / "whole").glob("*.safetensors")]
    expected = load_file(tmp_path / "whole" / name)
    found = load_file(tmp_path / "run" / name)
    for key in expected:
        assert torch.allclose(found[key], expected[key], atol=5e-5), key


@pytest.mark.slow
def test_what_is_not_exact_is_refused(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """41 rows fill no whole steps: one process does not go on where two stopped, unless it is allowed by name."""
    write_rows(instruction_rows(41))
    path = write_recipe(**EXACT)
    stopped = start(path, faults=[Fault("forward", nth=3, signal=signal.SIGTERM)], ranks=2)
    assert stopped.wait() == [75, 75]
    refused = start(path)
    assert refused.wait() == [2]
    assert "41 rows are no whole number of steps of 8" in refused.text()
    assert "2 processes wrote it, 1 would go on" in refused.text()
    finish(path, "--allow_changed", "world_size")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, ""),
        ({**LORA, "lora_dropout": 0.1}, "drawn by each process"),
        ({"neftune_noise_alpha": 5}, "drawn by each process"),
        ({"global_batch_size": 12}, "no whole number of steps of 12"),
    ],
)
def test_reasons(
    keys: dict[str, Any],
    reason: str,
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Dropout, noise and rows that fill no whole steps are each named; without them nothing is."""
    write_rows(instruction_rows(40))
    trainer = trainer_for(write_recipe(**{**EXACT, **keys}))
    (tmp_path / "optimizer.pt").touch()
    found = why_not_exact(trainer, tmp_path)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED"])
def test_sharded_optimizers_are_named(
    strategy: str,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Under FSDP and DeepSpeed, and from a checkpoint that they wrote, the parts are the reason."""
    trainer = trainer_for(write_recipe())
    assert "saved in parts" in why_not_exact(trainer, tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    assert strategy in why_not_exact(trainer, tmp_path)
