"""A run folder and what its recipe names may be moved: content decides, paths are hints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.path_contents import path_contents
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import main, train
from tests.training.test_checkpoints import interrupted_run
from tests.training.tiny import file_hashes


def weights(run: Path) -> bytes:
    """The trained weights as they lie on the disk."""
    (file,) = run.glob("*.safetensors")
    return file.read_bytes()


def interrupted(path: Path, tmp_path: Path, **keys: Any) -> Path:
    """A run of the recipe that broke off in its third step, and the same run never broken off: its weights."""
    arguments = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    whole = ["--config", str(path), "--output_dir", str(tmp_path / "whole"), "--save_steps", "1"]
    assert main([*whole, *arguments]) == 0
    interrupted_run(path, tmp_path / "run", *arguments)
    return tmp_path / "run"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_renamed_and_moved_to_another_depth(
    adapter: bool, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The folder alone is moved: the recipe with the new output_dir goes on, and ends as the whole run."""
    keys = {"use_peft": True, "lora_r": 4} if adapter else {}
    path = write_recipe(**keys)
    run = interrupted(path, tmp_path)
    moved = tmp_path / "a/b/c/moved"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert main(["--config", str(path), "--save_steps", "1", "--output_dir", str(moved)]) == 0
    assert weights(moved) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_everything_moved_together(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Recipe, model, data and run are mounted elsewhere: absolute paths of before are of no consequence."""
    project = tmp_path / "project"
    project.mkdir()
    path = write_recipe()
    for name in ("base", "train.jsonl"):
        source = (
            tmp_path / name if (tmp_path / name).exists() else Path(load_recipe(path).model_name)
        )
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, project / name)
    keys = [
        "--model_name_or_path",
        str(project / "base"),
        "--dataset_name",
        str(project / "train.jsonl"),
    ]
    interrupted_run(path, project / "run", *keys)
    project.rename(tmp_path / "elsewhere")
    project = tmp_path / "elsewhere"
    keys = [
        "--model_name_or_path",
        str(project / "base"),
        "--dataset_name",
        str(project / "train.jsonl"),
    ]
    again = [
        "--config",
        str(path),
        "--save_steps",
        "1",
        "--output_dir",
        str(project / "run"),
        *keys,
    ]
    assert main(again) == 0
    assert json.loads((project / "run/run_state.json").read_text())["allowed_changes"] == {}


def test_other_content_under_another_name_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Another data file, or other weights under the old name, are another run; before anything is changed."""
    path = write_recipe()
    train(load_recipe(path))
    before = file_hashes(tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text(
        (tmp_path / "train.jsonl").read_text() + '{"instruction": "q", "output": "a"}\n'
    )
    with pytest.raises(InputError, match=r"dataset_name: .*other\.jsonl.* here"):
        train(load_recipe(path, {"dataset_name": str(other)}))
    base = Path(load_recipe(path).model_name)
    copy = shutil.copytree(base, tmp_path / "copy")
    train(load_recipe(path, {"model_name_or_path": str(copy)}))  # it is finished, and the same
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(InputError, match="model_name_or_path"):
        train(load_recipe(path, {"model_name_or_path": str(copy)}))
    assert file_hashes(tmp_path / "run") == before


@pytest.mark.slow
def test_the_best_checkpoint_is_found_by_name(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """After a move the model at the end is still that of the best checkpoint, from the new folder."""
    keys = {
        "eval_split": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 5.0,  # each step is worse than the one before
        "evaluation": {"during_training": False},
    }
    path = write_recipe(**keys)
    run = interrupted(path, tmp_path)
    moved = tmp_path / "deep/moved"
    moved.parent.mkdir()
    run.rename(moved)
    assert main(["--config", str(path), "--output_dir", str(moved)]) == 0
    (state,) = sorted(
        moved.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])
    )[-1:]
    best = json.loads((state / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).parent == moved
    assert weights(moved) == weights(Path(best)) == weights(tmp_path / "whole")


def test_a_model_that_is_gone_is_asked_for(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the base is not there any more the error names the key to give it by, and given so the run goes on."""
    path = write_recipe()
    base = shutil.copytree(load_recipe(path).model_name, tmp_path / "base_1")
    interrupted_run(path, tmp_path / "run", "--model_name_or_path", str(base))
    base.rename(tmp_path / "base_2")
    again = ["--config", str(path), "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*again, "--model_name_or_path", str(base)]) == 2
    said = capsys.readouterr().err
    assert "base_1: model_name_or_path: no such folder" in said and "--model_name_or_path" in said
    assert main([*again, "--model_name_or_path", str(tmp_path / "base_2")]) == 0


def test_what_is_compared(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Of a model's folder weights and config count, of a data file every byte; a Hub name has no content here."""
    path = write_recipe()
    base = shutil.copytree(load_recipe(path).model_name, tmp_path / "base")
    keys = {"model_name_or_path": str(base), "chat_template": "chatml"}
    before = path_contents(load_recipe(path, keys))
    assert before.keys() == {"model_name_or_path", "dataset_name"}
    (base / "README.md").write_text("notes")
    assert path_contents(load_recipe(path, keys)) == before
    (weights_file,) = base.glob("*.safetensors")
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    os.utime(weights_file, (0, 0))
    after = path_contents(load_recipe(path, keys))
    assert after["model_name_or_path"] != before["model_name_or_path"]
    assert after["dataset_name"] == before["dataset_name"]
