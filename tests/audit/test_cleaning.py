"""What cleaning keeps and drops, of every kind of file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sft_recipes.audit.cleaning import DROPPED, DROPPED_CHECKS, KEPT
from sft_recipes.audit.finding import CHECKS
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.errors import InputError
from sft_recipes.recipe import DatasetSource, DataSettings
from tests.audit.audited import audit, instruction, lines, planted_rows
from tests.audit.planted import text

WriteRows = Callable[..., Path]


def test_cleaning_loses_nothing(write_rows: WriteRows) -> None:
    """Kept and dropped rows are the input, each as it was, the dropped ones with their reasons."""
    rows = [
        *planted_rows(clean=150, each=5),
        {"instruction": "x", "output": 3.0, "note": [1, None, "é"]},
    ]
    path = write_rows(rows)
    content = audit(path, clean=path.parent / "out")
    kept = lines(path.parent / "out" / KEPT)
    dropped = lines(path.parent / "out" / DROPPED)
    assert content["cleaned"] == {"kept": len(kept), "dropped": len(dropped)}
    assert len(kept) + len(dropped) == len(rows) == content["rows_in"]
    written = kept + [row["row"] for row in dropped]
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, rows))
    reasons = count_reasons(dropped)
    assert reasons == {"duplicate_row": 5, "empty_answer": 5, "malformed": 1}
    by_step = {step["reason"]: step["rows"] for step in content["waterfall"] if step["rows"]}
    assert by_step == reasons


def count_reasons(dropped: list[dict[str, Any]]) -> Counter[str]:
    """How many dropped rows have each reason."""
    return Counter(chain.from_iterable(row["reasons"] for row in dropped))


def test_what_is_kept_is_clean(write_rows: WriteRows) -> None:
    """A second cleaning drops nothing, and all kept rows load as they were."""
    path = write_rows([*planted_rows(clean=150, each=5), {"instruction": "x", "output": 3.0}])
    audit(path, clean=path.parent / "out")
    kept_file = path.parent / "out" / KEPT
    again = audit(kept_file, clean=path.parent / "again")
    assert again["cleaned"]["dropped"] == 0
    assert again["rows_malformed"] == 0
    settings = DataSettings(datasets=(DatasetSource(str(kept_file)),))
    examples = iter_examples(settings.datasets[0], settings, RejectLog(settings))
    loaded = [example.messages[-1]["content"] for example in examples]
    assert loaded == [row["output"] for row in lines(kept_file)]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_other_file_types_are_cleaned_to_rows(kind: str, tmp_path: Path) -> None:
    """Rows of an array or a table keep all their columns; dropped ones say where they stood."""
    rows = [
        {"instruction": "Say 0.", "output": "it is 0", "id": "0"},
        {"instruction": "Say 1.", "output": "<|im_end|>", "id": "1"},
        {"instruction": "Say 2.", "output": "it is 2", "id": "2"},
    ]
    path = tmp_path / f"rows.{kind}"
    content = json.dumps(rows, indent=1)
    if kind == "csv":
        table = [",".join(rows[0])]
        for row in rows:
            table.append(",".join(row.values()))
        content = "\n".join(table)
    path.write_text(content, encoding="utf-8")
    audit(path, clean=tmp_path / "out")
    assert lines(tmp_path / "out" / KEPT) == [row for row in rows if row["id"] != "1"]
    (dropped,) = lines(tmp_path / "out" / DROPPED)
    assert dropped["row"] == rows[1]
    assert dropped["reasons"] == ["empty_answer"]
    assert dropped["where"].startswith(str(path))


def test_correct_short_answers_are_all_kept(write_rows: WriteRows) -> None:
    """The same few labels to many prompts, and sums with a number as the answer, lose no row."""
    random = Random(3)
    labels = [
        "Yes",
        "No",
        "positive",
        "negative",
        "A",
        "N",
        "None of the above.",
        "1 star",
        "18",
        "Science and technology",
    ]
    rows = []
    for _ in range(600):
        rows.append(instruction(f"Which is it: {text(random, 15)}?", random.choice(labels)))
    for number in range(300):
        rows.append(instruction(f"What is {number} + {number + 1}?", str(2 * number + 1)))
    path = write_rows(rows)
    content = audit(path, clean=path.parent / "out")
    assert content["cleaned"]["dropped"] == 0
    assert {entry["severity"] for entry in content["findings"]} <= {"info"}


def test_cleaning_never_overwrites(write_rows: WriteRows) -> None:
    """A folder that exists is refused before the audit runs, so nothing at all is written."""
    path = write_rows([instruction("Say one.", "one")])
    (path.parent / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        audit(path, clean=path.parent / "out")
    assert sorted(path.parent.iterdir()) == sorted([path, path.parent / "out"])


def test_checks_named_decide_what_is_dropped(write_rows: WriteRows, tmp_path: Path) -> None:
    """`drop` names all that is dropped; a name that is no check is refused with the nearest one."""
    path = write_rows(planted_rows(clean=150, each=5))
    audit(path, clean=tmp_path / "out", drop=["identity", "placeholder"])
    dropped = lines(tmp_path / "out" / DROPPED)
    assert count_reasons(dropped) == {"identity": 5, "placeholder": 5}
    wrong = r"--drop: 'identitty' is no check. Fix: did you mean 'identity'"
    with pytest.raises(InputError, match=wrong):
        audit(path, drop=["identitty"])
    assert set(DROPPED_CHECKS) <= set(CHECKS)
