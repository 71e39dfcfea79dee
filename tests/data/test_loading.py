"""Loading: files, folders and Hub names become examples; every rejected row is counted, listed or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples, source_files
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, DataSettings

ROWS = [{"instruction": f"q{index}", "output": f"a{index}"} for index in range(3)]
BAD = {"instruction": "q", "output": 5}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


def write(name: str, rows: list[Any] = ROWS) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if name.endswith("l") else f"[{','.join(lines)}]")
    return name


def load(path: str, log: RejectLog | None = None, **options: Any) -> list[Example]:
    source = {
        name: options.pop(name)
        for name in list(options)
        if name in DatasetSource.__dataclass_fields__
    }
    columns = options.pop("keep", ())
    split = options.pop("which", None)
    settings = DataSettings([DatasetSource(path, **source)], **options)
    log = log or RejectLog(settings)
    return list(
        iter_examples(settings.datasets[0], settings, split=split, columns=columns, rejects=log)
    )


def answers(examples: list[Example]) -> list[str]:
    return [example.messages[-1]["content"] for example in examples]


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load(path, **options)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_every_file_type_gives_the_same_examples(suffix: str) -> None:
    """One set of rows loads alike from each type; lines are known where the file has lines."""
    name = f"rows.{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    if suffix == "csv":
        Path(name).write_text(
            "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS)
        )
    elif suffix == "parquet":
        table.to_parquet(name)
    elif suffix == "arrow":
        table.save_to_disk("saved")
        (file,) = Path("saved").glob("*.arrow")
        file.rename(name)
    else:
        write(name)
    examples = load(name)
    assert answers(examples) == ["a0", "a1", "a2"]
    assert [(example.source, example.row) for example in examples] == [
        (name, 0),
        (name, 1),
        (name, 2),
    ]
    lines = {"jsonl": [1, 2, 3], "json": [1, 1, 1], "csv": [2, 3, 4]}
    assert [example.line for example in examples] == lines.get(suffix, [None] * 3)


def test_csv_cells_stay_text() -> None:
    """Cells that look like numbers or nulls are text; empty ones are empty; line breaks in cells keep lines right."""
    Path("rows.csv").write_bytes(
        b'\xef\xbb\xbfinstruction,input,output\r\n"two\r\nlines",,1\r\n\r\nq,,None\r\nq,x,007\r\n'
    )
    examples = load("rows.csv")
    assert answers(examples) == ["1", "None", "007"]
    assert [example.messages[0]["content"] for example in examples] == [
        "two\r\nlines",
        "q",
        "q\n\nx",
    ]
    assert [example.line for example in examples] == [2, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"instruction,output\nq,a\nq,a,b\n",
            "rows.csv:3: 3 cells where the header names 2 columns. Fix: quote cells that hold commas or line breaks.",
        ),
        (b"instruction,output\nq,\n", "rows.csv:2: output: the answer is empty."),
        (b'instruction,output\nq,"a\n', "rows.csv:2: invalid CSV (unexpected end of data)."),
        (b"instruction,output\nq,\xff\n", "rows.csv:2: invalid UTF-8 at byte 3 (0xff)."),
        (b"output,output\nq,a\n", "rows.csv:1: empty or repeated column names."),
        (b"instruction,output\n", "rows.csv: no rows."),
        (b"", "rows.csv: no rows."),
    ],
)
def test_bad_csv(content: bytes, message: str) -> None:
    """CSV faults have a line as well."""
    Path("rows.csv").write_bytes(content)
    assert refusal("rows.csv").startswith(message)


def test_large_csv_cells() -> None:
    """D11: cells above the standard library's default limit load."""
    Path("rows.csv").write_text(f"instruction,output\nq,{'x' * 10**6}\n")
    assert answers(load("rows.csv")) == ["x" * 10**6]


