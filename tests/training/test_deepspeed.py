"""ZeRO on two CPU ranks trains what one process trains; a launch that would not do what it says is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import checkpoints, settings_checks
from sft_recipes.training.settings_checks import check_settings
from sft_recipes.training.train import train
from tests.training.tiny import logged

REPOSITORY = Path(__file__).parents[2]
# Without dropout, whose random numbers are each rank's own.
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
QLORA = {**LORA, "load_in_4bit": True, "dtype": "bfloat16"}
MISSING = [
    name
    for name, found in {
        "deepspeed": importlib.util.find_spec("deepspeed"),
        "g++": shutil.which("g++"),
        "ninja": shutil.which("ninja"),
    }.items()
    if not found
]
# DeepSpeed compiles its CPU communication at the first start on a machine: about 45 s.
needs_deepspeed = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def launch(config: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe on two ranks with a shipped config."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", str(REPOSITORY / f"accelerate_configs/{config}.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
        *(str(Path(__file__).with_name("zero_ranks.py")), "--config", str(path)),
    ]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command,
        env=variables,
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank noted."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a run folder, model or adapter."""
    return load_file(next(folder.glob("*.safetensors")))


def assert_fresh_process_loads(run: Path) -> None:
    """A new process, without DeepSpeed, loads the saved model with exactly the saved weights."""
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from peft import get_peft_model_state_dict\n"
        "from sft_recipes.models import load_for_inference\n"
        "model, run = load_for_inference(sys.argv[1]).model, sys.argv[1]\n"
        "lora = hasattr(model, 'peft_config')\n"
        "found = get_peft_model_state_dict(model) if lora else model.state_dict()\n"
        "saved = load_file(f'{run}/adapter_model.safetensors' if lora else f'{run}/model.safetensors')\n"
        "assert saved.keys() <= found.keys(), saved.keys() - found.keys()\n"
        "assert all(torch.equal(found[name].float(), one.float()) for name, one in saved.items())\n"
    )
    command = [sys.executable, "-c", script, str(run)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(
    stage: int, keys: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Losses per step within 1e-5 of one process with the same 8 rows a step, saved weights within 5e-5; the stage
    asked for is the one that ran; the save loads in a fresh process; a resumed run ends bit-equal.
    """
    rows = {
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    path = write_recipe(**rows, **keys)
    result = launch(f"zero{stage}_cpu", path)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    for rank in ranks(tmp_path):
        assert (rank["engine"], rank["stage"], rank["world_size"]) == ("DeepSpeedEngine", stage, 2)
        assert rank["fast_loss"]
        # Stage 3 leaves each rank half of every weight, rounded up.
        assert rank["elements_held"] == pytest.approx(
            rank["elements"] / (2 if stage == 3 else 1), rel=0.01
        )
    assert ranks(tmp_path)[0]["weights"] == ranks(tmp_path)[1]["weights"], (
        "the ranks ended with different weights"
    )

    one = train(load_recipe(path, {"output_dir": str(tmp_path / "one")}))
    losses = logged(one)
    assert len(losses) == 5 and logged(run) == pytest.approx(losses, rel=1e-5)
    expected, found = saved(one), saved(run)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=5e-5) for name in expected)
    start = saved(Path(load_recipe(path).model_name))
    assert any(
        not torch.allclose(one, start.get(name, torch.zeros(())), atol=1e-3)
        for name, one in found.items()
    )
    assert_fresh_process_loads(run)

    trained = logged(run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-5")
    next(run.glob("*.safetensors")).unlink()
    state = run / "run_state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))
    result = launch(f"zero{stage}_cpu", path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert logged(run) == trained, "it did not go on after step 2"
    resumed = saved(run)
    assert all(torch.equal(resumed[name], found[name]) for name in found)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_stage(stage: int, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA that goes on from an earlier run begins on both ranks where that ended, and trains what one process does."""
    rows = {"global_batch_size": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    path = write_recipe(**rows, use_peft=True)
    first = train(load_recipe(path, {**LORA, "output_dir": str(tmp_path / "first")}))
    path = write_recipe(**rows, use_peft=True, adapter_name_or_path=str(first))
    result = launch(f"zero{stage}_cpu", path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert ranks(tmp_path)[0]["weights"] == ranks(tmp_path)[1]["weights"]
    one = train(load_recipe(path, {"output_dir": str(tmp_path / "one")}))
    run = tmp_path / "run"
    assert logged(run) == pytest.approx(logged(one), rel=1e-5)
    assert logged(run)[0] < logged(first)[0]
    expected, found = saved(one), saved(run)
    assert all(torch.allclose(found[name], expected[name], atol=5e-5) for name in expected)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "value"), [(2, "inf"), (3, "nan")])
def test_fault_on_one_rank_stops_both(
    stage: int, value: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A loss that is not finite on rank 1 alone stops both ranks at that step, and nothing is saved."""
    path = write_recipe(global_batch_size=8, per_device_train_batch_size=4)
    result = launch(f"zero{stage}_cpu", path, BREAK_RANK="1", BREAK_WITH=value)
    assert result.returncode != 0
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 3) and "step 1: the loss" in state[
        "error"
    ]
    # DeepSpeed steps within backward(), so the guard speaks after the first step and before a second.
    assert [rank["steps_of_engine"] for rank in ranks(tmp_path)] == [1, 1]
    assert not list((tmp_path / "run").rglob("*.safetensors"))


FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str, str]] = {
    "fsdp on cpu": (FSDP, {}, "launch", "ddp_cpu"),
    "qlora with zero3": (ZERO3, QLORA, "launch", "ddp or fsdp2_qlora"),
    "8 bit with zero3": (ZERO3, {**LORA, "load_in_8bit": True}, "launch", "ddp or fsdp2_qlora"),
    "qlora with fsdp, integer storage": (FSDP, QLORA, "bnb_4bit_quant_storage", "bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_launch_that_would_do_something_else_is_refused(
    case: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate would train in another way, silently, is refused with a launch that works."""
    environment, keys, key, fix = REFUSED[case]
    recipe = load_recipe(write_recipe(**keys))
    check_settings(recipe)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refusal:
        check_settings(recipe)
    assert any(problem.field == key and fix in problem.fix for problem in refusal.value.problems)


ALLOWED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "qlora with zero2": ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, QLORA),
    "lora": (ZERO3, LORA),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_launch_that_works_is_not_refused(
    case: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized recipes run under ZeRO-2, others under ZeRO-3."""
    environment, keys = ALLOWED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # DeepSpeed itself need not be installed here.
    monkeypatch.setattr(settings_checks, "check_construction", lambda *_: None)
    check_settings(load_recipe(write_recipe(**keys)))


@pytest.mark.parametrize(
    "optimizer",
    [
        "optimizer.pt",
        "optimizer.bin",
        "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
def test_checkpoints_of_every_strategy_are_complete(optimizer: str, tmp_path: Path) -> None:
    """A checkpoint is taken for complete with the optimizer states as its strategy names them."""
    names = (
        "trainer_state.json",
        "scheduler.pt",
        "rng_state_0.pth",
        "model.safetensors",
        optimizer,
    )
    for path in (tmp_path / "checkpoint-2" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    checkpoints.seal(tmp_path / "checkpoint-2", {})
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
