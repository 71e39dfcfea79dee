"""A run goes on from the weights of an earlier one: two stages train what one longer run trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_recipes.errors import InputError
from sft_recipes.evaluation.open_run import model_before
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.export import export
from sft_recipes.training.check import check_recipe, check_text
from sft_recipes.training.train import main, train
from tests.conftest import instruction_rows
from tests.training.test_checkpoints import interrupted_run
from tests.training.test_two_processes import compare
from tests.training.tiny import logged

ADAPTER = "adapter_model.safetensors"
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
# Without a memory, at one rate and in the order of the file: a step depends on nothing but weights and rows.
MEMORYLESS = {
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 4,
}
START_KEYS = ("model_name_or_path", "adapter_name_or_path")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("model_name_or_path", {}),
    "lora": ("adapter_name_or_path", LORA),
    "dora": ("adapter_name_or_path", {**LORA, "use_dora": True}),
}


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> Path:
    """A recipe of memoryless steps; 32 rows stand in whole.jsonl, their halves in one.jsonl and two.jsonl."""
    rows = instruction_rows(32)
    write_rows(rows, "whole.jsonl")
    write_rows(rows[:16], "one.jsonl")
    write_rows(rows[16:], "two.jsonl")
    return write_recipe(dataset_name="./whole.jsonl", **MEMORYLESS)


def trained(path: Path, name: str, **keys: Any) -> Path:
    """The recipe on the rows of this name, in a run folder of this name."""
    folder = path.parent
    here = {
        "dataset_name": str(folder / f"{name.partition('-')[0]}.jsonl"),
        "output_dir": str(folder / name),
    }
    return train(load_recipe(path, {**here, **keys}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def largest_difference(left: Path, right: Path) -> float:
    """Of any weight of two runs."""
    here = weights(left)
    there = weights(right)
    assert here.keys() == there.keys()
    return max(float((here[name] - there[name]).abs().max()) for name in here)


def stages(run: Path) -> list[tuple[Any, ...]]:
    """Run, rows and steps of the stages before a run, as its data.json has them."""
    data = json.loads((run / "data.json").read_text())
    return [
        (Path(stage["run"]).name, stage["rows"], stage["steps"]) for stage in data["earlier_stages"]
    ]


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_equal_one_longer_run(method: str, recipe: Path) -> None:
    """Same rows in the same order: the losses of all eight steps within 1e-5, the weights within 1e-6, where the second
    stage moved some by more than 1e-3. The second stage of LoRA takes rank and layers from the first.
    """
    key, keys = METHODS[method]
    one = trained(recipe, "one", **keys)
    second = {"use_peft": True} if keys else {}
    two = trained(recipe, "two", **second, **{key: str(one)})
    whole = trained(recipe, "whole", **keys)
    losses = logged(whole)
    assert len(losses) == 8
    assert logged(one) + logged(two) == pytest.approx(losses, rel=1e-5)
    assert largest_difference(two, whole) < 1e-6
    assert largest_difference(one, whole) > 1e-3
    assert stages(two) == [("one", 16, 4)]
    assert not stages(whole)


def test_the_chain_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full, LoRA on it, and LoRA from a checkpoint of that: check, banner, data.json and card name each stage with its
    data, rows and steps, and the weights that a stage began with are known by their fingerprint.
    """
    one = trained(recipe, "one")
    two = trained(recipe, "two", **LORA, model_name_or_path=str(one), save_steps=2)
    keys = {
        "use_peft": True,
        "model_name_or_path": str(one),
        "adapter_name_or_path": str(two / "checkpoint-2"),
        "output_dir": str(recipe.parent / "three"),
    }
    checked = check_text(check_recipe(load_recipe(recipe, keys), progress=False))
    assert (
        f"Stages: {one} (16 rows, 4 steps) -> {two}/checkpoint-2 (16 rows, 2 steps) -> " in checked
    )
    capsys.readouterr()
    three = train(load_recipe(recipe, keys))
    assert f"stages      {one} (16 rows, 4 steps) -> {two}/check" in capsys.readouterr().out
    assert stages(three) == [("one", 16, 4), ("checkpoint-2", 16, 2)]
    recorded = json.loads((three / "data.json").read_text())["earlier_stages"]
    for stage, run, key in zip(recorded, (two, three), START_KEYS, strict=True):
        contents = json.loads((run / "contents.json").read_text())["contents"]
        assert stage["weights"] == contents[key]
    assert recorded[0]["data"] != recorded[1]["data"]
    card = (three / "README.md").read_text()
    assert "| 1 | `./one` | `./one.jsonl` | 16 | " in card
    assert "| 2 | `./checkpoint-2` | `./two.jsonl` | 16 | " in card
    assert "| 3 | three | `./whole.jsonl` | 32 | " in card
    assert "| lora_r | 4 |" in card and "all linear layers" not in card
    assert "## Stages" not in (one / "README.md").read_text()


