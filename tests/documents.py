"""Fenced blocks of the documents: how each is tried, and the commands in it.

A block's first line says what it is. ```bash test: run in order, each command exits 0. ```bash slow:
run by a slow test of its own. ```bash refused: run like `test`, each command exits 2. ```bash found:
each exits 1. ```bash parse-only: needs a GPU, the Hub or files of the reader; its commands exist.
```text output: stands in what the commands of the block before it print; `about` where the numbers
may differ from one machine to the next.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What the documents name a folder for what their commands write.
SCRATCH = re.compile(r"/tmp/sft-recipes-\w+")
_FENCE = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block: `language` and `kind` stand behind the fence, `body` between the fences."""

    language: str
    kind: str
    body: str

    @property
    def commands(self) -> list[str]:
        """The lines that are no comments."""
        return [line for line in self.body.splitlines() if line.strip() and line[0] != "#"]


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    return [Block(match[1], match[2] or "", match[3]) for match in _FENCE.finditer(text)]


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, re.M))


def command_fault(command: str, verbs: Iterable[str]) -> str:
    """Why a command line cannot work in a checkout, or nothing. `verbs`: those of `sft-recipes`."""
    words = shlex.split(command)
    program = words[0]
    rest = words[1:]
    if program == "make":
        return "" if set(rest) <= make_targets() else f"no such target: {command}"
    if program == "sft-recipes":
        return "" if rest[0] in verbs else f"no such command: {command}"
    if program == "python":
        return _python_fault(rest, command)
    known = (program, *rest[:1]) in {("accelerate", "launch"), (".", ".venv/bin/activate")}
    return "" if known else f"no known program: {command}"


def _python_fault(arguments: Sequence[str], command: str) -> str:
    if arguments[0] == "-m":
        is_there = importlib.util.find_spec(arguments[1]) is not None
    else:
        is_there = (ROOT / arguments[0]).is_file()
    return "" if is_there else f"no such file or module: {command}"


def run(command: str, scratch: Path, root: Path = ROOT, exit_code: int = 0) -> str:
    """Run one command line from `root` with this Python and return what it prints.

    It must end with this exit code; what a command that is refused (2) prints stands on stderr. Folders that
    the documents write to lie in `scratch` instead; in the output they are as written.
    """
    words = shlex.split(SCRATCH.sub(str(scratch), command))
    program = {"sft-recipes": [sys.executable, "-m", "sft_recipes"], "python": [sys.executable]}
    done = subprocess.run(
        [*program[words[0]], *words[1:]],
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, f"{command}\n{done.stdout}\n{done.stderr}"
    written = SCRATCH.search(command)
    printed = done.stderr if exit_code == 2 else done.stdout
    return printed.replace(str(scratch), written.group() if written else str(scratch))


def apply_block(block: Block, root: Path) -> None:
    """Do in a copy of the project at `root` what a block of a how-to page shows.

    `KIND new FILE` is a whole file. `diff FILE` has lines to find (a space before them), to add (+)
    and to remove (-); what is to be found has to stand there exactly once. `@@` begins another place.
    """
    if block.language == "diff":
        path = root / block.kind
        text = path.read_text(encoding="utf-8")
        for place in re.split(r"^@@\n", block.body, flags=re.M):
            text = _changed(text, place, block.kind)
        path.write_text(text, encoding="utf-8")
    else:
        path = root / block.kind.removeprefix("new ")
        assert not path.exists(), f"{path} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body, encoding="utf-8")


def _changed(text: str, place: str, name: str) -> str:
    before = ""
    after = ""
    for line in place.splitlines(keepends=True):
        sign = line[0]
        if sign != "+":
            before += line[1:] or "\n"
        if sign != "-":
            after += line[1:] or "\n"
    assert text.count(before) == 1, f"{name} has {text.count(before)} times:\n{before}"
    return text.replace(before, after)


def missing_lines(shown: Block, printed: str) -> list[str]:
    """Lines of a block of output that were not printed, in its order; `...` stands for any lines."""
    read = _without_numbers if shown.kind == "output about" else str.rstrip
    remaining = iter([read(line) for line in printed.splitlines()])
    missing: list[str] = []
    for line in shown.body.splitlines():
        wanted = read(line)
        if wanted not in ("", "...") and wanted not in remaining:
            missing.append(line)
    return missing


def _without_numbers(line: str) -> str:
    # A number of other length moves what stands beside it in a table.
    return re.sub(" +", " ", re.sub(r"[+-]?\d[\d.,e-]*", "#", line.rstrip()))
