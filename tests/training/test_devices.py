"""What a run does with the devices it finds: precision, placement, attention, workers, and launches it refuses.

CUDA is pretended where only a decision is looked at; what really needs one is in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import SFTConfig

from sft_recipes import models
from sft_recipes.cli import main as command_line
from sft_recipes.errors import InputError
from sft_recipes.models import model_dtype, placement
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import batching, launch, precision, settings_checks
from sft_recipes.training import train as page
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.batching import set_attention
from sft_recipes.training.checkpoints import sealed_precision
from sft_recipes.training.settings_checks import check_settings
from tests.conftest import build_model
from tests.training.tiny import logged, trainer_for

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there was a CUDA device with bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_a_run_on_the_cpu_keeps_its_precision(
    write_recipe: Callable[..., Path], cuda: None
) -> None:
    """`use_cpu: true` on a machine with a GPU means float32 weights and no autocast; without it, bfloat16."""
    recipe = load_recipe(write_recipe(**LORA, use_cpu=True))
    assert model_dtype(recipe) == "float32"
    assert sft_config(recipe).bf16 is False
    recipe = load_recipe(write_recipe(**LORA))
    assert model_dtype(recipe) == "bfloat16"


def test_weights_are_loaded_where_they_are_used(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cuda: None
) -> None:
    """On CUDA weights go to this process's device at once; on a CPU, and where they are sharded, they do not."""
    device = torch.device("cuda", 3)
    monkeypatch.setattr(models, "PartialState", lambda: SimpleNamespace(device=device))
    recipe = load_recipe(write_recipe())
    assert placement(recipe) == {"": device}
    assert placement(load_recipe(write_recipe(use_cpu=True))) is None
    for strategy in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{strategy}", "true")
            assert placement(recipe) is None


