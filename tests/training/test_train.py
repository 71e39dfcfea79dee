"""A run from recipe to run folder, run again, changed, and interrupted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_recipes.errors import CheckFailed, InputError, TrainingFault
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import main, train
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import instruction_rows
from tests.training.tiny import file_hashes, logged, trainer_for

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
CHATML = {"chat_template": "chatml"}


def read(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("keys", [{}, LORA, CHATML], ids=["full", "lora", "chatml"])
def test_run_folder(write_recipe: Callable[..., Path], keys: dict[str, Any]) -> None:
    """A run leaves recipe, environment, data, state, log and model; its recipe.yaml loads and its paths hold."""
    path = write_recipe(
        **keys, eval_split=8, eval_strategy="epoch", evaluation={"rows": 2, "max_new_tokens": 4}
    )
    run = train(load_recipe(path))
    assert run.resolve() == (path.parent / "run").resolve()
    model_file = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    for name in (
        "recipe.yaml",
        "environment.json",
        "data.json",
        "log.jsonl",
        "tokenizer.json",
        model_file,
    ):
        assert (run / name).is_file(), name
    assert (
        read(run / "run_state.json")["state"] == "finished"
        and read(run / "run_state.json")["step"] == 4
    )
    again = load_recipe(run / "recipe.yaml")
    assert again.output_dir.resolve() == run.resolve()
    assert (
        Path(again.data.datasets[0].path).read_bytes() == (path.parent / "train.jsonl").read_bytes()
    )
    assert (again.training.keys(), again.model, again.labels) == (
        load_recipe(path).training.keys(),
        load_recipe(path).model,
        load_recipe(path).labels,
    )
    data = read(run / "data.json")
    assert (data["train"]["rows"], data["eval"]["rows"], data["sources"][0]["rows_in"]) == (
        32,
        8,
        40,
    )
    assert read(run / "environment.json")["processes"] == 1
    losses = logged(run)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert len(logged(run, "eval_loss")) == 1
    generated = {
        key for line in (run / "log.jsonl").read_text().splitlines() for key in json.loads(line)
    }
    assert {"eval_exact_match", "eval_eos_rate"} <= generated, generated


def test_finished_run_is_left_alone(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same recipe again says `already complete` and changes no byte of the run folder, with max_steps, too."""
    path = write_recipe(max_steps=2)
    run = train(load_recipe(path))
    before = file_hashes(run)
    capsys.readouterr()
    assert main(["--config", str(path)]) == 0
    assert "already complete (2 steps)" in capsys.readouterr().out
    assert file_hashes(run) == before
    assert main(["--config", str(run / "recipe.yaml")]) == 0, (
        "the recipe in the run folder is the same run"
    )
    assert file_hashes(run) == before


def test_changed_recipe_is_refused_and_harms_nothing(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another learning rate in the same folder: exit code 2, both values named, the finished run stays as it was."""
    path = write_recipe(max_steps=2)
    run = train(load_recipe(path))
    before = file_hashes(run)
    assert (
        main(["--config", str(path), "--learning_rate", "5e-3", "--lora_r", "3", "--use_peft"]) == 2
    )
    error = capsys.readouterr().err
    assert (
        "learning_rate: 0.001 there, 0.005 here" in error and "lora_r: None there, 3 here" in error
    )
    assert "use --output_dir NEW" in error
    assert file_hashes(run) == before
    assert main(["--config", str(path), "--report_to", "none", "--run_name", "other"]) == 0, (
        "a name is no other run"
    )


def test_recipe_may_be_mended_before_anything_was_trained(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """A run refused for its data can be started again in the same folder with the key that the message names."""
    write_rows([*instruction_rows(9), {"instruction": "x", "input": "", "output": "blue " * 200}])
    path = write_recipe(max_steps=1)
    assert main(["--config", str(path)]) == 2
    assert main(["--config", str(path), "--max_lost", "0.99"]) == 0
    assert main(["--config", str(path), "--max_lost", "0.98"]) == 2, "now there is a run to protect"


@pytest.mark.parametrize(
    "keys", [{}, LORA, {"packing": True}], ids=["full", "lora_dropout", "packed"]
)
def test_resumed_equals_uninterrupted(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    keys: dict[str, Any],
) -> None:
    """Interrupted in the middle of an epoch and run again: weights and losses equal the whole run bit for bit."""
    path = write_recipe(
        **keys,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    whole = train(load_recipe(path, {"output_dir": str(tmp_path / "whole")}))
    interrupt(monkeypatch, before_micro_step=11)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(path))
    monkeypatch.undo()
    assert read(tmp_path / "run/run_state.json")["state"] == "running"
    assert (tmp_path / "run/checkpoint-4").is_dir()
    resumed = train(load_recipe(path))
    name = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    left, right = load_file(whole / name), load_file(resumed / name)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    # Step 5 was logged before the interruption and is computed again after it.
    assert logged(resumed) == logged(whole) and logged(resumed, "num_tokens") == logged(
        whole, "num_tokens"
    )
    assert read(resumed / "consumption.json") == read(whole / "consumption.json")


def interrupt(monkeypatch: pytest.MonkeyPatch, before_micro_step: int) -> None:
    """Ctrl-C arrives in the given micro-step."""
    real, calls = RecipeTrainer.training_step, []

    def step(self: RecipeTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == before_micro_step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", step)


@pytest.fixture
def interrupted(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, Path]:
    """A recipe and its run folder with checkpoints 1, 2 and 3 of 5 steps."""
    path = write_recipe(save_steps=1)
    interrupt(monkeypatch, before_micro_step=4)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(path))
    monkeypatch.undo()
    return path, tmp_path / "run"


def test_incomplete_newest_checkpoint_is_skipped(
    interrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The newest checkpoint lacks a file: it is named, the one before is used, the result is that of a whole run."""
    path, run = interrupted
    (run / "checkpoint-3/optimizer.pt").unlink()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-keepme")
    whole = train(load_recipe(path, {"output_dir": str(tmp_path / "whole")}))
    capsys.readouterr()
    train(load_recipe(path))
    assert "skipped checkpoint-3: optimizer.pt is missing" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run / "checkpoint-keepme/optimizer.pt").is_file()


