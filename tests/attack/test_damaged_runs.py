"""Damaged run, model and data folders: every command says which file it is, and none ends in a traceback."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import main, train
from tests.attack.damage import DAMAGES, PLACES, Table, copy_of, damage
from tests.conftest import build_model, build_tokenizer, instruction_rows
from tests.training.test_checkpoints import interrupted_run

pytestmark = pytest.mark.slow
KINDS = (*DAMAGES, *PLACES)
# JSON says the same after it.
WITHOUT_MEANING = ("a byte short", "joined lines")
# Of the ways in which each file is damaged so many are drawn.
DRAWN = int(os.environ.get("SFT_RECIPES_DAMAGES", "3"))
SEED = int(os.environ.get("SFT_ATTACK_SEED", "16"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, recipes, and of each kind a finished run with an evaluation and one that broke off."""
    from sft_recipes import cli

    folder = tmp_path_factory.mktemp("damaged") / "whole"
    folder.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    build_model(len(tokenizer)).save_pretrained(folder / "base")
    rows = [json.dumps(row) + "\n" for row in instruction_rows(24)]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "asked.jsonl").write_text("".join(rows[:4]))
    for kind, keys in {"full": {}, "lora": {"use_peft": True, "lora_r": 4}}.items():
        values = {
            "model_name_or_path": "./base",
            "dataset_name": "./train.jsonl",
            "output_dir": f"./{kind}",
            "max_steps": 3,
            "eval_split": 4,
            "save_steps": 1,
            "save_total_limit": 2,
            "disable_tqdm": True,
            "report_to": "none",
            **keys,
        }
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(values))
        train(load_recipe(path))
        assert (
            cli.run(
                [
                    "evaluate",
                    str(folder / kind),
                    "--data",
                    str(folder / "asked.jsonl"),
                    "--max_new_tokens",
                    "2",
                ]
            )
            == 0
        )
        interrupted_run(path, folder / f"broken_{kind}")
    return folder


def attack(
    project: Path,
    below: str,
    commands: list[list[str]],
    table: Table,
    capsys: pytest.CaptureFixture[str],
    limit: int,
) -> int:
    """Damage each file below a folder of the project in `limit` of the ways, chosen by chance, and run the commands."""
    draw = random.Random(f"{SEED} {below}")
    target = project.parent / "attacked"
    files = sorted(path for path in (project / below).rglob("*") if path.is_file())
    tried = 0
    for file in files:
        name = file.relative_to(project)
        for kind in draw.sample(KINDS, limit):
            copy = copy_of(project, target)
            damage(copy / name, kind)
            for command in commands:
                arguments = [
                    part.replace("RUN", str(copy / below)).replace("ALL", str(copy))
                    for part in command
                ]
                table.run(f"{name} {kind}", arguments, lambda: capsys.readouterr().err)
            tried += 1
    return tried


RUNS = {
    "full": [["train", "ALL/full.yaml"], ["evaluate", "RUN", "--data", "ALL/asked.jsonl", "--max_new_tokens", "2"],
             ["export", "RUN", "--force"]],
    "lora": [["evaluate", "RUN", "--data", "ALL/asked.jsonl", "--max_new_tokens", "2"], ["export", "RUN", "--force"]],
    "broken_full": [["train", "ALL/full.yaml", "--output_dir", "RUN", "--save_steps", "1"]],
    "broken_lora": [["train", "ALL/lora.yaml", "--output_dir", "RUN", "--save_steps", "1"]],
    "base": [["check", "ALL/full.yaml"], ["train", "ALL/full.yaml", "--output_dir", "ALL/new"]],
}  # fmt: skip


@pytest.mark.parametrize("below", RUNS)
def test_damaged_folder(below: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No damage to any file of the folder ends a command in anything but a proper exit code with a message."""
    table = Table()
    tried = attack(project, below, RUNS[below], table, capsys, DRAWN)
    with capsys.disabled():
        table.print(f"{below}: {tried} damaged folders")
    assert table.outcomes.total() == tried * len(RUNS[below])
    assert not table.faults


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_MEANING])
def test_a_broken_newest_manifest_blocks_nothing(
    kind: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever happened to the newest checkpoint's manifest, the run goes on from the one before it, to its end."""
    copy = copy_of(project, project.parent / "attacked")
    run = copy / "broken_full"
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damage(newest / "manifest.json", kind)
    assert main(["--config", str(copy / "full.yaml"), "--output_dir", str(run)]) == 0
    assert f"skipped {newest.name}" in capsys.readouterr().out
    assert json.loads((run / "run_state.json").read_text())["state"] == "finished"