def test_workers_put_batches_together_where_a_device_waits(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loader workers beside an accelerator, none on a CPU, and as many as the recipe says if it says so."""
    assert sft_config(load_recipe(write_recipe())).dataloader_num_workers == 0
    built: dict[str, Any] = {}

    class Recorded(SFTConfig):
        def __init__(self, **keys: Any) -> None:
            built.update(keys)

    monkeypatch.setattr("sft_recipes.training.arguments.SFTConfig", Recorded)
    monkeypatch.setattr("sft_recipes.training.arguments.computes_on_cpu", lambda _: False)
    sft_config(load_recipe(write_recipe()))
    assert built["dataloader_num_workers"] == 2
    sft_config(load_recipe(write_recipe(dataloader_num_workers=5)))
    assert built["dataloader_num_workers"] == 5


def test_several_gpus_need_a_launch(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cuda: None
) -> None:
    """One process that sees four GPUs is refused with both ways on; four processes, and a CPU run, are not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    recipe = load_recipe(write_recipe())
    with pytest.raises(
        InputError, match=r"4 GPUs.*--launch ddp`, or one with CUDA_VISIBLE_DEVICES"
    ):
        check_settings(recipe)
    # The GPUs are not there: what is made on them is not asked for.
    monkeypatch.setattr(settings_checks, "check_construction", lambda *_: None)
    check_settings(recipe, processes=4)
    check_settings(load_recipe(write_recipe(use_cpu=True)))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_cp", "zero3", "multi_node"])
def test_launches_on_gpus_need_one(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A launch config for GPUs is refused where there is none, before anything starts, with one that works here."""
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(InputError, match=rf"{name} launches on GPUs.*--launch \w+_cpu"):
        launch.launch_training(write_recipe(), name, None, ["--use_cpu"])


@pytest.mark.parametrize(
    ("keys", "installed", "attention"),
    [
        ({"bf16": True}, False, "varlen_attn"),
        ({"bf16": True}, True, "flash_attention_2"),
        ({"dtype": "bfloat16", "bf16": False}, False, "varlen_attn"),
        ({"bf16": False}, True, "sdpa"),
        ({"bf16": True, "attn_implementation": "sdpa"}, True, "sdpa"),
    ],
)
def test_attention_on_cuda(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    cuda: None,
    keys: dict[str, Any],
    installed: bool,
    attention: str,
) -> None:
    """Packed rows of 16 bits run in FlashAttention if it is installed, else in torch's kernel; float32 under sdpa."""
    model = build_model(64, hidden_size=64).to(getattr(torch, keys.get("dtype", "float32")))
    switched = []
    monkeypatch.setattr(model, "set_attn_implementation", switched.append)
    monkeypatch.setattr(batching, "is_flash_attn_2_available", lambda: installed)
    set_attention(load_recipe(write_recipe(packing=True, **keys)), model)
    assert (switched or ["sdpa"]) == [attention]


def test_stated_varlen_needs_flattened_batches(write_recipe: Callable[..., Path]) -> None:
    """`attn_implementation: varlen_attn` with padded batches would do nothing, and a model without it says why."""
    path = write_recipe(attn_implementation="varlen_attn", padding_free=False)
    with pytest.raises(InputError, match="attn_implementation: has no effect on padded batches"):
        trainer_for(path)
    capped = build_model(64, attention_dropout=0.1)
    recipe = load_recipe(write_recipe(attn_implementation="varlen_attn", packing=True))
    with pytest.raises(InputError, match=r"varlen_attn: the model drops .* Fix: remove the key"):
        set_attention(recipe, capped)


def test_flash_attention_that_is_not_installed_is_refused(
    write_recipe: Callable[..., Path],
) -> None:
    """Without the package transformers would download a kernel; planned for other machines it is no fault."""
    recipe = load_recipe(write_recipe(attn_implementation="flash_attention_2", packing=True))
    with pytest.raises(InputError, match="flash_attn is not installed here"):
        check_settings(recipe)
    check_settings(recipe, elsewhere=True)


@pytest.mark.parametrize(
    ("name", "allowed", "refusal"),
    [
        ("kernels-community/flash-attn2", False, "no revision pins it.*@40_HEX_DIGITS"),
        ("kernels-community/flash-attn2@main", True, "no revision pins it"),
        (f"kernels-community/flash-attn2@{COMMIT}", False, "Fix: add --allow_hub_kernels"),
        (f"some/kernel@{COMMIT}:attention", False, "Fix: add --allow_hub_kernels"),
        (f"some/kernel@{COMMIT}:attention", True, "pip install kernels"),
    ],
)
def test_kernels_from_the_hub_need_a_pin_and_a_word(
    write_recipe: Callable[..., Path], name: str, allowed: bool, refusal: str
) -> None:
    """Attention that would be downloaded as native code is refused unless pinned and allowed on the command line."""
    recipe = load_recipe(write_recipe(attn_implementation=name))
    with pytest.raises(InputError, match=refusal):
        check_settings(recipe, allow_hub_kernels=allowed)


def test_no_file_can_allow_kernels(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flag reaches the check from the command line, and is an unknown key in a recipe."""
    path = write_recipe(attn_implementation=f"some/kernel@{COMMIT}")
    for flags, said in (
        ([], "add --allow_hub_kernels"),
        (["--allow_hub_kernels"], "install kernels"),
    ):
        for command in ("train", "check"):
            monkeypatch.setattr("sys.argv", ["sft-recipes", command, str(path), *flags])
            with pytest.raises(SystemExit) as ended:
                command_line()
            assert ended.value.code == InputError.exit_code
            assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="allow_hub_kernels: unknown key"):
        load_recipe(write_recipe(allow_hub_kernels=True))


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A CPU on which bfloat16 pays for models of any size; the list gets an entry for each trial."""
    trials: list[bool] = []

    def pays(*_: Any) -> bool:
        trials.append(True)
        return True

    monkeypatch.setattr(precision, "SMALLEST_BF16_MODEL", 0)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(precision, "bfloat16_pays", pays)
    return trials


def test_precision_on_a_cpu(write_recipe: Callable[..., Path], trial: list[bool]) -> None:
    """bfloat16 autocast where a trial says that it pays; a recipe that states a precision is not tried."""
    assert trainer_for(write_recipe()).args.bf16 and len(trial) == 1
    assert not trainer_for(write_recipe(bf16=False)).args.bf16
    assert trainer_for(write_recipe(bf16=True)).args.bf16
    assert not trainer_for(write_recipe(dtype="bfloat16")).args.bf16
    assert len(trial) == 1


def test_losses_under_bfloat16(write_recipe: Callable[..., Path]) -> None:
    """Twelve steps under bf16 autocast have the losses of float32 within the tolerance that the trial states."""
    runs = []
    for bf16 in (True, False):
        trainer = trainer_for(write_recipe(bf16=bf16, num_train_epochs=3))
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=precision.LOSS_TOLERANCE)
    assert runs[0] != runs[1], "autocast did nothing"


def test_what_lora_leaves_alone_is_bfloat16(write_recipe: Callable[..., Path]) -> None:
    """Under bf16 on a CPU frozen weights are bfloat16 and what is trained is float32, with the losses of frozen float32
    weights within the tolerance; a stated dtype is kept, and so are weights of which whole modules are trained."""
    runs = []
    for keys in ({}, {"dtype": "float32"}):
        trainer: Any = trainer_for(write_recipe(**LORA, **keys, bf16=True, num_train_epochs=3))
        dtypes = {True: set(), False: set()}
        for parameter in trainer.model.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)
        frozen = torch.float32 if keys else torch.bfloat16
        assert dtypes == {True: {torch.float32}, False: {frozen}}
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=precision.LOSS_TOLERANCE)
    assert runs[0] != runs[1]
    whole: Any = trainer_for(write_recipe(**LORA, bf16=True, lora_modules_to_save=["lm_head"]))
    assert {parameter.dtype for parameter in whole.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kept", ["quantized", "in parts", "full", "float32", "none"])
def test_weights_that_must_stay_as_they_are(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Quantized weights, DeepSpeed's parts, weights that are trained, and those of a float32 run are left alone."""
    keys: dict[str, Any] = {**LORA, "bf16": True}
    if kept == "quantized":
        keys["load_in_4bit"] = True
    elif kept == "in parts":
        monkeypatch.setattr(precision, "launched_with", lambda name: name == "DEEPSPEED")
    elif kept == "full":
        keys = {"bf16": True}
    elif kept == "float32":
        keys["bf16"] = False
    model = build_model(64)
    precision.settle_frozen_weights(load_recipe(write_recipe(**keys)), model, {})
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {torch.bfloat16 if kept == "none" else torch.float32}


def test_a_real_trial(capsys: pytest.CaptureFixture[str]) -> None:
    """The trial itself runs, leaves no gradient behind, gives a finite verdict and says what it measured."""
    from datasets import Dataset

    model = build_model(64)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5]]})
    assert precision.bfloat16_pays(model, rows) in (True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "512 tokens took" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(
    write_recipe: Callable[..., Path], trial: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first start chose stands in the checkpoint and is used again without a trial; another stated one is
    refused by the key's name.
    """
    path = write_recipe(save_strategy="steps", save_steps=2, num_train_epochs=1)
    recipe = load_recipe(path)
    page.train(recipe)
    assert sealed_precision(recipe.output_dir / "checkpoint-2") == "bf16"
    whole = logged(recipe.output_dir)

    for checkpoint in recipe.output_dir.glob("checkpoint-[!2]*"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    state = recipe.output_dir / "run_state.json"
    state.write_text(state.read_text().replace('"finished"', '"running"'))
    with pytest.raises(InputError, match="bf16"):
        page.train(load_recipe(path, {"bf16": False}))
    monkeypatch.setattr(precision, "bfloat16_pays", lambda *_: pytest.fail("tried again"))
    page.train(recipe)
    assert logged(recipe.output_dir) == whole and len(trial) == 1


def test_stated_varlen_on_cuda_needs_16_bits(write_recipe: Callable[..., Path], cuda: None) -> None:
    """The kernel on CUDA takes no float32: said before the model runs, not by the kernel."""
    keys = {"packing": True, "bf16": False, "attn_implementation": "varlen_attn"}
    with pytest.raises(InputError, match="varlen_attn: its kernel takes numbers of 16 bits"):
        set_attention(load_recipe(write_recipe(**keys)), build_model(64, hidden_size=64))
