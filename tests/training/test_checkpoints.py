"""Checkpoints are sealed, verified, rotated and resumed by contract; test_reliability.py kills processes for it."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sft_recipes import run_folder
from sft_recipes.errors import InputError, TrainingFault
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import checkpoints
from sft_recipes.training import train as page
from sft_recipes.training.run_lock import STALE_SECONDS, lock_holder, read_holder, run_lock
from sft_recipes.training.train import main, train
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import instruction_rows
from tests.training.test_train import interrupt
from tests.training.tiny import file_hashes, logged, trainer_for

FACTS = {
    "data": "d",
    "world_size": 1,
    "global_batch_size": 8,
    "seed": 42,
    "versions": {"torch": "2"},
}
FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


def make(folder: Path, *steps: int) -> None:
    """Sealed checkpoints with small files of every kind."""
    for step in steps:
        path = folder / f"checkpoint-{step}"
        checkpoints.begin_save(path, 100)
        for name in FILES:
            (path / name).write_bytes(f"{name} {step}".encode() * 10)
        checkpoints.seal(path, {**FACTS, "step": step})


def flip(path: Path) -> None:
    """One bit of the middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "delete": Path.unlink,
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b"") and None,
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "flip": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_r5_damaged_file(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the newest checkpoint is deleted, cut, emptied, zeroed or a bit is flipped: it is skipped by name."""
    make(tmp_path, 2, 4)
    assert (
        checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        and not capsys.readouterr().out
    )
    DAMAGE[damage](tmp_path / "checkpoint-4" / name)
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    missing = "it was never sealed" if name == "manifest.json" else f"{name} is missing"
    expected = missing if damage == "delete" else f"corrupt {name}"
    assert capsys.readouterr().out == f"skipped checkpoint-4: {expected}\n"
    assert (tmp_path / "checkpoint-4").is_dir()


@pytest.mark.parametrize("damage", [None, *DAMAGE])
def test_seals_of_earlier_versions_hold(damage: str | None, tmp_path: Path) -> None:
    """A manifest with bare SHA-256 sums, as written before, is valid as long as its files are, and sees any damage."""
    make(tmp_path, 2)
    folder = tmp_path / "checkpoint-2"
    content = json.loads((folder / "manifest.json").read_text())
    del content["seal"], content["schema_version"]
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    seal = checkpoints._seal_of(content)
    run_folder.write_json(folder / "manifest.json", {**content, "seal": seal})
    if damage is None:
        assert checkpoints.fault_of(folder) == ""
    else:
        DAMAGE[damage](folder / "optimizer.pt")
        assert "optimizer.pt" in checkpoints.fault_of(folder)


def test_any_flipped_bit_of_the_manifest_is_seen(tmp_path: Path) -> None:
    """No single flipped bit in the manifest makes it say something else unnoticed."""
    make(tmp_path, 2)
    manifest = tmp_path / "checkpoint-2/manifest.json"
    whole, meaning = manifest.read_bytes(), json.loads(manifest.read_text())
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        manifest.write_bytes(content)
        if not checkpoints.fault_of(manifest.parent):
            assert json.loads(content) == meaning, place


def test_r6_no_valid_checkpoint(tmp_path: Path) -> None:
    """All are bad, in different ways: an error that lists each of them, and no fresh start."""
    make(tmp_path, 2, 4)
    flip(tmp_path / "checkpoint-2/optimizer.pt")
    (tmp_path / "checkpoint-4/model.safetensors").unlink()
    (tmp_path / "checkpoint-99").mkdir()
    with pytest.raises(TrainingFault) as fault:
        checkpoints.newest_checkpoint(tmp_path)
    for text in (
        "99: it was never sealed",
        "4: model.safetensors is missing",
        "2: corrupt optimizer.pt",
        "Fix: remove",
    ):
        assert text in str(fault.value)


def test_r6_checkpoint_of_another_run(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sealed checkpoint with a higher number, of a run on other data, is refused by name and not resumed from."""
    path = write_recipe(save_steps=1)
    train(load_recipe(path))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(30)))
    run = tmp_path / "run2"
    interrupted_run(path, run, "--dataset_name", str(other))
    shutil.copytree(tmp_path / "run/checkpoint-2", run / "checkpoint-99")
    assert (
        main(["--config", str(path), "--output_dir", str(run), "--dataset_name", str(other)]) == 2
    )
    error = capsys.readouterr().err
    assert (
        "checkpoint-99: data: the data, its template or its tokenizer changed since the checkpoint"
        in error
    )


