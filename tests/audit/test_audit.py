"""The whole audit on files: what it writes, what it says of bad input, and what cleaning keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from sft_recipes import cli
from sft_recipes.audit.audit import AuditRequest, _unlabelled, run_audit
from sft_recipes.audit.cleaning import DROPPED, DROPPED_CHECKS, KEPT
from sft_recipes.audit.finding import CHECKS, audit_rows
from sft_recipes.audit.lengths import TokenLengths
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import DroppedRow
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.errors import InputError
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings
from tests.audit.planted import FAULTS, personal, plant, secret, text

WriteRows = Callable[..., Path]

KEYS = {
    *(
        "schema_version",
        "source",
        "files",
        "settings",
        "versions",
        "seconds",
        "rows_in",
        "rows_malformed",
        "rows_read",
    ),
    *("findings", "passed", "waterfall", "lengths", "truncation", "duplicates", "contamination"),
    *("patterns", "diversity", "scripts", "private_data", "samples"),
}


def instruction(prompt: str, response: Any) -> dict[str, Any]:
    """A row as it stands in a file."""
    return {"instruction": prompt, "input": "", "output": response}


def planted_rows(**counts: int) -> list[dict[str, Any]]:
    """The rows of `plant` as they stand in a file."""
    messages = [example.messages for example in plant(**counts).examples]
    return [instruction(user["content"], assistant["content"]) for user, assistant in messages]


def audit(path: Path, **options: Any) -> dict[str, Any]:
    """Audit one file into `audit` beside it."""
    source = DatasetSource(str(path), format=options.pop("format", None))
    settings = DataSettings(datasets=(source,))
    labels = LabelSettings(max_length=options.pop("max_length", None))
    return run_audit(
        AuditRequest(path.name, settings, labels, path.parent / "audit", progress=False, **options)
    )


def finding(content: dict[str, Any], check: str) -> dict[str, Any]:
    """One finding of an audit."""
    (found,) = [one for one in content["findings"] if one["check"] == check]
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit code and stdout of `sft-recipes ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTML report has tests of its own and takes a second: only tests with `report` in their name write it."""
    if "report" not in request.node.name:
        monkeypatch.setattr("sft_recipes.audit.audit.write_audit_report", lambda folder: None)


@pytest.fixture(scope="module")
def renderer(make_tokenizer: Callable[..., Any]) -> Any:
    """The tests' tokenizer with ChatML."""
    return attach_chat_template(make_tokenizer(), TemplateSettings(chat_template="chatml"))


def test_files_layout_and_report(write_rows: WriteRows, renderer: Any) -> None:
    """audit.json has every part, flagged.jsonl every flagged row at its line, and the report is one HTML page."""
    rows = planted_rows(clean=200, each=5)
    path = write_rows([*rows, {"instruction": "x", "output": 3}], "rows.jsonl")
    same = write_rows(rows, "same.jsonl")
    content = audit(
        path, renderer=renderer, max_length=300, eval_data={"e": DatasetSource(str(same))}
    )
    folder = path.parent / "audit"
    assert json.loads((folder / "audit.json").read_text(encoding="utf-8")) == {
        "schema_version": 1,
        **content,
    }
    assert set(content) | {"schema_version"} == KEYS | {"smallest_max_length"}
    assert (content["rows_in"], content["rows_malformed"], content["rows_read"]) == (
        len(rows) + 1,
        1,
        len(rows),
    )
    assert (
        content["files"][0]["rows"] == len(rows) + 1
        and content["files"][0]["format"] == "instruction"
    )
    flagged = lines(folder / "flagged.jsonl")
    assert (
        {row["check"] for row in flagged}
        == {one["check"] for one in content["findings"]}
        >= {*FAULTS, "truncation"}
    )
    for one in content["findings"]:
        mine = [row for row in flagged if row["check"] == one["check"]]
        assert (
            one["count"] == len({row["index"] for row in mine}) > 0
            and one["share"] == one["count"] / one["n"]
        )
        assert all(row["where"] == f"{path}:{row['index'] + 1}" for row in mine)
    assert (
        sum(step["rows"] for step in content["waterfall"]) == len(rows) + 1
    )  # the evaluation set holds the same rows
    assert [sample["text"] for sample in content["samples"]["dropped"]] and not content["samples"][
        "kept"
    ]
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_samples_show_what_is_trained(write_rows: WriteRows, renderer: Any) -> None:
    """With a tokenizer the pieces are the rendered row and the trained ones the answer with its end of turn."""
    content = audit(write_rows([instruction("Say one.", "one")]), renderer=renderer)
    (sample,) = content["samples"]["kept"]
    assert [piece for piece, trained in sample["text"] if trained] == ["one", "<|im_end|>"]
    assert "".join(piece for piece, _ in sample["text"]).startswith("<|im_start|>user\nSay one.")
    assert audit(write_rows([instruction("Say one.", "one")]))["samples"]["kept"][0]["text"] == [
        ["\nuser: ", False],
        ["Say one.", False],
        ["\nassistant: ", False],
        ["one", True],
    ]


