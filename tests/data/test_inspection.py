"""`inspect`: no row that is read is passed over without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_recipes import cli

ROWS = [
    {"instruction": "Say one.", "output": "one"},
    {"instruction": "Say two.", "output": 2},
    {"instruction": "Say three.", "output": "three"},
    {"instruction": "Say four.", "output": ""},
]
SKIP = ("--on_bad_rows", "skip", "--max_rejected", "0.5")
Write = Callable[..., Path]


def inspect(
    path: Path,
    base: Path,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, str]:
    """What `inspect` prints to stdout and stderr; its exit code is 0."""
    arguments = ["inspect", str(path), "--tokenizer", str(base), *options]
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    return captured.out, captured.err


def test_skipped_rows_are_named_and_counted(
    base_folder: Path,
    write_rows: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each row is shown, or listed with its file and line and what to do; the counts add up."""
    path = write_rows(ROWS)
    out, _ = inspect(path, base_folder, (*SKIP, "--rows", "9"), monkeypatch, capsys)
    assert f"rejected, {path}:2: output: expected a string, got int. Fix: write a string." in out
    assert f"rejected, {path}:4: output: the answer is empty. Fix: " in out
    assert "2 rows shown, " in out
    assert " 0 dropped, 2 rejected (green = trained)" in out


def test_rows_before_an_early_end_are_named(
    base_folder: Path,
    write_rows: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where only the first rows are looked at, a bad one among them is said, though it may stop none."""
    path = write_rows([ROWS[1], ROWS[0], ROWS[2], ROWS[0]])
    out, _ = inspect(path, base_folder, ("--rows", "2"), monkeypatch, capsys)
    assert f"rejected, {path}:1: output: expected a string" in out
    assert "2 rows shown, " in out and ", 1 rejected (green" in out
    out, _ = inspect(write_rows(ROWS[:1]), base_folder, (), monkeypatch, capsys)
    assert "rejected" not in out


def test_json_has_a_line_for_every_row(
    base_folder: Path,
    write_rows: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rejected rows stand behind the others with their place and reason; the count goes to stderr."""
    path = write_rows(ROWS)
    out, err = inspect(path, base_folder, (*SKIP, "--json"), monkeypatch, capsys)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["row"] for row in rows] == [0, 2, 1, 3]
    assert all(set(row) == {"row", "source", "rejected"} for row in rows[2:])
    assert rows[2]["rejected"].startswith(f"{path}:2: output: ")
    assert rows[3]["rejected"].startswith(f"{path}:4: output: ")
    assert "2 rows rejected" in err
