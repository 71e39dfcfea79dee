"""A mixture is remixed without tokenizing again: in its own folder, and in another run's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import cli
from sft_recipes.data.encoding import Encoder
from sft_recipes.data.mixture import data_set_names
from sft_recipes.recipe import DatasetSource
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import instruction_rows
from tests.data.test_prepare import prepared

A = {"path": "./a.jsonl"}
B = {"path": "./b.jsonl"}
REMIXES: dict[str, dict[str, Any]] = {
    "weight": {"datasets": [{**A, "weight": 2.5}, {**B, "weight": 0.5}]},
    "fraction": {"datasets": [{**A, "fraction": 0.5}, {**B, "fraction": 0.5}]},
    "max_rows": {"datasets": [A, B], "max_rows": 7},
    "eval_split": {"datasets": [A, B], "eval_split": 3},
}
EXPECTED = {
    "weight": {"a": 50, "b": 5},
    "fraction": {"a": 10, "b": 10},
}


class Encodings:
    """How many rows were made into ids: a file, since rows are labelled in a process of their own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.forget()

    def add(self, count: int) -> None:
        with self._path.open("a") as file:
            file.write("x" * count)

    def count(self) -> int:
        return self._path.stat().st_size

    def forget(self) -> None:
        self._path.write_text("")


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Encodings:
    """Counts the rows of each call that makes ids of texts."""
    counter = Encodings(tmp_path / "encodings")
    encode = Encoder.encode

    def counted(self: Encoder, rows: Any) -> Any:
        counter.add(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", counted)
    return counter


@pytest.fixture
def recipe(
    write_rows: Callable[..., Path], write_recipe: Callable[..., Path]
) -> Callable[..., Path]:
    """A mixture of 20 rows and 10 rows; `eval_split` 0 unless it is set."""
    rows = instruction_rows(30)
    write_rows(rows[:20], "a.jsonl")
    write_rows(rows[20:], "b.jsonl")

    def write(**keys: Any) -> Path:
        return write_recipe(**{"datasets": [A, B], **keys})

    return write


@pytest.mark.parametrize("case", REMIXES)
def test_another_mixture_calls_no_tokenizer(
    case: str, recipe: Callable[..., Path], encodings: Encodings
) -> None:
    """Weights, shares, `max_rows` and the size of the split are drawn from the rows that are there."""
    keys = dict(REMIXES[case])
    split = {"eval_split": 5} if "eval_split" in keys else {}
    prepared(recipe(**split))
    assert encodings.count() >= 30
    encodings.forget()
    data = prepared(recipe(**keys))
    assert not encodings.count()
    if case in EXPECTED:
        rows = {name: part["rows"] for name, part in data.summary["mixture"].items()}
        assert rows == EXPECTED[case] and len(data.train) == sum(rows.values())


def test_another_run_takes_the_rows(
    recipe: Callable[..., Path],
    encodings: Encodings,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """`prepare --reuse RUN` fills another run's folder without a call of the tokenizer, and says the mixture."""
    prepared(recipe())
    encodings.forget()
    path = str(recipe(datasets=[{**A, "weight": 2}, {**B, "weight": 3}]))
    code = cli.run(
        ["prepare", path, "--output_dir", str(tmp_path / "two"), "--reuse", str(tmp_path / "run")]
    )
    out = capsys.readouterr().out
    assert code == 0 and not encodings.count()
    assert "mixture: 40 rows of a" in out and "mixture: 30 rows of b" in out
    assert len(prepared(Path(path), output_dir=str(tmp_path / "two")).train) == 70
    assert not encodings.count()


@pytest.mark.parametrize(
    ("keys", "what"),
    [({"max_length": 64}, "others: settings"), ({"chat_template": "chatml"}, "others: template")],
)
def test_other_rows_are_not_taken(
    keys: dict[str, Any],
    what: str,
    recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Rows that would be others are refused, by what changed; nothing is written."""
    prepared(recipe())
    path = str(recipe(**keys))
    code = cli.run(
        ["prepare", path, "--output_dir", str(tmp_path / "two"), "--reuse", str(tmp_path / "run")]
    )
    assert code == 2 and what in capsys.readouterr().err
    assert not (tmp_path / "two" / "prepared").exists()


def test_what_is_not_there_and_what_is_there_already_are_refused(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder without prepared rows gives none, and rows that a run has are not written over."""
    path = str(recipe())
    assert cli.run(["prepare", path, "--reuse", str(tmp_path / "nothing")]) == 2
    assert "there are no prepared rows" in capsys.readouterr().err
    prepared(Path(path))
    prepared(Path(path), output_dir=str(tmp_path / "two"))
    assert cli.run(["prepare", path, "--reuse", str(tmp_path / "two")]) == 2
    assert "has prepared rows already" in capsys.readouterr().err
    assert cli.run(["prepare", path, "--reuse", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["./chat.jsonl", "org/code"], ["chat", "code"]),
        (["a/train.jsonl", "b/train.jsonl"], ["a-train", "b-train"]),
        (["train.jsonl", "train.jsonl"], ["train", "train-2"]),
        (["aux.jsonl"], ["aux-2"]),
    ],
)
def test_names_of_data_sets(paths: list[str], names: list[str]) -> None:
    """Short, no two alike, and none that TRL logs a loss under."""
    assert data_set_names([DatasetSource(path) for path in paths]) == names


def test_configs_of_one_hub_set_have_names_of_their_own() -> None:
    """The config stands before the name of the set."""
    sources = [DatasetSource("org/math", name="algebra"), DatasetSource("org/math", name="sums")]
    assert data_set_names(sources) == ["algebra-math", "sums-math"]


def test_held_out_rows_know_their_data_set(recipe: Callable[..., Path]) -> None:
    """Rows and conversations that are held out are of the set that their file says."""
    data = prepared(recipe(eval_split=9))
    assert data.held_out is not None and data.eval is not None
    by_number = Counter(data.held_out.names[number] for number in data.held_out.numbers)
    by_example = Counter(example.data_set for example in data.eval_examples)
    assert by_number == by_example and by_number.total() == len(data.eval) == 9
    for example in data.eval_examples:
        assert Path(example.source).stem == example.data_set
    assert load_recipe(recipe()).data.datasets[0].path.endswith("a.jsonl")