def test_arrow_nulls_do_not_become_arguments() -> None:
    """Arrow fills every tool call with the other calls' argument names; those nulls are gone again."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "z"}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [c]}]}
        for c in calls
    ]
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    made = [example.messages[-1]["tool_calls"][0]["function"] for example in load("rows.parquet")]
    assert made == calls


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_broken_tables(suffix: str) -> None:
    """A file that is no table says so in our words."""
    Path(f"rows.{suffix}").write_text("no table")
    message = refusal(f"rows.{suffix}")
    assert message.startswith(
        f"rows.{suffix}: this is no {suffix.capitalize()} file that can be read ("
    )
    Path(f"rows.{suffix}").write_bytes(b"")
    assert refusal(f"rows.{suffix}").startswith(f"rows.{suffix}: the file is empty.")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("rows.json", {}, "rows.json: no such file or folder. Fix: did you mean 'rows.jsonl'?"),
        ("./dta", {}, "dta: no such file or folder. Fix: did you mean 'data'?"),
        ("no/such/x.jsonl", {}, "no/such/x.jsonl: no such file or folder. Fix: check the path."),
        (
            "notes.txt",
            {},
            "notes.txt: cannot read files of type '.txt'. Fix: convert it to one of .jsonl, .json, .csv, ",
        ),
        (
            "rows.jsonl",
            {"name": "x"},
            "rows.jsonl: name: local files have no configurations. Fix: remove `name`.",
        ),
        (
            "rows.jsonl",
            {"which": "test"},
            "rows.jsonl: split: there is no split 'test' (found: train). Fix: use a folder or `data_files` ",
        ),
        (
            "data",
            {"which": "tets"},
            "data: split: there is no split 'tets' (found: test, train). Fix: did you mean 'test'?",
        ),
        (
            "empty",
            {},
            "empty: split: there is no split 'train' (found: none). Fix: use a folder or ",
        ),
        (
            "twice",
            {},
            "twice: split 'train' is there in several types: train.json, train.jsonl. Fix: keep one of them.",
        ),
        ("data", {"data_files": "x*.jsonl"}, "data/x*.jsonl: no such file or folder. Fix: "),
        (
            "data",
            {"data_files": {"train": "train.jsonl"}, "which": "test"},
            "data: split: there is no split 'test' (found: train). Fix: use a folder or `data_files` ",
        ),
    ],
)
def test_sources_that_are_not_there(path: str, options: dict[str, Any], message: str) -> None:
    """Missing files, splits and unknown types are refused with the alternatives."""
    for name in (
        "rows.jsonl",
        "data/train.jsonl",
        "data/test.jsonl",
        "twice/train.jsonl",
        "twice/train.json",
    ):
        write(name)
    write("empty/notes.jsonl.bak")
    Path("notes.txt").write_text("x")
    assert refusal(path, **options).startswith(message)


def test_folders_by_split() -> None:
    """Files named after splits, in shards or below data/, are read in order."""
    write("plain/train.json", ROWS[:1])
    write("plain/test.jsonl", ROWS[1:])
    write("plain/README.md", [])
    assert answers(load("plain")) == ["a0"]
    assert (
        answers(load("plain", which="test")) == answers(load("plain", split="test")) == ["a1", "a2"]
    )
    write("clone/data/train-00001-of-00002.jsonl", ROWS[1:])
    write("clone/data/train-00000-of-00002.jsonl", ROWS[:1])
    examples = load("clone")
    assert answers(examples) == ["a0", "a1", "a2"]
    assert [example.where for example in examples][1] == "clone/data/train-00001-of-00002.jsonl:1"
    assert source_files(DatasetSource("clone")) == [
        Path("clone/data/train-00000-of-00002.jsonl"),
        Path("clone/data/train-00001-of-00002.jsonl"),
    ]


def test_saved_sets() -> None:
    """Folders made by save_to_disk are read, with and without splits."""
    table = datasets.Dataset.from_list(ROWS)
    table.select([2, 0]).save_to_disk("one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk("both")
    assert answers(load("one")) == ["a2", "a0"]
    assert answers(load("both")) == ["a0", "a1", "a2"]
    assert answers(load("both", which="test")) == ["a1"]
    assert "there is no split 'dev' (found: test, train)." in refusal("both", which="dev")
    assert "there is no split 'test' (found: train)." in refusal("one", which="test")
    (Path("hollow")).mkdir()
    Path("hollow/state.json").write_text("{}")
    assert "there is no split 'train'" in refusal("hollow")
    (file,) = source_files(DatasetSource("both"), "test")
    assert file.parent == Path("both/test")


@pytest.mark.parametrize("path", ["data", "json"])
def test_data_files(path: str) -> None:
    """`data_files` means what it means to `datasets`: a path, a list, patterns, or one of these per split."""
    below = "" if path == "data" else "data/"
    write("data/b.jsonl", ROWS[1:])
    write("data/a.jsonl", ROWS[:1])
    assert answers(load(path, data_files=f"{below}*.jsonl")) == ["a0", "a1", "a2"]
    assert answers(load(path, data_files=[f"{below}b.jsonl", f"{below}a.jsonl"])) == [
        "a1",
        "a2",
        "a0",
    ]
    assert answers(load(path, data_files=str(Path("data/*.jsonl").absolute()))) == [
        "a0",
        "a1",
        "a2",
    ]
    by_split = {"train": [f"{below}a.jsonl"], "test": f"{below}b.jsonl"}
    assert answers(load(path, data_files=by_split, which="test")) == ["a1", "a2"]


def test_names_are_no_patterns() -> None:
    """A file or folder whose name holds brackets is opened itself, never another one that the name would match."""
    for folder, row in (("run1", ROWS[0]), ("run[1]", ROWS[1])):
        write(f"{folder}/train.jsonl", [row])
        table = datasets.Dataset.from_list([row])
        table.to_parquet(f"{folder}/rows.parquet")
        table.save_to_disk(f"{folder}/saved")
    assert answers(load("run[1]/rows.parquet")) == ["a1"]
    assert answers(load("run[1]/train.jsonl")) == ["a1"]
    assert answers(load("run[1]")) == ["a1"]
    assert answers(load("run[1]/saved")) == ["a1"]
    for pattern in ("rows.parquet", "*.parquet", "r*s.parquet"):
        assert answers(load("run[1]", data_files=pattern)) == ["a1"]
        assert answers(load("parquet", data_files=f"run[1]/{pattern}")) == ["a1"]
    write("many[0-9].jsonl", [ROWS[2]])
    write("many3.jsonl")
    assert answers(load("json", data_files="many[0-9].jsonl")) == ["a2"]
    assert answers(load("json", data_files="many[3].jsonl")) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_packed_files(kind: str, packer: str) -> None:
    """Text files may be packed, alone or as the files of a split; lines are those of the text."""
    separator = "\t" if kind == "tsv" else ","
    text = (
        "\n".join(
            separator.join(row.values()) for row in ({"i": "instruction", "o": "output"}, *ROWS)
        )
        + "\n"
    )
    if kind.startswith("json"):
        text = Path(write(f"plain.{kind}")).read_text()
    name = f"train.{kind}.{packer}"
    if packer == "zst":
        with pyarrow.CompressedOutputStream(name, "zstd") as file:
            file.write(text.encode())
    else:
        opener: Any = {"gz": gzip, "bz2": bz2, "xz": lzma}[packer]
        with opener.open(name, "wb") as file:
            file.write(text.encode())
    assert answers(load(name)) == ["a0", "a1", "a2"]
    assert load(name)[1].line == load_plain(text, kind)[1].line
    Path("folder").mkdir()
    Path(name).rename(f"folder/{name}")
    assert answers(load("folder")) == ["a0", "a1", "a2"]


def load_plain(text: str, kind: str) -> list[Example]:
    Path(f"unpacked.{kind}").write_text(text)
    return load(f"unpacked.{kind}")


def test_torn_archives() -> None:
    """A packed file that was cut off, or is none, is no list of rows that ends early."""
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 1000).encode())
    Path("torn.jsonl.gz").write_bytes(whole[:-100])
    assert refusal("torn.jsonl.gz").startswith("torn.jsonl.gz: cannot be read to its end (")
    for name in ("none.jsonl.gz", "none.jsonl.zst", "none.jsonl.xz", "none.csv.bz2"):
        Path(name).write_bytes(b"no archive at all")
        assert refusal(name).startswith(f"{name}: cannot be read to its end (")


def test_what_is_no_file() -> None:
    """A pipe is refused by name and never waited for; a folder named like a file says how to name its parts."""
    os.mkfifo("rows.jsonl")
    assert refusal("rows.jsonl").startswith("rows.jsonl: this is no file but a pipe or a device")
    Path("empty.jsonl").mkdir()
    assert refusal("empty.jsonl").startswith(
        "empty.jsonl: this is a folder, and no file of it is jsonl."
    )
    Path("spark.parquet").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet("spark.parquet/part-00000-abc.snappy.parquet")
    message = refusal("spark.parquet")
    assert message == (
        "spark.parquet: this is a folder, named like a file. "
        "Fix: name the parts, as in `datasets: [{path: spark.parquet, data_files: '*.parquet'}]`."
    )
    assert answers(load("spark.parquet", data_files="*.parquet")) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow"])
def test_files_that_may_not_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing permission is said as such."""
    Path(name).write_text("x")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    monkeypatch.setattr("pyarrow.memory_map", refuse)
    assert (
        refusal(name)
        == f"{name}: permission denied. Fix: give yourself the right to read it, as in `chmod u+r {name}`."
    )


