"""The README's commands work: fenced blocks say how they are tried (`test`, `slow`, `parse-only`)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```(\w+)(?: ([\w-]+))?\n(.*?)^```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.M | re.S,
)


def commands(how: str) -> list[str]:
    """All command lines in blocks of one kind."""
    return [
        line
        for _, kind, body in BLOCKS
        if kind == how
        for line in body.splitlines()
        if line.strip()
    ]


def test_every_block_says_how_it_is_tried() -> None:
    """No command stands in the README without being run or named as one that is only parsed."""
    assert BLOCKS
    assert {(language, kind) for language, kind, _ in BLOCKS} <= {
        ("bash", kind) for kind in ("test", "slow", "parse-only")
    }


def test_every_command_exists() -> None:
    """Every command line names an existing make target, console command or launcher."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    from sft_recipes.cli import app

    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    verbs |= {group.name for group in app.registered_groups}
    for line in commands("test") + commands("slow") + commands("parse-only"):
        first, second = shlex.split(line)[:2]
        assert (
            (first, second) == ("accelerate", "launch")
            or (first == "make" and second in targets)
            or (first == "sft-recipes" and second in verbs)
        ), line


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """The commands of the README, run in order from the repository's root, all exit 0."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for line in commands("test"):
        words = shlex.split(line.replace("/tmp/sft-recipes-readme", str(tmp_path / "out")))
        assert words[0] == "sft-recipes"
        done = subprocess.run(
            [sys.executable, "-m", "sft_recipes", *words[1:]],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_quickstart_reaches_its_figures() -> None:
    """`make quickstart`'s steps run to the end, and the tuned model is what the README of the quickstart says."""
    done = subprocess.run(
        [sys.executable, "scripts/quickstart/run.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the whole loop took" in done.stdout
