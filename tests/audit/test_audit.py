"""The whole audit on files: what it writes, what it says of bad input, and what cleaning keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from sft_recipes import cli
from sft_recipes.audit.audit import _unlabelled
from sft_recipes.audit.cleaning import KEPT
from sft_recipes.audit.finding import audit_rows
from sft_recipes.audit.lengths import TokenLengths, UnlabelledRow
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import DroppedRow
from sft_recipes.recipe import DatasetSource, TemplateSettings
from tests.audit.audited import audit, finding, instruction, lines, planted_rows
from tests.audit.planted import FAULTS, personal, plant, secret, text

WriteRows = Callable[..., Path]

KEYS = {
    "schema_version",
    "source",
    "files",
    "settings",
    "versions",
    "seconds",
    "rows_in",
    "rows_malformed",
    "rows_read",
    "findings",
    "passed",
    "waterfall",
    "lengths",
    "truncation",
    "duplicates",
    "contamination",
    "patterns",
    "diversity",
    "private_data",
    "samples",
}


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit code and stdout of `sft-recipes ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.fixture(scope="module")
def renderer(make_tokenizer: Callable[..., Any]) -> Any:
    """The tests' tokenizer with ChatML."""
    return attach_chat_template(make_tokenizer(), TemplateSettings(chat_template="chatml"))


def test_files_layout_and_report(write_rows: WriteRows, renderer: Any) -> None:
    """audit.json has every part, flagged.jsonl every flagged row at its line.

    The report is one HTML page.
    """
    rows = planted_rows(clean=200, each=5)
    path = write_rows([*rows, {"instruction": "x", "output": 3}], "rows.jsonl")
    same = write_rows(rows, "same.jsonl")
    content = audit(
        path,
        renderer=renderer,
        max_length=300,
        eval_data={"e": DatasetSource(str(same))},
        report=True,
    )
    folder = path.parent / "audit"
    written = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert written == {"schema_version": 1, **content}
    assert set(written) == KEYS | {"smallest_max_length"}
    assert content["rows_in"] == len(rows) + 1
    assert content["rows_malformed"] == 1
    assert content["rows_read"] == len(rows)
    assert content["files"][0]["rows"] == len(rows) + 1
    assert content["files"][0]["format"] == "instruction"
    flagged = lines(folder / "flagged.jsonl")
    checks = {entry["check"] for entry in content["findings"]}
    assert {row["check"] for row in flagged} == checks
    assert checks >= {*FAULTS, "truncation"}
    for entry in content["findings"]:
        of_check = [row for row in flagged if row["check"] == entry["check"]]
        assert entry["count"] == len({row["index"] for row in of_check}) > 0
        assert entry["share"] == entry["count"] / entry["n"]
        assert all(row["where"] == f"{path}:{row['index'] + 1}" for row in of_check)
    # The evaluation set holds the same rows.
    assert sum(step["rows"] for step in content["waterfall"]) == len(rows) + 1
    assert content["samples"]["dropped"]
    assert not content["samples"]["kept"]
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_samples_show_what_is_trained(write_rows: WriteRows, renderer: Any) -> None:
    """With a tokenizer the rendered row, the answer with its end of turn trained.

    Without one the turns.
    """
    path = write_rows([instruction("Say one.", "one")])
    (sample,) = audit(path, renderer=renderer)["samples"]["kept"]
    assert [text for text, is_trained in sample["text"] if is_trained] == ["one", "<|im_end|>"]
    whole = "".join(text for text, _ in sample["text"])
    assert whole.startswith("<|im_start|>user\nSay one.")
    (sample,) = audit(path)["samples"]["kept"]
    assert sample["text"] == [
        ["\nuser: ", False],
        ["Say one.", False],
        ["\nassistant: ", False],
        ["one", True],
    ]


def test_long_samples_keep_their_end(write_rows: WriteRows, renderer: Any) -> None:
    """The middle of a sample that is too long is left out, so that its trained end is seen."""
    content = audit(write_rows([instruction("Say it.", "one two " * 500)]), renderer=renderer)
    (sample,) = content["samples"]["kept"]
    answer, end = (text for text, is_trained in sample["text"] if is_trained)
    assert answer.startswith("one two one")
    assert answer.endswith("one two ")
    assert len(answer) < 1000
    assert end == "<|im_end|>"


