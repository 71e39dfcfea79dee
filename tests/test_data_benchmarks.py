"""The benchmarks of prepared rows run to their end on few rows."""

from __future__ import annotations

import subprocess
import sys

import pytest


def printed(*arguments: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_many_rows() -> None:
    """45,000 rows in three shards, killed with one sealed: the same files as undisturbed, and the table."""
    shown = printed("benchmarks.many_rows", "--rows", "45000", "--workers", "2")
    assert "1 of 3 shards sealed" in shown and "are the same as undisturbed" in shown
    assert shown.splitlines()[-1].split()[0] == "64"


@pytest.mark.slow
def test_first_step() -> None:
    """3,000 generated rows are taken as prepared, and one step is trained."""
    shown = printed("benchmarks.first_step", "--rows", "3000")
    assert shown.startswith("3,000 rows, ") and "first optimizer step" in shown