def test_a_second_stage_is_released_and_judged_as_any_run(recipe: Path) -> None:
    """Its export is the base with both stages merged; the model before tuning is the base, not the first stage."""
    one = trained(recipe, "one", **LORA)
    two = trained(recipe, "two", use_peft=True, adapter_name_or_path=str(one))
    exported = export(two, progress=False)
    assert exported.compared["merged"].equal_texts == exported.compared["merged"].prompts
    base = load_recipe(recipe).model_name
    assert model_before(str(two), load_recipe(two / "recipe.yaml"), "--base") == base
    whole = export(trained(recipe, "whole", **LORA), progress=False)
    assert largest_difference(exported.folder, whole.folder) < 1e-6


def test_an_exported_first_stage_is_a_base(recipe: Path) -> None:
    """A merged LoRA run is gone on from as a whole model, and stays in the chain."""
    one = trained(recipe, "one", **LORA)
    export(one, progress=False)
    two = trained(recipe, "two", model_name_or_path=str(one / "export"))
    assert stages(two) == [("export", 16, 4)]


def test_a_stopped_second_stage_goes_on(recipe: Path, tmp_path: Path) -> None:
    """Broken off in its third step it ends with the bytes of one that was not; with another first stage in the place
    of the one that it began with it is refused.
    """
    one = trained(recipe, "one", **LORA)
    keys = ["--use_peft", "true", "--adapter_name_or_path", str(one)]
    whole = ["--config", str(recipe), "--save_steps", "1", *keys]
    assert main([*whole, "--output_dir", str(tmp_path / "not-stopped")]) == 0
    interrupted_run(recipe, tmp_path / "stopped", *keys)
    again = [*whole, "--output_dir", str(tmp_path / "stopped")]
    tensors = weights(one)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, one / ADAPTER, {"format": "pt"})
    with pytest.raises(InputError, match="adapter_name_or_path: holds a run of another recipe"):
        train(load_recipe(recipe, overrides(again)))
    save_file(tensors, one / ADAPTER, {"format": "pt"})
    assert main(again) == 0
    expected = (tmp_path / "not-stopped" / ADAPTER).read_bytes()
    assert (tmp_path / "stopped" / ADAPTER).read_bytes() == expected


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """The keys of a command line, without the recipe."""
    from sft_recipes.recipe import parse_overrides

    values = parse_overrides(arguments)
    del values["config"]
    return values


def test_a_first_stage_that_was_moved(recipe: Path, tmp_path: Path) -> None:
    """The same adapter under another name is the same: a finished second stage stays finished."""
    one = trained(recipe, "one", **LORA)
    keys = {"use_peft": True, "adapter_name_or_path": str(one)}
    two = trained(recipe, "two", **keys)
    before = (two / ADAPTER).read_bytes()
    moved = shutil.move(one, tmp_path / "moved")
    trained(recipe, "two", **{**keys, "adapter_name_or_path": str(moved)})
    assert (two / ADAPTER).read_bytes() == before


@pytest.mark.slow
def test_on_quantized_weights(recipe: Path) -> None:
    """QLoRA goes on from a LoRA: what it starts with is the adapter in bfloat16, and the loss begins where it ended."""
    keys = {"load_in_4bit": True, "optim": "adamw_torch", "learning_rate": 1e-2}
    one = trained(recipe, "one", **LORA, **keys, num_train_epochs=8)
    two = trained(recipe, "one-again", use_peft=True, adapter_name_or_path=str(one), **keys)
    assert logged(two)[0] < 0.95 * logged(one)[0]
    assert logged(two)[0] == pytest.approx(logged(one)[-4], rel=0.02)
    assert stages(two) == [("one", 16, 32)]


@pytest.mark.slow
def test_on_two_processes(write_recipe: Callable[..., Path], recipe: Path, tmp_path: Path) -> None:
    """Two ranks of a second stage train what one process trains, and hold the same weights."""
    one = trained(recipe, "one-first", **LORA)
    compare(write_recipe, tmp_path, **LORA, adapter_name_or_path=str(one))