def test_checks_that_passed_say_what_they_looked_for(write_rows: WriteRows, renderer: Any) -> None:
    """A check without rows is as complete as a finding.

    Truncation is none where there is no limit.
    """
    path = write_rows([instruction("Say one.", "one")])
    for limit in (None, 100):
        content = audit(path, renderer=renderer, max_length=limit)
        for entry in content["passed"]:
            assert entry["definition"]
            assert entry["fix"]
            assert entry["count"] == 0
        checks = {entry["check"] for entry in content["passed"]}
        assert ("truncation" in checks) == (limit is not None)


def test_no_secret_in_any_file_or_report(write_rows: WriteRows, renderer: Any) -> None:
    """No planted secret or address, nor half of one, stands in any file that an audit writes."""
    random = Random(5)
    values: list[str] = []
    rows: list[dict[str, Any]] = []
    for number in range(200):
        value = secret(random) if number % 2 else personal(random)
        # Values stand where texts are cut for show, and every text has a near-duplicate that is
        # shown beside it.
        before = text(random, random.randrange(40))
        after = text(random, 60)
        filler = "x" * (random.choice([120, 300, 1000]) - len(before) - random.randint(1, 30))
        prompt = f"{before} {filler} {value} {after}"
        rows.append(instruction(prompt, f"{value} is it, then\n{value}"))
        rows.append(instruction(prompt, f"{value} is it, so\n{value}"))
        values.append(value)
    rows += [*rows[:5], {"instruction": values[0], "output": None}, {values[1]: values[1]}]
    path = write_rows(rows)
    content = audit(path, renderer=renderer, eval_data={"e": write_eval(path)}, report=True)
    assert sum(content["private_data"].values()) >= 3 * 400
    written = ""
    for file in (path.parent / "audit").iterdir():
        written += file.read_text(encoding="utf-8")
    for value in values:
        length = len(value) // 2 + 3
        for half in (value[:length], value[-length:]):
            if len(half) > 9:
                assert half not in written
                assert json.dumps(half)[1:-1] not in written


