"""`init --from` on rows that are at hand: what the other tool would train of them, beside what is trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sft_recipes.foreign.new_recipe import ForeignRequest, write_foreign

ROWS = [
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {"instruction": "Name a bird.", "output": "A wren, which is small and brown."},
]


@pytest.fixture
def translated(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ForeignRequest]:
    """A config of keys beside two rows, ready to be translated from the folder that holds both."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    info = {"mine": {"file_name": "rows.jsonl"}}
    Path("dataset_info.json").write_text(json.dumps(info))

    def request(**keys: object) -> ForeignRequest:
        path = Path("config.yaml")
        path.write_text(yaml.safe_dump(keys))
        return ForeignRequest(path, Path("out"), model=str(base_folder))

    return request


AXOLOTL = {
    "base_model": "a/b",
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "learning_rate": 1e-4,
    "micro_batch_size": 1,
    "sequence_len": 128,
}


def test_rows_that_are_trained_alike_are_counted(
    translated: Callable[..., ForeignRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    """Alpaca rows of axolotl are the same here, token by token, with the template that the recipe names."""
    written = write_foreign(translated(**AXOLOTL))
    assert written.rows is not None
    assert written.as_json()["rows"]["same"] == 2
    written.print_text()
    assert (
        "first 2 rows of rows.jsonl: 2 trained as in axolotl, 0 otherwise"
        in capsys.readouterr().out
    )


def test_an_answer_that_is_cut_is_shown_both_ways(
    translated: Callable[..., ForeignRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA-Factory cuts a row at its limit; the row stands there as it trains it, and as it is here."""
    request = translated(
        model_name_or_path="a/b",
        stage="sft",
        do_train=True,
        finetuning_type="full",
        dataset="mine",
        dataset_dir=".",
        template="alpaca",
        cutoff_len=40,
        output_dir="x",
    )
    written = write_foreign(request)
    assert written.rows is not None
    account = written.as_json()["rows"]
    assert account["different"] >= 1
    assert any("cut" in sentence for sentence in account["shown"][0]["differs"])
    written.print_text()
    shown = capsys.readouterr().out
    assert "LLaMA-Factory:" in shown and "here:" in shown


def test_rows_that_cannot_be_trained_leave_the_recipe(
    translated: Callable[..., ForeignRequest],
) -> None:
    """A broken row is said with its place; the recipe is written all the same, for its rows to be mended."""
    request = translated(**AXOLOTL)
    Path("rows.jsonl").write_text('{"instruction": "a", "output": 5}\n')
    written = write_foreign(request)
    assert written.files and written.rows is None
    assert "rows.jsonl:1" in written.rows_fault


def test_without_rows_nothing_is_compared(translated: Callable[..., ForeignRequest]) -> None:
    """A data set of the Hub is left to `check`."""
    request = translated(**{**AXOLOTL, "datasets": [{"path": "org/set", "type": "alpaca"}]})
    written = write_foreign(request)
    assert written.files and written.rows is None and written.rows_fault == ""