def test_changed_data_is_refused_on_resume(interrupted: tuple[Path, Path], tmp_path: Path) -> None:
    """A changed byte of data since the checkpoints: refused, not resumed on other rows; restored, it resumes."""
    path, run = interrupted
    rows = tmp_path / "train.jsonl"
    original = rows.read_text()
    rows.write_text(original.replace("(39)", "(38)"))
    with pytest.raises(
        InputError,
        match="data: the data, its template or its tokenizer changed since the checkpoint",
    ):
        train(load_recipe(path))
    assert not (run / "model.safetensors").exists() and (run / "checkpoint-3").is_dir()
    rows.write_text(original)
    train(load_recipe(path))
    assert read(run / "run_state.json")["state"] == "finished"


def test_no_complete_checkpoint_is_a_fault(
    interrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """All checkpoints are incomplete: exit code 3, no fresh start, and what is there stays there."""
    path, run = interrupted
    for number, name in ((1, "scheduler.pt"), (2, "model.safetensors"), (3, "trainer_state.json")):
        (run / f"checkpoint-{number}" / name).unlink()
    (run / "checkpoint-99").mkdir()
    with pytest.raises(
        TrainingFault,
        match=re.escape(
            "no checkpoint in it is valid (checkpoint-99: it was never sealed; checkpoint-3: trainer"
        ),
    ):
        train(load_recipe(path))
    assert main(["--config", str(path)]) == 3
    assert "Fix: remove the checkpoint folders" in capsys.readouterr().err
    assert not (run / "model.safetensors").exists()
    assert (run / "checkpoint-3/optimizer.pt").is_file()


def test_template_that_does_not_teach_to_stop_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A template whose assistant turn ends in no special token is refused before a model is loaded."""
    (tmp_path / "open.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    with pytest.raises(CheckFailed, match="the model would not learn to stop"):
        train(load_recipe(write_recipe(chat_template="./open.jinja")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy: there are no eval rows"),
        (
            {"load_best_model_at_end": True},
            "load_best_model_at_end: has no effect with eval_strategy: not set",
        ),
        ({"global_batch_size": 12}, "global_batch_size: 12 rows do not divide by 8"),
        (
            {"global_batch_size": 16, "gradient_accumulation_steps": 2},
            "set together with global_batch_size",
        ),
        ({"lora_r": 4}, "lora_r: has no effect with use_peft: not set"),
        ({"load_in_4bit": True}, "load_in_4bit: quantized weights cannot be trained"),
        (
            {"use_peft": True, "use_bnb_nested_quant": True},
            "use_bnb_nested_quant: has no effect with load_in_4bit",
        ),
        ({"fp16": True}, "fp16: needs a CUDA device"),
        (
            {"eval_split": 4, "eval_strategy": "epoch"},
            "256 new tokens exceed the model's 256 positions",
        ),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
    ],
)
def test_contradictions_are_refused(
    write_recipe: Callable[..., Path], keys: dict[str, Any], message: str
) -> None:
    """Settings that contradict one another, the data or the machine are refused by name, before training."""
    with pytest.raises(InputError, match=message):
        train(load_recipe(write_recipe(**keys)))


def test_global_batch_size_sets_accumulation(write_recipe: Callable[..., Path]) -> None:
    """global_batch_size 16 with 4 rows per device means 4 accumulation steps."""
    trainer = trainer_for(write_recipe(global_batch_size=16, per_device_train_batch_size=4))
    assert trainer.args.gradient_accumulation_steps == 4


def test_processes_that_do_not_know_one_another(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launched processes of which this one works alone: refused, not trained twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched, 1 work together"):
        train(load_recipe(write_recipe()))


@pytest.mark.slow
def test_qlora_on_cpu(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    """4-bit QLoRA trains on a CPU: adapters change, the loss falls, and evaluation in between changes nothing."""
    # No dropout: an evaluation draws from the random numbers that dropout uses.
    keys = {
        **LORA,
        "lora_dropout": 0.0,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "learning_rate": 1e-2,
    }
    path = write_recipe(
        **keys,
        eval_split=8,
        eval_strategy="steps",
        eval_steps=1,
        evaluation={"rows": 2, "max_new_tokens": 4},
    )
    run = train(load_recipe(path))
    losses = logged(run)
    assert losses[-1] < losses[0]
    adapter = load_file(run / "adapter_model.safetensors")
    assert any(bool((tensor != 0).any()) for name, tensor in adapter.items() if "lora_B" in name)
    quiet = train(
        load_recipe(path, {"eval_strategy": "no", "output_dir": str(run.parent / "quiet")})
    )
    assert logged(quiet) == pytest.approx(losses, rel=1e-5)