def test_long_samples_keep_their_end(write_rows: WriteRows, renderer: Any) -> None:
    """Where a sample is too long, its middle is left out, so that the trained end of turn is seen."""
    content = audit(write_rows([instruction("Say it.", "one two " * 500)]), renderer=renderer)
    piece, end = [piece for piece, trained in content["samples"]["kept"][0]["text"] if trained]
    assert piece.startswith("one two one") and piece.endswith("one two ") and len(piece) < 1000
    assert end == "<|im_end|>"


def test_checks_that_passed_say_what_they_looked_for(write_rows: WriteRows, renderer: Any) -> None:
    """A check without rows is as complete as a finding; truncation is none where there is no limit."""
    path = write_rows([instruction("Say one.", "one")])
    for limit in (None, 100):
        content = audit(path, renderer=renderer, max_length=limit)
        assert all(
            one["definition"] and one["fix"] and one["count"] == 0 for one in content["passed"]
        )
        assert ("truncation" in {one["check"] for one in content["passed"]}) == (limit is not None)


def test_no_secret_in_any_file_or_report(write_rows: WriteRows, renderer: Any) -> None:
    """No planted secret or address, nor half of one, stands in any file that an audit writes."""
    random, values, rows = Random(5), list[str](), list[dict[str, Any]]()
    for number in range(200):
        values.append((secret if number % 2 else personal)(random))
        # Values stand where texts are cut for show, and every text has a near-duplicate that is shown beside it.
        before, after = text(random, random.randrange(40)), text(random, 60)
        filler = "x" * (random.choice([120, 300, 1000]) - len(before) - random.randint(1, 30))
        prompt = f"{before} {filler} {values[-1]} {after}"
        rows += [
            instruction(prompt, f"{values[-1]} is it, {end}\n{values[-1]}")
            for end in ("then", "so")
        ]
    rows += [*rows[:5], {"instruction": values[0], "output": None}, {values[1]: values[1]}]
    path = write_rows(rows)
    content = audit(path, renderer=renderer, eval_data={"e": write_eval(path)})
    written = "".join(
        file.read_text(encoding="utf-8") for file in (path.parent / "audit").iterdir()
    )
    assert sum(content["private_data"].values()) >= 3 * 400
    halves = {
        part
        for value in values
        for part in (value[: len(value) // 2 + 3], value[-(len(value) // 2 + 3) :])
        if len(part) > 9
    }
    assert not [part for part in halves if part in written or json.dumps(part)[1:-1] in written]


def write_eval(path: Path) -> DatasetSource:
    """The first fifty rows again, as an evaluation set."""
    copy = path.with_name("eval.jsonl")
    copy.write_text(
        "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:50]), encoding="utf-8"
    )
    return DatasetSource(str(copy))


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
    "other schema": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    "labels": '{"instruction": "x", "output": "y", "labels": [1]}',
    "template": '{"instruction": "x", "output": "y", "chat_template": "z"}',
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_malformed_rows_are_found_where_they_stand(name: str, tmp_path: Path) -> None:
    """A row that cannot be read is an error at its own line; the rows around it are audited."""
    bad = BAD_ROWS[name]
    path = tmp_path / "train.jsonl"
    other = json.dumps(instruction("Say two.", "two"))
    path.write_bytes(
        b"\n".join([GOOD.encode(), bad if isinstance(bad, bytes) else bad.encode(), other.encode()])
    )
    content = audit(path, clean=tmp_path / "out")
    found = finding(content, "malformed")
    assert found["severity"] == "error" and found["count"] == 1 and found["n"] == 3
    assert found["examples"][0]["where"] == f"{path}:2" and found["examples"][0]["detail"]
    assert content["rows_read"] == 2 and len(lines(tmp_path / "out" / KEPT)) == 2


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
    """An empty file, one in which no row loads, and one of no known format are refused, and nothing is written."""
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"train\.jsonl"):
        audit(path)
    assert list(tmp_path.iterdir()) == [path]


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
    """Unusual rows are neither lost nor a fault: all are read, none is dropped but repeats, the report is written."""
    rows = ODD[name]
    path = write_rows(rows)
    content = audit(path, renderer=renderer, clean=path.parent / "out")
    assert content["rows_read"] == len(rows) and content["rows_malformed"] == 0
    dropped = {"all identical": 49}.get(name, 0)
    assert (content["cleaned"]["kept"], content["cleaned"]["dropped"]) == (
        len(rows) - dropped,
        dropped,
    )
    kept = lines(path.parent / "out" / KEPT)
    assert kept == rows[: len(kept)]


def test_rows_without_labels(write_rows: WriteRows, renderer: Any) -> None:
    """Rows of which no turn may be trained are an error where a tokenizer is given, and cleaning drops them."""
    answers = [{"role": "assistant", "content": "y", "train": flag} for flag in (True, False)]
    rows = [
        {"messages": [{"role": "user", "content": "x"}, answer]}
        for answer in (*answers, answers[1])
    ]
    for some, where in ((rows, "2"), (rows[1:], "1")):
        path = write_rows(some)
        content = audit(path, renderer=renderer, max_length=20)
        found = finding(content, "no_labels")
        assert found["severity"] == "error" and found["count"] == 2
        assert (
            found["examples"][0]["where"] == f"{path}:{where}"
            and content["waterfall"][1]["rows"] == 2
        )


def test_rows_beyond_max_length_are_those_of_the_forecast(
    write_rows: WriteRows, renderer: Any
) -> None:
    """At every length that a row has, the finding counts the rows that the forecast counts."""
    path = write_rows([instruction("Say it.", "one " * count) for count in range(1, 8)])
    lengths = audit(path, renderer=renderer)["lengths"]["total_tokens"]
    for limit in range(lengths["min"], lengths["max"]):
        content = audit(path, renderer=renderer, max_length=limit)
        (cost,) = [one for one in content["truncation"] if one["max_length"] == limit]
        assert finding(content, "truncation")["count"] == cost["rows_cut"] > 0


def test_a_row_with_one_labelled_turn_is_labelled() -> None:
    """A row counts as unlabelled if all its turns are, not if one of several is."""
    rows, number = audit_rows(plant(clean=2, each=0).examples), np.array([0])
    lost = [(at, DroppedRow(at, "unverified", "messages[1]: why")) for at in (0, 1)]
    (flagged,) = _unlabelled(rows, TokenLengths(number, number, number, [], lost))
    assert (flagged.index, flagged.detail) == (1, "unverified: messages[1]: why")


def test_rows_are_numbered_over_all_files(write_rows: WriteRows) -> None:
    """Rows of a second file go on counting where the first ends, bad ones too, and are cleaned by that number."""
    good, empty = instruction("Say one.", "one"), instruction("Say two.", "</s>")
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
    path, other = (
        write_rows([instruction("Say one.", "one")]),
        write_rows([instruction("a", "b"), {"output": 1}], "e.jsonl"),
    )
    with pytest.raises(InputError, match=r"e\.jsonl:2: .*evaluation data"):
        audit(path, eval_data={"e": DatasetSource(str(other))})


def test_cleaning_loses_nothing(write_rows: WriteRows) -> None:
    """Kept and dropped rows are the input, each as it was, with its reasons; what is kept loads again."""
    rows = [
        *planted_rows(clean=150, each=5),
        {"instruction": "x", "output": 3.0, "note": [1, None, "é"]},
    ]
    path = write_rows(rows)
    content = audit(path, clean=path.parent / "out")
    kept, dropped = lines(path.parent / "out" / KEPT), lines(path.parent / "out" / DROPPED)
    assert content["cleaned"] == {"kept": len(kept), "dropped": len(dropped)}
    assert len(kept) + len(dropped) == len(rows) == content["rows_in"]
    key = json.dumps
    assert sorted(map(key, [*kept, *(row["row"] for row in dropped)])) == sorted(map(key, rows))
    reasons = Counter(reason for row in dropped for reason in row["reasons"])
    assert reasons == {"duplicate_row": 5, "empty_answer": 5, "malformed": 1}
    assert {
        step["reason"]: step["rows"] for step in content["waterfall"] if step["rows"]
    } == reasons
    again = audit(path.parent / "out" / KEPT, clean=path.parent / "again")
    assert again["cleaned"]["dropped"] == 0 and again["rows_malformed"] == 0
    settings = DataSettings(datasets=(DatasetSource(str(path.parent / "out" / KEPT)),))
    examples = list(iter_examples(settings.datasets[0], settings, RejectLog(settings)))
    assert [example.messages[-1]["content"] for example in examples] == [
        row["output"] for row in kept
    ]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_other_file_types_are_cleaned_to_rows(kind: str, tmp_path: Path) -> None:
    """Rows of an array or a table keep all their columns; dropped ones say where they stood."""
    rows = [
        {
            "instruction": f"Say {at}.",
            "output": "<|im_end|>" if at == 1 else f"it is {at}",
            "id": str(at),
        }
        for at in range(4)
    ]
    path = tmp_path / f"rows.{kind}"
    cells = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text(
        json.dumps(rows, indent=1) if kind == "json" else "\n".join(cells), encoding="utf-8"
    )
    audit(path, clean=tmp_path / "out")
    assert lines(tmp_path / "out" / KEPT) == [row for row in rows if row["id"] != "1"]
    (dropped,) = lines(tmp_path / "out" / DROPPED)
    assert dropped["row"] == rows[1] and dropped["reasons"] == ["empty_answer"]
    assert dropped["where"].startswith(str(path))


def test_correct_short_answers_are_all_kept(write_rows: WriteRows) -> None:
    """The same few labels as answers to many prompts, and sums with a number as the answer, lose no row."""
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
    rows = [
        instruction(f"Which is it: {text(random, 15)}?", random.choice(labels)) for _ in range(600)
    ]
    rows += [instruction(f"What is {at} + {at + 1}?", str(2 * at + 1)) for at in range(300)]
    path = write_rows(rows)
    content = audit(path, clean=path.parent / "out")
    assert content["cleaned"]["dropped"] == 0
    assert [one["check"] for one in content["findings"] if one["severity"] != "info"] == []


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
    assert Counter(reason for row in dropped for reason in row["reasons"]) == {
        "identity": 5,
        "placeholder": 5,
    }
    with pytest.raises(
        InputError, match=r"--drop: 'identitty' is no check. Fix: did you mean 'identity'"
    ):
        audit(path, drop=["identitty"])
    assert set(DROPPED_CHECKS) <= set(CHECKS)


def test_overlap_with_the_recipes_own_split(
    write_rows: WriteRows,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A recipe's audit lies in its run folder, an error ends in code 1, and the split's own rows are compared."""
    rows = planted_rows(clean=60, each=0)
    write_rows(rows[:40], "data/train.jsonl")
    write_rows([*rows[40:], rows[3]], "data/test.jsonl")
    recipe = write_recipe(dataset_name="./data", dataset_test_split="test", max_length=1024)
    code, out = run(monkeypatch, capsys, "audit", str(recipe), "--json")
    content = json.loads(out)
    assert code == 1 and (tmp_path / "run" / "audit" / "audit.json").is_file()
    for check in ("split_leak", "contamination"):
        assert [row["index"] for row in finding(content, check)["examples"]] == [3]
    assert content["settings"]["max_length"] == 1024 and content["truncation"]


def test_command_on_data(
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without findings that are errors the code is 0; the verdict is short and names rows by file and line."""
    monkeypatch.chdir(tmp_path)
    write_rows([*planted_rows(clean=100, each=2)], "rows.jsonl")
    code, out = run(monkeypatch, capsys, "audit", "rows.jsonl", "--clean", "out")
    assert (
        code == 0
        and (tmp_path / "audit-rows" / "audit.json").is_file()
        and (tmp_path / "out" / KEPT).is_file()
    )
    printed = out.strip().splitlines()
    assert (
        len(printed) <= 10
        and "rows.jsonl:" in printed[1]
        and "report: audit-rows/report.html" in out
    )
    code, out = run(
        monkeypatch, capsys, "audit", "rows.jsonl", "--eval_data", "rows.jsonl", "--output", "other"
    )
    assert code == 1 and (tmp_path / "other" / "flagged.jsonl").is_file() and "error: " in out
    code, _ = run(monkeypatch, capsys, "audit", "missing.jsonl")
    assert code == 2