def interrupted_run(path: Path, run: Path, *arguments: str, step: int = 3) -> None:
    """A run that breaks off in a step, with a checkpoint after each."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, before_micro_step=step)
        with pytest.raises(KeyboardInterrupt):
            main(["--config", str(path), "--save_steps", "1", "--output_dir", str(run), *arguments])


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (1, None, [8]),
        (2, None, [6, 8]),
        (1, 4, [4, 8]),
        (2, 4, [4, 8]),
        (3, 4, [4, 6, 8]),
    ],
)
def test_r13_rotation(limit: int | None, best: int | None, left: list[int], tmp_path: Path) -> None:
    """Only the oldest sealed checkpoints beyond the limit go; newest and best stay, and all that is not ours."""
    make(tmp_path, 2, 4, 6, 8)
    foreign = ["checkpoint-keepme", "checkpoint-1", "checkpoint-x2", "models"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = {
        name: found
        for name, found in file_hashes(tmp_path).items()
        if name.split("/")[0] in foreign
    }
    checkpoints.rotate(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    sealed = [step for step in (2, 4, 6, 8) if (tmp_path / f"checkpoint-{step}").exists()]
    assert sealed == left
    assert {
        name: one for name, one in file_hashes(tmp_path).items() if name.split("/")[0] in foreign
    } == before


def test_r13_save_total_limit_of_a_run(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The recipe's save_total_limit leaves the newest two, and the user's folders and files as they were."""
    (tmp_path / "run/checkpoint-keepme").mkdir(parents=True)
    (tmp_path / "run/checkpoint-keepme/file").write_text("mine")
    run = train(load_recipe(write_recipe(save_steps=1, save_total_limit=2)))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-keepme",
    ]
    assert (run / "checkpoint-keepme/file").read_text() == "mine"
    manifest = json.loads((run / "checkpoint-5/manifest.json").read_text())
    facts = {key: manifest[key] for key in ("step", "world_size", "global_batch_size", "seed")}
    assert facts == {"step": 5, "world_size": 1, "global_batch_size": 8, "seed": 42}
    names = {
        str(path.relative_to(run / "checkpoint-5"))
        for path in (run / "checkpoint-5").rglob("*")
        if path.is_file()
    }
    assert manifest["files"].keys() == names - {"manifest.json"} and "optimizer.pt" in names


def test_skipped_checkpoint_is_moved_aside_not_overwritten(tmp_path: Path) -> None:
    """A folder where the next save goes is renamed, unless it is marked as what is left of an interrupted save."""
    make(tmp_path, 2, 4)
    flip(tmp_path / "checkpoint-4/optimizer.pt")
    broken = (tmp_path / "checkpoint-4/optimizer.pt").read_bytes()
    checkpoints.begin_save(tmp_path / "checkpoint-4", 100)
    (aside,) = tmp_path.glob("incomplete-checkpoint-4-*")
    assert (aside / "optimizer.pt").read_bytes() == broken
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["unfinished"]
    (tmp_path / "checkpoint-4/left.over").touch()
    checkpoints.begin_save(tmp_path / "checkpoint-4", 100)
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["unfinished"]


