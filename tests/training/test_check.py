"""The plan says beforehand what the run then shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_recipes.data import prepare as prepare_page
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.announce import unusual
from sft_recipes.training.check import check_recipe, check_text
from sft_recipes.training.measure import PeakMemory
from tests.conftest import instruction_rows
from tests.training.tiny import file_hashes, trainer_for


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_memory_is_what_one_step_allocates(
    keys: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    """Parameters, trained ones, and bytes of weights, gradients and optimizer states equal those
    after one step; the peak is between these and all parts together.
    """
    path = write_recipe(max_steps=1, **keys)
    planned = check_recipe(load_recipe(path), progress=False)["plan"]
    trainer = trainer_for(path)
    trainer.train()
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    states = []
    for state in trainer.optimizer.state.values():
        # Its counter of steps is no tensor the size of the weights.
        states += [value for name, value in state.items() if name != "step"]
    assert planned["parameters"] == sum(parameter.numel() for parameter in parameters)
    assert planned["trained parameters"] == sum(parameter.numel() for parameter in trained)
    assert sum(planned["trained by layer"].values()) == planned["trained parameters"]
    sizes = planned["bytes a device"]
    assert sizes["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert sizes["gradients"] == sum(parameter.nbytes for parameter in trained)
    assert sizes["optimizer"] == sum(value.nbytes for value in states)
    assert sizes["activations"] > 0
    kept = sizes["weights"] + sizes["gradients"] + sizes["optimizer"]
    assert kept <= planned["bytes at peak, estimated"] <= sum(sizes.values())


def test_packs_are_counted_as_they_are_trained(write_recipe: Callable[..., Path]) -> None:
    """With packing the planned steps are those that TRL's packing of the same rows gives."""
    path = write_recipe(
        packing=True, max_length=64, num_train_epochs=1, per_device_train_batch_size=2
    )
    planned = check_recipe(load_recipe(path), progress=False)["plan"]
    packs = len(trainer_for(path).train_dataset)
    assert planned["steps"] == -(-packs // 2)
    assert 0 < planned["share of each pack filled"] <= 1


CONFIGS = {
    "ddp": ("distributed_type: MULTI_GPU\n", (1, 1, 1)),
    "fsdp": (
        "distributed_type: FSDP\nfsdp_config:\n  fsdp_reshard_after_forward: true\n",
        (4, 4, 4),
    ),
    "fsdp_kept": (
        "distributed_type: FSDP\nfsdp_config:\n  fsdp_reshard_after_forward: false\n",
        (1, 4, 4),
    ),
    "zero1": ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 1\n", (1, 1, 4)),
    "zero2": ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n", (1, 4, 4)),
    "zero3": ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n", (4, 4, 4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_launch_splits_what_its_strategy_splits(
    name: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights, gradients and optimizer states of one device are those of one process over the
    strategy's shares, and four processes take four times the rows a step.
    """
    text, shares = CONFIGS[name]
    config = tmp_path / f"{name}.yaml"
    config.write_text(text)
    recipe = load_recipe(write_recipe())
    alone = check_recipe(recipe, progress=False)["plan"]
    spread = check_recipe(recipe, config, processes=4, progress=False)["plan"]
    for part, share in zip(("weights", "gradients", "optimizer"), shares, strict=True):
        assert spread["bytes a device"][part] == pytest.approx(
            alone["bytes a device"][part] / share, abs=1
        )
    assert spread["rows a step"] == 4 * alone["rows a step"]
    assert spread["strategy"] == f"{name} on 4 processes"


def test_offloaded_states_lie_in_host_memory(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """What a ZeRO config offloads is counted for the host, not for the device."""
    config = tmp_path / "offload.yaml"
    config.write_text(
        "distributed_type: DEEPSPEED\n"
        "deepspeed_config:\n"
        "  zero_stage: 3\n"
        "  offload_optimizer_device: cpu\n"
    )
    recipe = load_recipe(write_recipe())
    optimizer = check_recipe(recipe, progress=False)["plan"]["bytes a device"]["optimizer"]
    plan = check_recipe(recipe, config, processes=2, progress=False)["plan"]
    assert "optimizer" not in plan["bytes a device"]
    assert plan["bytes in host memory"] == {"optimizer": optimizer / 2}


@pytest.mark.parametrize(
    ("lora", "changed", "context", "notes"),
    [
        (False, {}, 256, []),
        (False, {"learning_rate": 1e-5, "num_train_epochs": 3}, "not recorded", []),
        (True, {}, None, ["learning_rate 2e-05 is outside the usual 0.0001 to 0.0005 for LoRA"]),
        (
            True,
            {"learning_rate": 5e-4},
            255,
            ["the longest row has 256 tokens, the model's context is 255: lower"],
        ),
        (
            False,
            {"learning_rate": 1e-4},
            256,
            ["learning_rate 0.0001 is outside the usual 5e-06 to 5e-05 for full"],
        ),
        (False, {"num_train_epochs": 4}, 256, ["num_train_epochs 4 is outside the usual 1 to 3"]),
        (False, {"num_train_epochs": 4, "max_steps": 9}, 256, []),
        (False, {"max_grad_norm": 0.0}, 256, ["max_grad_norm is 0: gradients are not clipped"]),
        (
            False,
            {"train_sampling_strategy": "group_by_length"},
            256,
            ["train_sampling_strategy group_by_length: a"],
        ),
    ],
)
def test_what_is_unusual_is_said(
    lora: bool, changed: dict[str, Any], context: Any, notes: list[str]
) -> None:
    """What lies outside the chapter's ranges, or ten times them for LoRA, gets a line; what is
    inside gets none.
    """
    usual = {
        "learning_rate": 2e-5,
        "num_train_epochs": 1,
        "max_steps": -1,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
    }
    args = SimpleNamespace(**(usual | changed))
    recipe: Any = SimpleNamespace(model={"use_peft": lora})
    said = unusual(recipe, args, 256, context, 8_000_000_000)
    assert len(said) == len(notes)
    for line, note in zip(said, notes, strict=True):
        assert line.startswith(note)


@pytest.mark.parametrize(
    ("rate", "lora", "parameters", "is_usual"),
    [
        (2e-3, True, 135_000_000, True),
        (2e-3, True, 600_000_000, False),
        (1e-3, False, 362_000_000, True),
        (1e-3, False, 1_000_000_000, False),
        (1e-2, True, 135_000_000, False),
    ],
)
def test_small_models_take_higher_rates(
    rate: float, lora: bool, parameters: int, is_usual: bool
) -> None:
    """What is usual follows from the size of the model, and a rate that is not usual says for whom."""
    args = SimpleNamespace(
        learning_rate=rate,
        num_train_epochs=1,
        max_steps=-1,
        max_grad_norm=1.0,
        train_sampling_strategy="random",
    )
    recipe: Any = SimpleNamespace(model={"use_peft": lora})
    notes = unusual(recipe, args, 256, None, parameters)
    assert bool(notes) is not is_usual
    assert all(("a model this small" in note) == (parameters < 500_000_000) for note in notes)


def test_the_text_begins_with_what_will_happen(write_recipe: Callable[..., Path]) -> None:
    """Rows trained and held out, steps and tokens, the time here and the memory stand on top, each once; which
    rows the checks read stands behind them; the last line is the command with its overrides.
    """
    recipe = load_recipe(write_recipe(eval_split=0.2), {"max_steps": 10, "seed": 3})
    result = check_recipe(recipe, progress=False)
    plan = result["plan"]
    lines = check_text(result).splitlines()
    assert lines[0] == "32 rows are trained on, 8 are held out; none is left out."
    assert lines[1].startswith("10 steps of 8 rows and about ") and " 2.5 epochs: " in lines[1]
    assert lines[2].startswith("About ") and "on this machine" in lines[2]
    assert lines[3].startswith("About ") and "are free here" in lines[3]
    assert plan["seconds for all steps, estimated"] == 10 * plan["seconds a step, estimated"] > 0
    (rows,) = [line for line in lines if "The rows checked are" in line]
    assert rows.endswith("a made-up conversation and all 40 of the data.")
    assert lines[-1] == f"next: sft-recipes train {recipe.path} --max_steps 10 --seed 3"


def test_rows_left_out_are_counted_in_the_first_sentence(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Rows that are too long or broken are said to be left out, of as many as were read; each structure is checked."""
    rows: list[dict[str, Any]] = instruction_rows(40)
    rows.append({"instruction": "Say it.", "output": "word " * 500})
    rows.append({"instruction": "Say it.", "output": 7})
    write_rows(rows)
    recipe = load_recipe(write_recipe(on_bad_rows="skip", max_rejected=1.0, max_lost=1.0))
    text = check_text(check_recipe(recipe, progress=False))
    assert text.startswith(
        "40 rows are trained on, none is held out; 2 of 42 rows of the data are left out."
    )


def test_a_launch_elsewhere_is_not_timed_here(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """For a launch on other machines nothing is said of this one, and the next command names the launch."""
    config = tmp_path / "ddp.yaml"
    config.write_text("distributed_type: MULTI_GPU\n")
    result = check_recipe(load_recipe(write_recipe()), config, processes=4, progress=False)
    text = check_text(result)
    assert "this machine" not in text
    assert text.splitlines()[-1].endswith(f"--launch {config} --num_processes 4")


def test_measured_steps_leave_no_trace(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`measure` reports time and memory of real steps as they come, scales them to those planned, and touches no
    run folder.
    """
    recipe = load_recipe(write_recipe(max_steps=50))
    plan = check_recipe(recipe, measure=2)["plan"]
    shown = re.findall(r"step (\d) (to warm up|measured): ", capsys.readouterr().err)
    assert shown == [("1", "to warm up"), ("2", "to warm up"), ("3", "measured"), ("4", "measured")]
    seconds, hours = (
        float(plan[f"measured {name}"]) for name in ("seconds a step", "hours for all steps")
    )
    assert hours == pytest.approx(seconds * 50 / 3600, rel=0.02)
    assert plan["bytes at peak, measured"]
    assert not recipe.output_dir.exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_peak_memory_is_that_of_the_work() -> None:
    """On a CPU the peak is what was held at once since the start, given back or not, and nothing from before."""
    held_before = torch.ones(2**24)
    memory = PeakMemory()
    for _ in range(3):
        torch.ones(2**25)
    assert 0.9 * 2**27 < (memory.bytes() or 0) < 1.5 * 2**27
    assert held_before.sum() == 2**24


def test_evaluations_that_never_come_are_noted(write_recipe: Callable[..., Path]) -> None:
    """More steps between evaluations than the run has are said before it; fewer are not."""
    keys: dict[str, Any] = {"eval_split": 8, "eval_strategy": "steps", "max_steps": 3}
    keys["evaluation"] = {"max_new_tokens": 4}
    late = check_recipe(load_recipe(write_recipe(**keys, eval_steps=100)), progress=False)
    assert "eval_steps 100 is more than the run's 3 steps: nothing is evaluated" in late["notes"]
    early = check_recipe(load_recipe(write_recipe(**keys, eval_steps=2)), progress=False)
    assert not any("eval_steps" in note for note in early["notes"])


def test_rows_that_are_prepared_are_not_labelled_again(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind `prepare` the plan is what it was, of the same rows; the run's folder stays as it is, packs or not;
    with other labels they are labelled again."""
    path = write_recipe(eval_split=4, packing=True, max_length=64)
    recipe = load_recipe(path)
    before = check_recipe(recipe, progress=False)
    folder = recipe.output_dir / "prepared"
    write_prepared(recipe, open_labeller(recipe), folder, progress=False)
    files = file_hashes(folder)

    def refused(*_: Any) -> None:
        raise AssertionError("rows are prepared again")

    monkeypatch.setattr(prepare_page._Preparation, "run", refused)
    after = check_recipe(recipe, progress=False)
    for content in (before, after):  # measured anew each time
        for key in [key for key in content["plan"] if "second" in key or "free" in key]:
            del content["plan"][key]
    assert after["plan"] == before["plan"] and after["data"] == before["data"]
    assert file_hashes(folder) == files
    with pytest.raises(AssertionError, match="prepared again"):
        check_recipe(load_recipe(path, {"max_length": 48}), progress=False)
    (folder / "train-00000.arrow").write_bytes(b"half")
    with pytest.raises(
        InputError, match=rf"{folder}/train-00000.arrow: missing, cut off or changed"
    ):
        check_recipe(recipe, progress=False)
