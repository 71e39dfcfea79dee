"""Two gloo ranks on CPU train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import train
from tests.conftest import instruction_rows
from tests.training.tiny import logged

REPOSITORY = Path(__file__).parents[2]
# Without dropout, whose random numbers are each rank's own.
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def launcher(path: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the recipe on two ranks with the shipped CPU config."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", str(REPOSITORY / "accelerate_configs/ddp_cpu.yaml")),
        *(
            "--num_processes",
            "2",
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            str(port),
        ),
        *(str(Path(__file__).with_name("two_ranks.py")), "--config", str(path)),
    ]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command,
        env=variables,
        cwd=path.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(path: Path, break_rank: str = "") -> subprocess.CompletedProcess[str]:
    """Run the recipe on two ranks to its end."""
    with launcher(path, BREAK_RANK=break_rank) as process:
        _, error = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, "", error)


def compare(write_recipe: Callable[..., Path], tmp_path: Path, **keys: Any) -> None:
    """The recipe on two ranks against one process with the same global batch of 8 rows."""
    path = write_recipe(**{"global_batch_size": 8, "per_device_train_batch_size": 4, **keys})
    result = launch(path)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert ranks[0]["weights"] == ranks[1]["weights"], "gradients were not synchronised"
    assert all(rank["fast_loss"] for rank in ranks)
    one = train(load_recipe(path, {"output_dir": str(tmp_path / "one")}))
    losses = logged(one)
    assert len(losses) == 5 and logged(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    expected, found = load_file(one / name), load_file(tmp_path / "run" / name)
    # AdamW divides by the gradient's size, so rounding of near-zero gradients shows in single entries.
    assert all(torch.allclose(found[key], expected[key], atol=5e-5) for key in expected)
    base = load_file(Path(load_recipe(path).model_name) / "model.safetensors")
    assert "use_peft" in keys or any(
        not torch.allclose(expected[key], base[key], atol=1e-3) for key in expected
    )


def test_two_ranks_equal_one_process(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Losses per step within 1e-5, final weights within 5e-5, both ranks with the same weights."""
    compare(write_recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [LORA, {"per_device_train_batch_size": 2}, {"padding_free": False}]
)
def test_more_on_two_ranks(
    write_recipe: Callable[..., Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    """The same for LoRA, for accumulation and for padded batches."""
    compare(write_recipe, tmp_path, **keys)


@pytest.mark.slow
def test_fault_on_one_rank_stops_both(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """An infinite loss on rank 1 alone stops rank 0 before the step, too; the state says exit code 3."""
    path = write_recipe(global_batch_size=8, per_device_train_batch_size=4)
    result = launch(path, break_rank="1")
    assert result.returncode != 0
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 3) and "step 1: the loss" in state[
        "error"
    ]
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.slow
def test_packing_on_two_ranks(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Packed batches on two ranks keep both ranks at the same weights and see every row."""
    write_rows(instruction_rows(80))
    path = write_recipe(packing=True, per_device_train_batch_size=2)
    result = launch(path)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert data["train"]["rows"] == 80
