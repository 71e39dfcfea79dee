"""Trackers see losses, evaluations and a few answers, on this machine alone; without `report_to` there is none.

Each test runs where its tracker is installed: `pip install 'sft-recipes[trackio]'`, `wandb`, `tensorboard`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.construction import check_construction
from sft_recipes.training.trackers import SHOWN_ANSWERS

# Trains a recipe in a process that may not reach any address but its own machine's. Trackers read
# their folder from the environment when they are imported, so each run has a process of its own.
TRAIN = """
import socket, sys

def guarded(connect):
    def connect_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise SystemExit(f"a connection to {address}")
        return connect(self, address)
    return connect_here

socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)

def resolve_here(host, *arguments, **options):
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"a look-up of {host}")
    return resolve(host, *arguments, **options)

resolve = socket.getaddrinfo
socket.getaddrinfo = resolve_here
from sft_recipes.training.train import main
sys.exit(main(["--config", sys.argv[1]]))
"""


@pytest.fixture
def train_tracked(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """Train a recipe with two evaluations for a tracker; returns what the run printed."""

    def train(tracker: str | None, **environment: str) -> str:
        recipe = write_recipe(
            report_to=tracker,
            eval_strategy="epoch",
            num_train_epochs=2,
            eval_split=0.2,
            evaluation={"rows": 3, "max_new_tokens": 8, "max_share": 1.0},
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
        ended = subprocess.run(
            [sys.executable, "-c", TRAIN, str(recipe)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        return ended.stdout + ended.stderr

    return train


def read_with(code: str, folder: Path) -> str:
    """What a program prints whose trackio keeps its data in `folder`."""
    environment = {**os.environ, "TRACKIO_DIR": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_trackio_keeps_losses_evaluations_and_answers_here(
    train_tracked: Callable[..., str], tmp_path: Path
) -> None:
    """Its local data holds the loss, the evaluation's metrics and a table of answers for each evaluation; no
    connection leaves the machine, and the run is called as its folder is.
    """
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    said = train_tracked("trackio", TRACKIO_DIR=str(folder))
    assert "trackio show" in said
    code = """
import json, trackio
(run,) = trackio.Api().runs("huggingface")
print(run.name)
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("huggingface", run.name), default=str))
"""
    name, logged = read_with(code, folder).splitlines()[-2:]
    entries: list[dict[str, Any]] = json.loads(logged)
    keys = {key for entry in entries for key in entry}
    assert name == "run"
    assert {"train/loss", "eval/loss", "eval/exact_match"} <= keys
    tables = [entry["sample answers"]["_value"] for entry in entries if "sample answers" in entry]
    assert len(tables) == 2
    assert [len(table) for table in tables] == [3, 3]
    assert set(tables[0][0]) == {"prompt", "expected", "answer"}
    assert tables[0][0]["prompt"].startswith("Say ")


@pytest.mark.slow
def test_wandb_offline_keeps_a_table_of_answers(
    train_tracked: Callable[..., str], tmp_path: Path
) -> None:
    """With WANDB_MODE=offline everything stands in a folder, the answers of both evaluations in it."""
    pytest.importorskip("wandb")
    train_tracked("wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    tables = sorted(runs[0].rglob("sample*answers*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text(encoding="utf-8"))
    assert table["columns"] == ["prompt", "expected", "answer"]
    assert len(table["data"]) == 3
    assert list(runs[0].glob("run-*.wandb"))


@pytest.mark.slow
def test_tensorboard_holds_scalars_and_answers(
    train_tracked: Callable[..., str], tmp_path: Path
) -> None:
    """Its event files, inside the run folder, hold the loss, the evaluation's metrics and the answers."""
    pytest.importorskip("tensorboard")
    train_tracked("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "run" / "runs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    tags = read.Tags()
    assert {"train/loss", "eval/loss", "eval/exact_match"} <= set(tags["scalars"])
    answers = read.Tensors("sample answers/text_summary")
    assert len(answers) == 2
    assert b"| prompt | expected | answer |" in answers[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("name", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"])
def test_an_environment_that_sends_is_refused(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What would make trackio send the log away ends the run before it begins, with the command that ends it."""
    monkeypatch.setenv(name, "somebody/space")
    recipe = load_recipe(write_recipe(report_to="trackio"))
    with pytest.raises(InputError, match=f"Fix: unset {name}"):
        check_construction(recipe)
    check_construction(load_recipe(write_recipe("without.yaml", report_to=None)))


def test_no_tracker_is_on_by_default(write_recipe: Callable[..., Path]) -> None:
    """A recipe that names none has none, and trackio's copy to a Space is off whatever it names."""
    from sft_recipes.training.arguments import sft_config

    config = sft_config(load_recipe(write_recipe(report_to=None)))
    assert config.report_to == []
    assert config.trackio_static_space_id is False
    assert config.trackio_space_id is None
    assert SHOWN_ANSWERS < 10