def test_r9_space_is_checked_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2 times the newest sealed checkpoint has to fit, or the estimate; the message has both numbers."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000_000)
    )
    with pytest.raises(
        TrainingFault,
        match=r"no space left: need 2\.4 GB, have 1 GB at .*Earlier checkpoints are intact",
    ):
        checkpoints.begin_save(tmp_path / "checkpoint-2", 2_000_000_000)
    checkpoints.begin_save(tmp_path / "checkpoint-2", 800_000_000)
    make(tmp_path, 2)
    need = int(
        1.2
        * sum(
            path.stat().st_size
            for path in (tmp_path / "checkpoint-2").iterdir()
            if path.name in FILES
        )
    )
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(
            checkpoints.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        if fits:
            checkpoints.begin_save(tmp_path / "checkpoint-4", 0)
        else:
            with pytest.raises(TrainingFault):
                checkpoints.begin_save(tmp_path / "checkpoint-6", 0)


def test_r9_folder_that_cannot_be_written(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """An output_dir below a file: wrong input, said before anything is read or trained."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output_dir: .*file is a file, and the run"):
        train(load_recipe(write_recipe(output_dir="./file/run")))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 5e-3}, "learning_rate: 0.001 there, 0.005 here"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 8 there, 4 here"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: None there, 2 here"),
        ({"seed": 7}, "seed: None there, 7 here"),
        ({"chat_template": "chatml"}, "chat_template: None there, 'chatml' here"),
        ({"use_peft": True, "lora_r": 4}, "lora_r: None there, 4 here"),
        ({"max_steps": 6}, "max_steps: None there, 6 here"),
    ],
)
def test_r11_changed_recipe(
    changes: dict[str, Any], named: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Each changed key is refused with both values; allowed, it is listed, except where the checkpoint decides."""
    path = write_recipe()
    recipe = load_recipe(path)
    run_folder.write_text(recipe.output_dir / "recipe.yaml", json.dumps(recipe.saved_values()))
    run_folder.write_json(recipe.output_dir / "run_state.json", {"state": "finished", "step": 5})
    changed = load_recipe(path, changes)
    with pytest.raises(InputError, match="holds a run of another recipe") as refusal:
        checkpoints.check_same_run(changed)
    assert named in str(refusal.value)
    if {"learning_rate", "lora_r"} & changes.keys():
        with pytest.raises(
            InputError, match="optimizer and model decide, a change would do nothing"
        ):
            checkpoints.check_same_run(changed, [*changes])
    else:
        state = checkpoints.check_same_run(changed, [*changes])
        assert state["state"] == "changed"
        assert state["allowed_changes"] == {key: (None if key != "per_device_train_batch_size" else 8, one)
                                            for key, one in changes.items()}  # fmt: skip


@pytest.mark.parametrize("fact", ["data", "global_batch_size"])
def test_r11_changed_facts(fact: str, tmp_path: Path) -> None:
    """Data or batch that differ from the checkpoint's are refused with both values, or allowed by name."""
    make(tmp_path, 2)
    now = {**FACTS, fact: "other"}
    with pytest.raises(
        InputError,
        match=f"changed since the checkpoint .{fact}: .* there, 'other' here.*--allow_changed",
    ):
        checkpoints.check_contract(tmp_path / "checkpoint-2", now)
    assert checkpoints.check_contract(tmp_path / "checkpoint-2", now, [fact]) == {
        fact: (FACTS[fact], "other")
    }
    assert checkpoints.check_contract(tmp_path / "checkpoint-2", FACTS) == {}


def test_other_versions_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of another library version is resumed, and the run says that it will not repeat bit for bit."""
    make(tmp_path, 2)
    assert (
        checkpoints.check_contract(tmp_path / "checkpoint-2", {**FACTS, "versions": {"torch": "3"}})
        == {}
    )
    assert (
        "other versions, so not bit for bit: {'torch': '2'} -> {'torch': '3'}"
        in capsys.readouterr().out
    )


def test_r11_allowed_change_trains_and_is_recorded(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A finished run goes on to more steps where that is allowed, and its state says to the end what changed."""
    path = write_recipe(max_steps=2)
    train(load_recipe(path))
    assert main(["--config", str(path), "--max_steps", "4", "--allow_changed", "max_steps"]) == 0
    state = run_folder.read_state(tmp_path / "run")
    assert (state["state"], state["step"], state["allowed_changes"]) == (
        "finished",
        4,
        {"max_steps": [2, 4]},
    )
    assert len(logged(tmp_path / "run")) == 4
    before = file_hashes(tmp_path / "run")
    assert (
        main(["--config", str(path), "--max_steps", "4"]) == 0
        and file_hashes(tmp_path / "run") == before
    )


def test_r14_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lock of a live process refuses with pid and host; of an ended one, or a silent host, it is stale."""
    host = socket.gethostname()

    def leave(pid: int, where: str, age: float = 0) -> None:
        (tmp_path / "run.lock").write_text(json.dumps({"pid": pid, "host": where}))
        os.utime(tmp_path / "run.lock", (time.time() - age,) * 2)

    for pid, where in ((os.getppid(), host), (1, "elsewhere")):
        leave(pid, where)
        with pytest.raises(
            InputError,
            match=f"process {pid} on {where} is training here.*delete {tmp_path}/run.lock",
        ):
            run_lock(tmp_path).__enter__()
        assert lock_holder(tmp_path) == (pid, where, 0)
    for pid, where, age in (
        (2**22 + 1, host, 0),
        (os.getpid(), host, 0),
        (1, "elsewhere", STALE_SECONDS + 1),
    ):
        leave(pid, where, age)
        with run_lock(tmp_path):
            assert f"run.lock of process {pid} on {where} is stale" in capsys.readouterr().out
            started = psutil.Process().create_time()
            assert read_holder(tmp_path / "run.lock") == (os.getpid(), host, started)
        assert not (tmp_path / "run.lock").exists()


def test_r12_weight_that_overflows_reaches_no_file(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and gradients are finite, the step makes a weight infinite: exit code 3, and nothing holds that weight."""

    class Overflowing(RecipeTrainer):
        def _get_learning_rate(self) -> float:  # called right after the optimizer's step
            if self.state.global_step == 2:
                with torch.no_grad():
                    self._core.lm_head.weight[3, 3] = float("inf")
            return super()._get_learning_rate()

    path = write_recipe(max_steps=3, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "RecipeTrainer", Overflowing)
        assert main(["--config", str(path)]) == 3
    assert "step 3: a weight is not finite. Nothing was saved" in capsys.readouterr().err
    saved = list((tmp_path / "run").rglob("*.safetensors"))
    assert {one.parent.name for one in saved} == {"checkpoint-1", "checkpoint-2"}
    assert all(bool(tensor.isfinite().all()) for one in saved for tensor in load_file(one).values())


def test_r12_run_that_changes_nothing(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate too small for the weights' precision ends in a fault, not in a copy of the base."""
    assert (
        main(["--config", str(write_recipe(learning_rate=1e-30, max_steps=2, save_strategy="no"))])
        == 3
    )
    assert "no weight has changed since the start" in capsys.readouterr().err


def test_r17_broken_evaluation_is_found_before_the_first_step(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Generation that raises, and a best metric that no evaluation gives, end the run before it has trained a step."""
    evaluated = {
        "eval_split": 8,
        "eval_strategy": "epoch",
        "evaluation": {"rows": 2, "max_new_tokens": 4},
    }
    path = write_recipe(
        **evaluated,
        metric_for_best_model="bleu",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    with pytest.raises(
        InputError, match=r"no evaluation gives 'eval_bleu'. Fix: use one of .*eval_exact_match"
    ):
        train(load_recipe(path))
    assert not (tmp_path / "run/log.jsonl").exists()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("generation")

    monkeypatch.setattr("sft_recipes.training.evaluate_while_training.evaluate", full)
    with pytest.raises(torch.OutOfMemoryError, match="generation"):
        train(load_recipe(write_recipe(**evaluated, output_dir="./run2")))
    assert not (tmp_path / "run2/log.jsonl").exists()


def test_r17_rehearsal_changes_nothing(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With dropout, a run with the rehearsal and one without it have the same weights and the same log."""
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    evaluation = {
        "eval_split": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "evaluation": {"rows": 2, "max_new_tokens": 4},
    }
    path = write_recipe(**lora, **evaluation)
    with_it = train(load_recipe(path))
    called: list[Any] = []
    monkeypatch.setattr(page, "rehearse_evaluation", called.append)
    without = train(load_recipe(path, {"output_dir": str(tmp_path / "without")}))
    assert called
    assert (with_it / "adapter_model.safetensors").read_bytes() == (
        without / "adapter_model.safetensors"
    ).read_bytes()
    for key in ("loss", "eval_loss", "num_tokens", "eval_exact_match"):
        assert logged(with_it, key) == logged(without, key)


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_r16_strategy_that_is_not_active(
    asked: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy named in the environment of the launch that the trainer does not run is refused before a step."""
    path = write_recipe()
    trainer = trainer_for(path)
    page.check_active(load_recipe(path), trainer)
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(InputError, match=f"{asked}: asked for True, active False"):
        page.check_active(load_recipe(path), trainer)
    with pytest.raises(InputError, match="4-bit weights: asked for True, active False"):
        monkeypatch.delenv(f"ACCELERATE_USE_{asked}")
        page.check_active(load_recipe(path, {"use_peft": True, "load_in_4bit": True}), trainer)
