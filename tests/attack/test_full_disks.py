"""Disks that are full and folders that nobody may write to: a message with the place and exit code 2 or 3, no
traceback, and what was there before is still there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import cli
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import train
from tests.training.tiny import file_hashes

pytestmark = pytest.mark.slow
# A file longer than this cannot be written: as on a disk that has so much left.
LEFT = (0, 100, 20_000)
SAID = ("space", "cannot be written", "File too large")
COMMANDS: dict[str, tuple[str, ...]] = {
    "prepare": ("prepare", "RECIPE", "--output_dir", "TARGET"),
    "audit": ("audit", "RECIPE", "--output", "TARGET"),
    "check": ("check", "RECIPE", "--output_dir", "TARGET"),
    "evaluate": (
        "evaluate",
        "RUN",
        "--data",
        "DATA",
        "--max_new_tokens",
        "2",
        "--output",
        "TARGET",
    ),
    "export": ("export", "RUN", "--output", "TARGET"),
    "train": ("train", "RECIPE", "--output_dir", "TARGET"),
    "init": ("init", "quickstart/full", "--output", "TARGET"),
}


@pytest.fixture
def paths(write_recipe: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    """A recipe, its data, and a finished run of it."""
    recipe = write_recipe(max_steps=2, eval_split=4)
    run = train(load_recipe(recipe))
    return {"RECIPE": str(recipe), "RUN": str(run), "DATA": str(tmp_path / "train.jsonl")}


@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk(command: str, paths: dict[str, str], tmp_path: Path) -> None:
    """Whatever does not fit is said, whether nothing fits or a part; files of before are untouched."""
    before = file_hashes(tmp_path / "run")
    table = []
    for left in LEFT:
        target = tmp_path / f"target_{left}"
        arguments = [{**paths, "TARGET": str(target)}.get(part, part) for part in COMMANDS[command]]
        code, text = run_limited(arguments, left)
        table.append((left, code))
        assert code in (0, 2, 3), text[-2000:]
        assert "Traceback" not in text and "internal error" not in text, text[-2000:]
        if code:
            assert any(words in text for words in SAID), text[-2000:]
            assert "Fix:" in text
    print(command, table)
    assert table[0][1], "nothing fits and yet it is done"
    assert file_hashes(tmp_path / "run") == before


# The command line in a process whose files cannot be longer than its first argument.
LIMITED = """
import resource, sys
from sft_recipes import cli
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(cli.run(sys.argv[1:]))
"""


def run_limited(arguments: list[str], limit: int) -> tuple[int, str]:
    """Exit code and everything that was printed; that goes to a pipe, which has no limit."""
    command = [sys.executable, "-c", LIMITED, str(limit), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a folder that not even root may write to")
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "check"])
def test_read_only_target(command: str, paths: dict[str, str], capfd: Any) -> None:
    """A target that cannot be written is named, with the fix."""
    values = {**paths, "TARGET": "/sys/sft_recipes"}
    code = cli.run([values.get(part, part) for part in COMMANDS[command]])
    text = capfd.readouterr().err
    assert code == 2, text[-2000:]
    assert "/sys" in text and "Fix:" in text


def test_full_temporary_folder(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Where only the temporary folder is full, or gone, `check` says so and names it."""
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/sys")
        code = cli.run(["check", paths["RECIPE"]])
    text = capfd.readouterr().err
    assert code == 2 and "/sys" in text and "Fix:" in text, text[-2000:]
