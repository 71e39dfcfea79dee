"""What needs a GPU: every strategy, on as many GPUs as there are, trains what one process trains.

`python scripts/gpu_tests.py` runs these and prints a table; docs/gpu.md has one of an H200. On two GPUs: never run.
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

from sft_recipes.evaluation.generation import generate
from tests.conftest import build_model, build_tokenizer

REPOSITORY = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
# Eight rows a step are dealt to 1, 2, 4 or 8 processes.
PROCESSES = max((count for count in (1, 2, 4, 8) if count <= GPUS), default=1)

# Under LoRA the frozen base is bfloat16 on a GPU unless the recipe says otherwise.
FLOAT32 = {"bf16": False, "dtype": "float32"}
# Without dropout, whose random numbers are each rank's own.
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
BF16_LORA = {**LORA, "dtype": "bfloat16", "bf16": True}
QLORA = {**BF16_LORA, "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
NOT_QUANTIZED = {"load_in_4bit": None, "bnb_4bit_quant_storage": None}
BF16 = {"dtype": "bfloat16", "bf16": True}
PACKED = {**BF16, "packing": True, "max_length": 128, "num_train_epochs": 4}
FLATTENED = {**BF16, "padding_free": True}
VARLEN = {"attn_implementation": "varlen_attn"}
SDPA = {"attn_implementation": "sdpa"}
EAGER = {"attn_implementation": "eager"}
FLASH = {"attn_implementation": "flash_attention_2"}
EVALUATED = {
    "eval_split": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "evaluation": {"max_new_tokens": 4, "max_share": None},
}


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
ROUNDED = 1e-2
QUANTIZED = 5e-2
ONE_GPU = {
    "one GPU, float32, equals the CPU": Case(
        "single", FLOAT32, {"autocast": None, "workers": 2}, {"use_cpu": True}
    ),
    "one GPU, LoRA, equals the CPU": Case(
        "single", {**FLOAT32, **LORA}, {"autocast": None}, {"use_cpu": True}
    ),
    "one GPU, LoRA, base in bf16": Case(
        "single", LORA, {"autocast": "bf16", "dtype": "bfloat16"}, FLOAT32, ROUNDED
    ),
    "one GPU, bf16": Case("single", {"bf16": True}, {"autocast": "bf16"}, FLOAT32, ROUNDED),
    "one GPU, evaluated on the way": Case(
        "single", {**EVALUATED, **FLOAT32}, {"autocast": None}, {"use_cpu": True}
    ),
    "one GPU, packed, varlen": Case(
        "single", {**PACKED, **VARLEN}, {"attention": "varlen_attn"}, SDPA, ROUNDED
    ),
    "one GPU, flattened, varlen": Case(
        "single", {**FLATTENED, **VARLEN}, {"attention": "varlen_attn"}, SDPA, ROUNDED
    ),
    "one GPU, packed, varlen, LoRA": Case(
        "single", {**PACKED, **LORA, **VARLEN}, {"attention": "varlen_attn"}, SDPA, ROUNDED
    ),
    "one GPU, packed, varlen under autocast": Case(
        "single",
        {**PACKED, **VARLEN, "dtype": "float32"},
        {"attention": "varlen_attn", "dtype": "float32"},
        SDPA,
        ROUNDED,
    ),
    "one GPU, packed, sdpa": Case(
        "single", {**PACKED, **SDPA}, {"attention": "sdpa"}, EAGER, ROUNDED
    ),
    "one GPU, QLoRA": Case(
        "single", QLORA, {"four_bit": True}, NOT_QUANTIZED, QUANTIZED, needs=("bitsandbytes",)
    ),
}
STRATEGIES = {
    "DDP, NCCL": Case("ddp", FLOAT32, {"backend": "nccl"}, gpus=2),
    "DDP, LoRA": Case("ddp", {**FLOAT32, **LORA}, {"backend": "nccl"}, gpus=2),
    "DDP, packed, varlen": Case(
        "ddp", {**PACKED, **VARLEN}, {"attention": "varlen_attn"}, SDPA, ROUNDED, gpus=2
    ),
    "DDP, QLoRA": Case(
        "ddp",
        QLORA,
        {"backend": "nccl", "four_bit": True},
        {},
        ROUNDED,
        gpus=2,
        needs=("bitsandbytes",),
    ),
    "FSDP2": Case("fsdp2", FLOAT32, {"fsdp": True}),
    "FSDP2, LoRA": Case("fsdp2", {**FLOAT32, **LORA}, {"fsdp": True}),
    "FSDP2, packed, varlen": Case(
        "fsdp2", {**PACKED, **VARLEN}, {"fsdp": True, "attention": "varlen_attn"}, SDPA, ROUNDED
    ),
    "FSDP2, QLoRA": Case(
        "fsdp2_qlora",
        QLORA,
        {"fsdp": True, "four_bit": True},
        {},
        ROUNDED,
        gpus=2,
        needs=("bitsandbytes",),
    ),
    "FSDP2, context parallel": Case(
        "fsdp2_cp", {**FLOAT32, **SDPA, "padding_free": False}, {"fsdp": True}, gpus=2
    ),
    "ZeRO-1": Case("zero1", FLOAT32, {"zero": 1}, needs=("deepspeed",)),
    "ZeRO-2": Case("zero2", FLOAT32, {"zero": 2}, needs=("deepspeed",)),
    "ZeRO-3": Case("zero3", FLOAT32, {"zero": 3}, needs=("deepspeed",)),
    "ZeRO-3, LoRA": Case("zero3", {**FLOAT32, **LORA}, {"zero": 3}, needs=("deepspeed",)),
}
# What compiles native code at its first use, or is built for few machines, comes last.
RISKY = {
    "one GPU, packed, flash attention": Case(
        "single",
        {**PACKED, **FLASH},
        {"attention": "flash_attention_2"},
        SDPA,
        ROUNDED,
        needs=("flash_attn",),
    ),
    "ZeRO-3, offload": Case("zero3_offload", FLOAT32, {"zero": 3}, needs=("deepspeed",)),
}
CASES = {**ONE_GPU, **STRATEGIES, **RISKY}
SHARDED = ("fsdp2", "fsdp2_cp", "zero3", "zero3_offload")


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
        *(("--parallelism_config_dp_shard_size", str(processes // 2)) * (config == "fsdp2_cp")),
        *(str(Path(__file__).with_name("gpu_ranks.py")), "--config", str(path), *overrides),
    ]
    # Behind what is there: an offline machine may find its packages by it.
    paths = [os.environ.get("PYTHONPATH", ""), str(REPOSITORY)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if processes == 1 and GPUS > 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
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


def take_back(run: Path) -> None:
    """As after a crash: the steps behind the first checkpoint are gone."""
    for checkpoint in run.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    for file in [*run.glob("*.safetensors"), run / "run.lock"]:
        file.unlink(missing_ok=True)
    state = run / "run_state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))


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

    take_back(run)
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


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason="needs 1 GPU, found 0")
@pytest.mark.parametrize("keys", [FLOAT32, {**PACKED, **VARLEN}], ids=["float32", "packed, varlen"])
def test_resumed_bit_for_bit(
    keys: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With `full_determinism: true` the weights of a resumed run are those of the uninterrupted one, bit for bit."""
    path = write_recipe(**keys, full_determinism=True, save_strategy="steps", save_steps=2)
    launch("single", path, 1)
    run = tmp_path / "run"
    before = (run / "model.safetensors").read_bytes()
    take_back(run)
    launch("single", path, 1)
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason="needs 1 GPU, found 0")
def test_answers_of_a_batch_that_did_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Where 4,096 prompts do not fit into a hundredth of the memory, all are answered, as one by one."""
    model = build_model(400, hidden_size=256, num_hidden_layers=8, max_position_embeddings=2048)
    model = model.to("cuda")
    tokenizer = build_tokenizer()
    prompts = [[3 + index % 300, 5, 7] * 100 for index in range(4096)]
    settings: dict[str, Any] = {"stop_ids": [1], "max_new_tokens": 2, "progress": False}
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        answers = generate(model, tokenizer, prompts, batch_size=4096, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "did not fit into memory" in capsys.readouterr().out
    for prompt, answer in list(zip(prompts, answers, strict=True))[::1024]:
        assert generate(model, tokenizer, [prompt], batch_size=1, **settings) == [answer]


PACKED_IN_FLOAT32 = {"packing": True, "max_length": 128, "num_train_epochs": 4, "bf16": False}
ON_CPU = {
    "LoRA": Case("single", LORA, {}, tolerance=1e-5),
    "two processes": Case("ddp_cpu", {}, {}, tolerance=1e-5, gpus=2),
    "evaluated on the way": Case("single", EVALUATED, {}, tolerance=1e-5),
    "packed": Case("single", PACKED_IN_FLOAT32, {"attention": "varlen_attn"}, SDPA, 1e-5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_the_comparison_itself_works(
    name: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same comparison on CPU, so that the first machine with a GPU does not find faults of the tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    case = ON_CPU[name]
    active = {"device": "cpu", "fsdp": False, "zero": None, **case.active}
    compare(case, write_recipe, tmp_path, case.gpus, active)
