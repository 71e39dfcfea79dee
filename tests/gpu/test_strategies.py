"""What needs a GPU: every strategy, on as many GPUs as there are, trains what one process trains.

`python scripts/gpu_tests.py` runs these and prints a table. None of them was ever run: no GPU was at hand.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
# Eight rows a step are dealt to 1, 2, 4 or 8 processes.
PROCESSES = max((count for count in (1, 2, 4, 8) if count <= GPUS), default=1)

FLOAT32 = {"bf16": False}
# Without dropout, whose random numbers are each rank's own.
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
BF16_LORA = {**LORA, "dtype": "bfloat16", "bf16": True}
QLORA = {**BF16_LORA, "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
PACKED = {"packing": True, "max_length": 128, "dtype": "bfloat16", "bf16": True}
FLASH = {"attn_implementation": "flash_attention_2"}


@dataclass(frozen=True)
class Case:
    """A launch and what it must equal: the same recipe in one process, there with `reference` on top.

    `tolerance` is relative, of the loss at each step; `active` is what every rank has to report.
    """

    config: str
    keys: dict[str, Any]
    active: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    gpus: int = 1
    needs: tuple[str, ...] = ()


# bfloat16 keeps 8 bits of a number: losses near 6 are compared to about one part in a hundred.
CASES = {
    "one GPU, float32, equals the CPU": Case("single", FLOAT32, {"autocast": None}, {"use_cpu": True}),
    "one GPU, LoRA, equals the CPU": Case("single", {**FLOAT32, **LORA}, {"autocast": None}, {"use_cpu": True}),
    "one GPU, bf16": Case("single", {"bf16": True}, {"autocast": "bf16"}, FLOAT32, 1e-2),
    "one GPU, packed": Case("single", PACKED, {"attention": "sdpa"}, {"attn_implementation": "eager"}, 1e-2),
    "one GPU, packed, flash attention": Case(
        "single", {**PACKED, **FLASH}, {"attention": "flash_attention_2"}, {"attn_implementation": "sdpa"}, 1e-2,
        needs=("flash_attn",),
    ),
    "one GPU, QLoRA": Case(
        "single", QLORA, {"four_bit": True}, {"load_in_4bit": None, "bnb_4bit_quant_storage": None}, 5e-2,
        needs=("bitsandbytes",),
    ),
    "DDP, NCCL": Case("ddp", FLOAT32, {"backend": "nccl"}, gpus=2),
    "DDP, LoRA": Case("ddp", {**FLOAT32, **LORA}, {"backend": "nccl"}, gpus=2),
    "DDP, QLoRA": Case("ddp", QLORA, {"backend": "nccl", "four_bit": True}, {}, 1e-2, 2, ("bitsandbytes",)),
    "FSDP2": Case("fsdp2", FLOAT32, {"fsdp": True}),
    "FSDP2, LoRA": Case("fsdp2", {**FLOAT32, **LORA}, {"fsdp": True}),
    "FSDP2, QLoRA": Case("fsdp2_qlora", QLORA, {"fsdp": True, "four_bit": True}, {}, 1e-2, 2, ("bitsandbytes",)),
    "ZeRO-1": Case("zero1", FLOAT32, {"zero": 1}, needs=("deepspeed",)),
    "ZeRO-2": Case("zero2", FLOAT32, {"zero": 2}, needs=("deepspeed",)),
    "ZeRO-3": Case("zero3", FLOAT32, {"zero": 3}, needs=("deepspeed",)),
    "ZeRO-3, LoRA": Case("zero3", {**FLOAT32, **LORA}, {"zero": 3}, needs=("deepspeed",)),
    "ZeRO-3, offload": Case("zero3_offload", FLOAT32, {"zero": 3}, needs=("deepspeed",)),
}  # fmt: skip
SHARDED = ("fsdp2", "zero3", "zero3_offload")


def missing(case: Case) -> str:
    """Why a case cannot run here, or nothing."""
    if case.gpus > GPUS:
        return f"needs {case.gpus} GPU{'s' * (case.gpus > 1)}, found {GPUS}"
    absent = [name for name in case.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def launch(config: str, path: Path, processes: int, *overrides: str) -> None:
    """Run the recipe to its end as `accelerate launch --config_file accelerate_configs/CONFIG.yaml` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", str(REPOSITORY / f"accelerate_configs/{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", str(port)),
        *(str(Path(__file__).with_name("gpu_ranks.py")), "--config", str(path), *overrides),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command,
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{config}: {done.stdout[-1000:]}\n{done.stderr[-4000:]}"


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; the last word counts where a step was logged twice."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def compare(
    case: Case,
    write_recipe: Callable[..., Path],
    folder: Path,
    processes: int,
    active: dict[str, Any],
) -> None:
    """Train with the case's launch and in one process; then take the last steps back and resume them."""
    keys = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 9,
        "global_batch_size": 8,
        **case.keys,
    }
    path = write_recipe(**keys, per_device_train_batch_size=8 // processes)
    launch(case.config, path, processes)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for rank in ranks:
        wanted = {"world_size": processes, **active}
        assert {name: rank[name] for name in wanted} == wanted
        if case.config in SHARDED and processes > 1:
            assert rank["share_held"] == pytest.approx(1 / processes, rel=0.1), (
                "the weights were not sharded"
            )
    run = folder / "run"
    found = losses(run)

    one = write_recipe(
        "one.yaml", **{**keys, **case.reference}, per_device_train_batch_size=8, output_dir="./one"
    )
    launch("single", one, 1)
    expected = losses(folder / "one")
    assert len(expected) >= 2 and found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=case.tolerance)
    assert list(run.glob("*.safetensors")), "no weights were saved"

    # As after a crash: the steps behind the first checkpoint are gone.
    for checkpoint in [path for path in run.glob("checkpoint-*") if path.name != "checkpoint-2"]:
        shutil.rmtree(checkpoint)
    for file in [*run.glob("*.safetensors"), run / "run.lock"]:
        file.unlink(missing_ok=True)
    state = run / "run_state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))
    launch(case.config, path, processes)
    assert losses(run) == pytest.approx(found, rel=case.tolerance), "the resumed steps differ"
    assert list(run.glob("*.safetensors"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_trains_what_one_process_trains(
    name: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The strategy is active on every rank, its losses are those of one process, and a resumed run repeats them."""
    case = CASES[name]
    if reason := missing(case):
        pytest.skip(reason)
    processes = 1 if case.config == "single" else PROCESSES
    compare(case, write_recipe, tmp_path, processes, {"device": "cuda", **case.active})


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("single", 1), ("ddp_cpu", 2)])
def test_the_comparison_itself_works(
    config: str,
    processes: int,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same comparison on CPU, so that the first machine with a GPU does not find faults of the tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    case = Case(config, LORA if processes == 1 else {}, {}, tolerance=1e-5)
    compare(case, write_recipe, tmp_path, processes, {"device": "cpu", "fsdp": False, "zero": None})
