"""The README is one page whose commands work; `tests/documents.py` says how blocks are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import README, blocks_of, missing_lines, run

LINES = 170
BLOCKS = blocks_of(README)


def test_the_readme_is_one_page() -> None:
    """Newcomers find what it is, two commands, the install and five commands for their own rows within 170 lines."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    assert [block.kind for block in BLOCKS].count("test") >= 1


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """The commands of the README, run in order from the root, exit 0 and print what it shows."""
    printed = ""
    for block in BLOCKS:
        if (block.language, block.kind) == ("bash", "test"):
            printed = "".join(run(line, tmp_path) for line in block.commands)
        elif block.language == "text":
            assert not missing_lines(block, printed)


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path: Path) -> None:
    """`make quickstart`'s steps run to the end, and the tuned model is what the README of the quickstart says."""
    assert "the whole loop took" in run("python scripts/quickstart/run.py", tmp_path)
