"""The console command: what it prints for programs, and the exit codes it ends in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import cli
from sft_recipes.recipe import shipped_recipes
from sft_recipes.recipe_copies import copy_recipe


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `sft-recipes ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_init_lists_what_ships(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`init --json` names every shipped recipe once, with a summary."""
    code, out, _ = run(capsys, monkeypatch, "init", "--json")
    listed = json.loads(out)
    assert code == 0 and [one["name"] for one in listed] == [one.name for one in shipped_recipes()]
    assert all(one["summary"] for one in listed)


@pytest.mark.parametrize(
    "name", ["quickstart/ful", "../../etc/passwd", "/etc/passwd", "quickstart/../x"]
)
def test_init_refuses_names_that_do_not_ship(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unknown or unsafe name ends in exit code 2 and writes nothing."""
    code, _, err = run(capsys, monkeypatch, "init", name, "--output", str(tmp_path / "out"))
    assert code == 2 and "there is no shipped recipe" in err
    assert not (tmp_path / "out").exists()


def test_copied_recipe_is_whole_and_never_overwrites(tmp_path: Path) -> None:
    """A copy holds the recipe, its README, base and data; a second copy is refused unless forced."""
    files = {
        file.relative_to(tmp_path).as_posix() for file in copy_recipe("quickstart/full", tmp_path)
    }
    assert {"full.yaml", "README.md", "base/model.safetensors", "data/train.jsonl"} <= files
    with pytest.raises(Exception, match="exists already"):
        copy_recipe("quickstart/full", tmp_path)
    assert copy_recipe("quickstart/full", tmp_path, force=True)


def test_inspect_json_has_ids_and_labels(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    base_folder: Path,
    write_rows: Callable[..., Path],
) -> None:
    """One line a row: its 0-based number, source, text, ids, and labels that are the ids or -100."""
    data = write_rows(
        [{"instruction": "Say one.", "output": "one"}, {"instruction": "Say two.", "output": "two"}]
    )
    code, out, _ = run(
        capsys, monkeypatch, "inspect", str(data), "--tokenizer", str(base_folder), "--json"
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["row"] for row in rows] == [0, 1]
    for row, answer in zip(rows, ("one", "two"), strict=True):
        assert set(row) == {"row", "source", "text", "input_ids", "labels"}
        assert row["text"].endswith(f"### Response:\n{answer}<|endoftext|>")
        assert all(
            label in (-100, token)
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        )


def test_train_json_ends_in_the_runs_state(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
) -> None:
    """With --json stdout holds the final state alone; a refused key is exit code 2."""
    path = str(write_recipe(max_steps=1))
    code, out, err = run(capsys, monkeypatch, "train", path, "--json")
    state = json.loads(out)
    assert (code, state["state"], state["step"]) == (0, "finished", 1)
    assert "run folder" in err
    code, _, err = run(capsys, monkeypatch, "train", path, "--learning_rat", "1e-4")
    assert code == 2 and "did you mean 'learning_rate'?" in err