def write_eval(path: Path) -> DatasetSource:
    """The first fifty rows again, as an evaluation set."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    copy = path.with_name("eval.jsonl")
    copy.write_text("".join(rows[:50]), encoding="utf-8")
    return DatasetSource(str(copy))


ODD = {
    "one row": [instruction("Say one.", "one")],
    "all identical": [instruction("Say one.", "one")] * 50,
    "one megabyte": [
        instruction("Say " + "long " * 200_000, "one"),
        instruction("Say it.", "x" * 100_000),
    ],
    "right to left": [
        instruction("اكتب جملة قصيرة عن البحر", f"البحر جميل {at} \u200f\u061c") for at in range(5)
    ],
    "zero width": [instruction("Say\u200b it\u200d.", "👩\u200d👩\u200d👧 yes \u2060")],
    "line separators": [instruction("Say\u2028it\u0085now.", "a\u2029b")],
    "template text": [
        instruction("### Response:\n{input} {{7*7}} {x.__class__}", "{0} {instruction} %s")
    ],
    "private use": [instruction("Say \uf5e0it\uf5e1.", "it")],
    "no words": [instruction("?", "!")],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_data_is_audited(name: str, write_rows: WriteRows, renderer: Any) -> None:
    """Unusual rows are neither lost nor a fault: all are read, none is dropped but repeats."""
    rows = ODD[name]
    path = write_rows(rows)
    content = audit(path, renderer=renderer, clean=path.parent / "out")
    assert content["rows_read"] == len(rows)
    assert content["rows_malformed"] == 0
    dropped = {"all identical": 49}.get(name, 0)
    assert content["cleaned"] == {"kept": len(rows) - dropped, "dropped": dropped}
    kept = lines(path.parent / "out" / KEPT)
    assert kept == rows[: len(kept)]


def test_rows_without_labels(write_rows: WriteRows, renderer: Any) -> None:
    """Rows of which no turn may be trained are an error where a tokenizer is given.

    Cleaning drops them. The same holds where no row has labels.
    """
    rows = []
    for is_trained in (True, False, False):
        answer = {"role": "assistant", "content": "y", "train": is_trained}
        rows.append({"messages": [{"role": "user", "content": "x"}, answer]})
    for chosen, first_line in ((rows, 2), (rows[1:], 1)):
        path = write_rows(chosen)
        content = audit(path, renderer=renderer, max_length=20)
        no_labels = finding(content, "no_labels")
        assert no_labels["severity"] == "error"
        assert no_labels["count"] == 2
        assert no_labels["examples"][0]["where"] == f"{path}:{first_line}"
        step = content["waterfall"][1]
        assert (step["reason"], step["rows"]) == ("no_labels", 2)


def test_rows_beyond_max_length_are_those_of_the_forecast(
    write_rows: WriteRows, renderer: Any
) -> None:
    """At every length that a row has, the finding counts the rows that the forecast counts."""
    path = write_rows([instruction("Say it.", "one " * count) for count in range(1, 8)])
    lengths = audit(path, renderer=renderer)["lengths"]["total_tokens"]
    for limit in range(lengths["min"], lengths["max"]):
        content = audit(path, renderer=renderer, max_length=limit)
        costs = {cost["max_length"]: cost for cost in content["truncation"]}
        assert finding(content, "truncation")["count"] == costs[limit]["rows_cut"] > 0


def test_a_row_with_one_labelled_turn_is_labelled() -> None:
    """A row counts as unlabelled if all its turns are, not if one of several is."""
    rows = audit_rows(plant(clean=2, each=0).examples)
    first = np.array([0])
    lost = []
    for position in (0, 1):
        loss = DroppedRow(position, "unverified", "messages[1]: why")
        lost.append(UnlabelledRow(position, loss))
    (flagged,) = _unlabelled(rows, TokenLengths(first, first, first, [], lost))
    assert flagged.index == 1
    assert flagged.detail == "unverified: messages[1]: why"


def test_overlap_with_the_recipes_own_split(
    write_rows: WriteRows,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A recipe's audit lies in its run folder and compares with the rows of its own split.

    An error ends in code 1.
    """
    rows = planted_rows(clean=60, each=0)
    write_rows(rows[:40], "data/train.jsonl")
    write_rows([*rows[40:], rows[3]], "data/test.jsonl")
    recipe = write_recipe(dataset_name="./data", dataset_test_split="test", max_length=1024)
    code, out = run(monkeypatch, capsys, "audit", str(recipe), "--json")
    content = json.loads(out)
    assert code == 1
    assert (tmp_path / "run" / "audit" / "audit.json").is_file()
    for check in ("split_leak", "contamination"):
        assert [row["index"] for row in finding(content, check)["examples"]] == [3]
    assert content["settings"]["max_length"] == 1024
    assert content["truncation"]


def test_command_on_data(
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without findings that are errors the code is 0.

    The verdict is short and names rows by file and line.
    """
    monkeypatch.chdir(tmp_path)
    write_rows([*planted_rows(clean=100, each=2)], "rows.jsonl")
    code, out = run(monkeypatch, capsys, "audit", "rows.jsonl", "--clean", "out")
    assert code == 0
    assert (tmp_path / "audit-rows" / "audit.json").is_file()
    assert (tmp_path / "out" / KEPT).is_file()
    printed = out.strip().splitlines()
    assert len(printed) <= 10
    assert "rows.jsonl:" in printed[1]
    assert "report: audit-rows/report.html" in out
    code, out = run(
        monkeypatch, capsys, "audit", "rows.jsonl", "--eval_data", "rows.jsonl", "--output", "other"
    )
    assert code == 1
    assert (tmp_path / "other" / "flagged.jsonl").is_file()
    assert "error: " in out
    code, _ = run(monkeypatch, capsys, "audit", "missing.jsonl")
    assert code == 2


def test_the_names_shown_are_those_to_drop(
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each check that the command prints is a word that `--drop` takes, and drops its rows."""
    monkeypatch.chdir(tmp_path)
    write_rows([*planted_rows(clean=100, each=2)], "rows.jsonl")
    _, out = run(monkeypatch, capsys, "audit", "rows.jsonl")
    names = re.findall(r"^(?:error|warning|info): (\w+): ", out, re.M)
    assert len(names) == 5
    for name in names:
        options = ("--clean", name, "--drop", name)
        _, out = run(monkeypatch, capsys, "audit", "rows.jsonl", *options)
        assert f"dropped: {name} " in out
