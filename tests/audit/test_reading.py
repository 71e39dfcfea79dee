"""Rows of all files of an audit: numbered over all, those that cannot be read named by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_recipes.audit.cleaning import KEPT
from sft_recipes.errors import InputError
from sft_recipes.recipe import DatasetSource
from tests.audit.audited import audit, finding, instruction, lines

WriteRows = Callable[..., Path]

GOOD = json.dumps(instruction("Say one.", "one"))
BAD_ROWS = {
    "cut off": '{"instruction": "x", "output": "y',
    "invalid UTF-8": b'{"instruction": "x", "output": "\xff"}',
    "lone surrogate": '{"instruction": "x", "output": "\\ud800"}',
    "no object": "[1, 2]",
    "duplicate key": '{"instruction": "x", "output": "y", "output": "z"}',
    "not a number": '{"instruction": "x", "output": NaN}',
    "missing field": '{"instruction": "x"}',
    "null": '{"instruction": "x", "output": null}',
    "number": '{"instruction": "x", "output": 18}',
    "empty answer": '{"instruction": "x", "output": " \\n"}',
    "other schema": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    ),
    "labels": '{"instruction": "x", "output": "y", "labels": [1]}',
    "template": '{"instruction": "x", "output": "y", "chat_template": "z"}',
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_malformed_rows_are_found_where_they_stand(name: str, tmp_path: Path) -> None:
    """A row that cannot be read is an error at its own line; the rows around it are audited."""
    bad = BAD_ROWS[name]
    if isinstance(bad, str):
        bad = bad.encode()
    path = tmp_path / "train.jsonl"
    other = json.dumps(instruction("Say two.", "two"))
    path.write_bytes(b"\n".join([GOOD.encode(), bad, other.encode()]))
    content = audit(path, clean=tmp_path / "out")
    malformed = finding(content, "malformed")
    assert malformed["severity"] == "error"
    assert malformed["count"] == 1
    assert malformed["n"] == 3
    assert malformed["examples"][0]["where"] == f"{path}:2"
    assert malformed["examples"][0]["detail"]
    assert content["rows_read"] == 2
    assert len(lines(tmp_path / "out" / KEPT)) == 2


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "x"), ("wizard", "y")],
        [("user", "x"), ("assistant", "y"), ("user", "z")],
        [("user", "x"), ("user", "y"), ("assistant", "z")],
        [("user", "x")],
        [],
    ],
)
def test_turns_out_of_order_are_malformed(
    turns: list[tuple[str, str]], write_rows: WriteRows
) -> None:
    """Unknown roles and turns in a wrong order are errors at their line."""
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    bad = [{"role": role, "content": content} for role, content in turns]
    path = write_rows([{"messages": good}, {"messages": bad}])
    assert finding(audit(path), "malformed")["examples"][0]["where"] == f"{path}:2"


@pytest.mark.parametrize(
    "content", ["", "\n\n", '{"instruction": "x"\n', '{"heading": "x", "note": "y"}\n']
)
def test_nothing_to_read_is_wrong_input(content: str, tmp_path: Path) -> None:
    """An empty file, one in which no row loads, and one of no known format are refused.

    Nothing is written.
    """
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"train\.jsonl"):
        audit(path)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_numbered_over_all_files(write_rows: WriteRows) -> None:
    """Rows of a second file go on counting where the first ends, bad ones too.

    They are cleaned by that number.
    """
    good = instruction("Say one.", "one")
    empty = instruction("Say two.", "</s>")
    shards = [
        [good, {"output": 1}, empty],
        [{"output": 2}, instruction("Say three.", "three"), empty | {"input": "x"}],
    ]
    for number, rows in enumerate(shards):
        path = write_rows(rows, f"data/train-0000{number}-of-00002.jsonl")
    content = audit(path.parent, clean=path.parents[1] / "out")
    assert [file["rows"] for file in content["files"]] == [3, 3]
    for check, indices in {"malformed": [1, 3], "empty_answer": [2, 5]}.items():
        assert [row["index"] for row in finding(content, check)["examples"]] == indices
    assert [row["output"] for row in lines(path.parents[1] / "out" / KEPT)] == ["one", "three"]


def test_evaluation_data_is_read_strictly(write_rows: WriteRows) -> None:
    """A bad row of an evaluation set is named: it would be compared with nothing."""
    path = write_rows([instruction("Say one.", "one")])
    other = write_rows([instruction("a", "b"), {"output": 1}], "e.jsonl")
    with pytest.raises(InputError, match=r"e\.jsonl:2: .*evaluation data"):
        audit(path, eval_data={"e": DatasetSource(str(other))})