def test_both_kinds_of_arrow_files() -> None:
    """The stream that `datasets` writes and the indexed file that others write are told apart by content."""
    table = pyarrow.Table.from_pylist(ROWS)
    with (
        pyarrow.OSFile("file.arrow", "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    with (
        pyarrow.OSFile("stream.arrow", "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as stream,
    ):
        stream.write_table(table, max_chunksize=2)
    assert answers(load("file.arrow")) == answers(load("stream.arrow")) == ["a0", "a1", "a2"]


def test_rows_of_a_table_are_counted_from_zero() -> None:
    """A row without a line cannot be taken for a line: the place says from where it is counted."""
    datasets.Dataset.from_list([ROWS[0], {"instruction": "q", "output": ""}]).to_parquet(
        "rows.parquet"
    )
    assert refusal("rows.parquet").startswith(
        "rows.parquet:row 1 (counted from 0): output: the answer is empty."
    )


def test_removed_nulls_are_counted() -> None:
    """Rows that lost a null inside tool calls or tools are counted; JSON keeps nulls that somebody wrote."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": None}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [c]}]}
        for c in calls
    ]
    settings = DataSettings([])
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    log = RejectLog(settings)
    load("rows.parquet", log)
    assert log.nulls_removed == {"rows.parquet": 2}
    assert log.lines() == [
        "rows.parquet: 2 rows had nulls inside tool calls or tools, which the table adds; removed"
    ]
    log = RejectLog(settings)
    examples = load(write("rows.jsonl", rows), log)
    assert examples[1].messages[-1]["tool_calls"][0]["function"]["arguments"] == {"y": None}
    assert log.nulls_removed == {"rows.jsonl": 0}
    datasets.Dataset.from_list(ROWS).to_parquet("plain.parquet")
    load("plain.parquet", log)
    assert log.nulls_removed["plain.parquet"] == 0


def test_csv_is_never_called_json() -> None:
    """Messages for rows of a CSV file speak of cells and columns; JSON is spoken of only inside a cell of JSON text."""
    Path("rows.csv").write_text('instruction,output\nq,\nq,a,b\n"q",{\n')
    assert "JSON" not in refusal("rows.csv")
    Path("chats.csv").write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""q""}, {""from"": ""gpt"", ""value"": ""a""}]"\n'
    )
    assert answers(load("chats.csv")) == ["a"]
    Path("chats.csv").write_text("messages\n[{\n")
    assert refusal("chats.csv").startswith("chats.csv:2: messages: invalid JSON at column 3 (")


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no path is loaded by `datasets`, and its rows are checked like any others."""
    asked = {}

    def load_dataset(*names: Any, **options: Any) -> datasets.Dataset:
        asked.update(options, names=names)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load("org/set", name="main", which="test")
    assert asked == {"names": ("org/set", "main"), "data_files": None, "split": "test"}
    assert [example.where for example in examples] == [
        f"org/set:row {row} (counted from 0)" for row in range(3)
    ]
    assert source_files(DatasetSource("org/set")) == []


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("no route"),
        ValueError("no route\nto host"),
    ],
)
def test_unreadable_hub_sets(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` raises becomes an input error with its first line."""

    def load_dataset(*names: Any, **options: Any) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("org/set").startswith(
        "org/set: neither files here nor a data set we can read (no route). Fix: check "
    )


def test_all_bad_rows_of_a_pass_are_reported_at_once() -> None:
    """By default a pass ends in one error with the first 20 problems and the total, whatever their kind."""
    lines = [ROWS[0], "{", {"instruction": "x"}, {"messages": []}] + [BAD] * 30
    message = refusal(write("rows.jsonl", lines)).splitlines()
    assert len(message) == 21
    assert message[0] == (
        "rows.jsonl: on_bad_rows: 33 of 34 rows cannot be trained. Fix: set `on_bad_rows: skip` and "
        "`max_rejected: 0.98` to leave them out, write the others to a file with "
        "`sft-recipes audit rows.jsonl --clean OUT`, or repair them."
    )
    assert message[1].startswith("rows.jsonl:2: invalid JSON at column 2 (expecting property name")
    assert message[2].startswith(
        "rows.jsonl:3: output: the column is missing (found: instruction)."
    )
    assert message[3].startswith(
        "rows.jsonl:4: this row looks like messages (messages), the file is instruction ("
    )
    assert message[4] == "rows.jsonl:5: output: expected a string, got int. Fix: write a string."
    assert message[20] == "... 20 of 34 problems shown."


def test_types_are_checked_behind_ten_megabytes() -> None:
    """D6: a list in a text column of a late row is found, not turned into text."""
    row = json.dumps({"instruction": "q", "output": "x" * 1000})
    write("rows.jsonl", [row] * 11_000 + [{"instruction": "q", "output": ["b"]}])
    assert Path("rows.jsonl").stat().st_size > 10 << 20
    assert refusal("rows.jsonl").startswith(
        "rows.jsonl:11001: output: expected a string, got list. Fix: write a string"
    )


def test_skipped_rows_are_written_with_reasons() -> None:
    """`skip` keeps the good rows and writes each rejected one with place, reason and text, replacing an older file."""
    write("rows.jsonl", [ROWS[0], "{oops", BAD, *ROWS[1:]])
    log_path = Path("rejects.jsonl")
    log_path.write_text("stale\n")
    settings = DataSettings([DatasetSource("rows.jsonl")], on_bad_rows="skip", max_rejected=0.4)
    log = RejectLog(settings, log_path)
    examples = list(iter_examples(settings.datasets[0], settings, rejects=log))
    assert answers(examples) == ["a0", "a1", "a2"]
    assert [(example.row, example.line) for example in examples] == [(0, 1), (3, 4), (4, 5)]
    broken, wrong = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert broken.pop("reason").startswith("invalid JSON at column 2 (")
    assert broken == {"source": "rows.jsonl", "line": 2, "row": 1, "raw": "{oops"}
    assert json.loads(wrong.pop("raw")) == BAD
    assert wrong == {
        "source": "rows.jsonl",
        "line": 3,
        "row": 2,
        "reason": "output: expected a string, got int",
    }
    assert log.rejected["rows.jsonl"].total() == 2
    assert log.rejected["rows.jsonl"]["output: expected a string, got int"] == 1
    assert len(list(iter_examples(settings.datasets[0], settings, rejects=log))) == 3
    assert log.rejected["rows.jsonl"].total() == 2  # of this pass, not of both
    write("clean.jsonl")
    list(iter_examples(DatasetSource("clean.jsonl"), settings, rejects=log))
    assert log.rejected["clean.jsonl"].total() == 0


def test_too_many_rejected_rows() -> None:
    """D18: beyond `max_rejected` the pass ends in a table of reasons; at the limit it is accepted."""
    write("rows.jsonl", [*ROWS, BAD, BAD, {"instruction": "q"}])
    assert refusal("rows.jsonl", on_bad_rows="skip", max_rejected=0.4) == (
        "rows.jsonl: max_rejected: 3 of 6 rows are rejected, the limit is 0.4 of them:\n"
        "       2 x output: expected a string, got int\n"
        "       1 x output: the column is missing (found: instruction). "
        "Fix: set `max_rejected: 0.5` to leave them out, write the others to a file with "
        "`sft-recipes audit rows.jsonl --clean OUT`, or repair them."
    )
    assert len(load("rows.jsonl", on_bad_rows="skip", max_rejected=0.5)) == 3


def test_nothing_left() -> None:
    """D18: all rows rejected is refused whatever `max_rejected` says."""
    write("rows.jsonl", ["{", "3"])
    assert refusal("rows.jsonl", on_bad_rows="skip", max_rejected=1.0).startswith(
        "rows.jsonl: max_rejected: 2 of 2 rows are rejected"
    )


def test_columns_are_kept_listed_or_dropped() -> None:
    """`columns` of the source limits what is read; others are listed once; asked-for ones stay on the example."""
    rows = [row | {"id": 1, "labels": [1], "input": "x", "kind": "qa"} for row in ROWS]
    write("rows.jsonl", rows)
    assert "rows.jsonl:1: labels: this column is refused" in refusal("rows.jsonl")
    settings = DataSettings(
        [DatasetSource("rows.jsonl", columns=["instruction", "output", "kind", "id"])]
    )
    log = RejectLog(settings)
    examples = list(iter_examples(settings.datasets[0], settings, columns=["kind"], rejects=log))
    assert examples[0].messages[0]["content"] == "q0"
    assert examples[0].columns == {"kind": "qa"}
    assert log.unused_columns == {"rows.jsonl": ["id"]}
    list(
        iter_examples(
            DatasetSource("rows.jsonl", columns=["instruction", "output"]), settings, rejects=log
        )
    )
    assert log.unused_columns == {"rows.jsonl": []}  # of this pass, though the path is the same


def test_columns_that_evaluation_reads_are_not_called_unused() -> None:
    """They are said apart from those that nothing reads; where they were asked for, not at all."""
    rows = [row | {"id": 1, "task_type": "qa", "expected_format": None} for row in ROWS]
    write("rows.jsonl", rows)
    settings = DataSettings([DatasetSource("rows.jsonl")])
    log = RejectLog(settings)
    list(iter_examples(settings.datasets[0], settings, log))
    said = "\n".join(log.notes("rows.jsonl"))
    assert said.endswith("columns not used: id") and "evaluation" in said
    assert said.index("task_type, expected_format") < said.index("not used")
    list(iter_examples(settings.datasets[0], settings, log, columns=EVALUATION_COLUMNS))
    assert log.notes("rows.jsonl") == ["columns not used: id"]


def test_format_and_mapping_reach_the_rows() -> None:
    """A stated format is used as stated, a mapping is checked and applied, detection names the first row."""
    write("rows.jsonl", [{"text": "t"}])
    assert load("rows.jsonl", format="raw")[0].text == "t"
    assert refusal("rows.jsonl").startswith(
        "rows.jsonl:1: format: the columns (text) fit no format; known are "
    )
    assert refusal("rows.jsonl", format="alpaca").startswith(
        "rows.jsonl: format: unknown format 'alpaca'."
    )
    write("seeds.jsonl", [{"instruction": "i", "instances": [{"input": "x", "output": "o"}]}])
    mapping = {
        "instruction": "instruction",
        "input": "instances.0.input",
        "output": "instances.0.output",
    }
    assert load("seeds.jsonl", column_mapping=mapping)[0].messages[0]["content"] == "i\n\nx"
    assert "'answer' is no column of format instruction" in refusal(
        "seeds.jsonl", column_mapping=mapping | {"answer": "x"}
    )
    assert load(
        "seeds.jsonl", column_mapping=mapping | {"kind": "instances.0.input"}, keep=["kind"]
    )[0].columns == {"kind": "x"}


def test_empty_outputs_follow_the_setting() -> None:
    """D7: `allow_empty_output` reaches the rows."""
    write("rows.jsonl", [{"instruction": "q", "output": ""}])
    assert refusal("rows.jsonl").startswith("rows.jsonl:1: output: the answer is empty.")
    assert answers(load("rows.jsonl", allow_empty_output=True)) == [""]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_cells_may_be_separated_as_spreadsheets_do(delimiter: str, tmp_path: Path) -> None:
    """A CSV file whose header has semicolons or tabs and no comma is cut there, commas in its cells staying text."""
    path = tmp_path / "rows.csv"
    path.write_text(
        f"Question{delimiter}Answer\nOne, two?{delimiter}Yes, no.\n", encoding="utf-8-sig"
    )
    source = DatasetSource(str(path))
    settings = DataSettings((source,))
    (example,) = iter_examples(source, settings, RejectLog(settings))
    assert [message["content"] for message in example.messages] == ["One, two?", "Yes, no."]


def test_a_misspelt_column_is_named_once(tmp_path: Path) -> None:
    """A mapping to a column that no row has is a fault of the mapping, not of the rows, whatever bad rows are."""
    file = tmp_path / "rows.jsonl"
    rows = [{"customer_message": f"Where is {n}?", "our_reply": "On its way."} for n in range(40)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    mapping = {"instruction": "customer_mesage", "output": "our_reply"}
    source = DatasetSource(str(file), column_mapping=mapping)
    settings = DataSettings([source], on_bad_rows="skip")
    with pytest.raises(InputError) as caught:
        list(iter_examples(source, settings, RejectLog(settings)))
    assert str(caught.value) == (
        f"{file}: column_mapping: no row has a column 'customer_mesage'. "
        "Fix: did you mean 'customer_message'?"
    )
