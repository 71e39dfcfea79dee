"""The JSON reader: every broken row is reported with its own file and line, everything else reads alike."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from sft_recipes.data.reading import json_reader
from sft_recipes.data.reading.json_reader import Row, RowProblem, parse_json, read_json_rows
from sft_recipes.errors import InputError

GOOD = '{"a": 1}'
TOO_DEEP = "maximum recursion depth exceeded while decoding a JSON array from a unicode string"
PER_LINE = "Fix: write one complete JSON object per line, or remove the line."


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str | bytes, name: str = "train.jsonl") -> list[Row]:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_json_rows(path))


def values(rows: list[Row], name: str = "train.jsonl") -> list[object]:
    """The values of good rows, the message of bad ones."""
    return [
        str(value.at(f"{name}:{line}")) if isinstance(value, RowProblem) else value
        for line, value, _ in rows
    ]


def lines(rows: list[Row]) -> list[int | None]:
    return [line for line, _, _ in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"instruction": "a", "output": "b',
            f"invalid JSON at column 32 (unterminated string). {PER_LINE}",
        ),
        ('{"a": 1', f"invalid JSON at column 8 (expecting ',' delimiter). {PER_LINE}"),
        ('  {"a": 1} x', f"invalid JSON at column 12 (extra data). {PER_LINE}"),
        ("[" * 100_000, f"invalid JSON at column 1 ({TOO_DEEP}). {PER_LINE}"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 8 (0xff). Fix: save the file as UTF-8."),
        (
            '{"a": "x\\ud800y"}',
            "lone surrogate \\ud800 at character 9 of the row. Fix: write the whole character, or remove the escape.",
        ),
        (
            '{"a": "\\ude00\\ud83d"}',
            "lone surrogate \\ude00 at character 8 of the row. Fix: write the whole character, or remove the escape.",
        ),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'. Fix: keep one of them."),
        ('{"x": [{"a": 1, "a": 1}]}', "duplicate key 'a'. Fix: keep one of them."),
        ('{"a": NaN}', "NaN is not JSON. Fix: write a number or null."),
        ('{"a": -Infinity}', "-Infinity is not JSON. Fix: write a number or null."),
        ("[1, 2]", 'expected a JSON object, got list. Fix: write the row as {"column": value}.'),
        ("null", 'expected a JSON object, got null. Fix: write the row as {"column": value}.'),
        ('"text"', 'expected a JSON object, got str. Fix: write the row as {"column": value}.'),
        (
            '{"a": ' + "[" * 100 + "]" * 100 + "}",
            "nested more than 100 deep. Fix: flatten the value, or remove the row.",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_line_is_named_and_the_rest_is_read(line: str | bytes, message: str) -> None:
    """D1, D3, D4: a bad line gives its file, line and reason; the rows around it keep their numbers."""
    raw = line if isinstance(line, bytes) else line.encode()
    rows = read(b"\n".join([GOOD.encode(), b"", GOOD.encode(), raw, GOOD.encode()]))
    assert lines(rows) == [1, 3, 4, 5]
    assert values(rows) == [{"a": 1}, {"a": 1}, f"train.jsonl:4: {message}", {"a": 1}]
    assert rows[2][2] == raw.decode(errors="replace").strip()


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text() -> None:
    """A pair is one character, and a backslash before `ud800` that is itself escaped is no escape."""
    rows = read('{"a": "\\ud83d\\ude00", "b": "\\\\ud800", "c": "\\uD83D\\uDE00"}')
    assert values(rows) == [{"a": "\U0001f600", "b": "\\ud800", "c": "\U0001f600"}]


def test_many_brackets_beside_each_other_are_not_deep() -> None:
    """A row at the limit of depth is read, and so is one with any number of brackets side by side."""
    deepest = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    assert not any(
        isinstance(row, RowProblem)
        for _, row, _ in read(deepest + '\n{"a": [' + "{}," * 500 + "{}]}")
    )


def test_line_number_behind_ten_megabytes() -> None:
    """D2: a bad line at 262145 of a file above 10 MB is reported with that very number."""
    row = json.dumps({"prompt": "p" * 12, "completion": "c" * 12})
    path = Path("train.jsonl")
    path.write_text("\n".join([row] * 262_144 + ['{"prompt": "p"'] + [row]))
    assert path.stat().st_size > 10 << 20
    (bad,) = [item for item in read_json_rows(path) if isinstance(item[1], RowProblem)]
    assert str(values([bad])[0]).startswith("train.jsonl:262145: invalid JSON at column 15 ")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_file_without_rows(content: bytes, name: str) -> None:
    """D5: an empty file, and one of blank lines only, has no rows."""
    with pytest.raises(InputError) as error:
        read(content, name)
    assert str(error.value) == f"{name}: no rows. Fix: write at least one row into the file."


def test_empty_array_has_no_rows() -> None:
    """D5 for arrays."""
    with pytest.raises(InputError, match=r"^train\.json: no rows\."):
        read(" [ ] ", "train.json")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_encoding_marks_and_line_ends_change_nothing(name: str) -> None:
    """D5: BOM, CRLF, blank lines, U+2028 in a string and a missing final newline load like the clean file."""
    rows = ['{"a": "x\u2028y\u0085z"}', '{"a": "\u00e9"}']
    pieces = rows if name == "train.jsonl" else ["[", rows[0] + ",", rows[1], "]"]
    clean = values(read("\n".join(pieces) + "\n", name))
    assert clean == [{"a": "x\u2028y\u0085z"}, {"a": "\u00e9"}]
    variants = [
        "\ufeff" + "\n".join(pieces),
        "\r\n".join(pieces) + "\r\n",
        "\n\n" + "\n\n".join(pieces) + "\n\n \n",
    ]
    for variant in variants:
        assert values(read(variant, name)) == clean
    assert lines(read(variants[2], name)) == ([3, 5] if name == "train.jsonl" else [5, 7])


def test_content_beats_extension() -> None:
    """A .json file of one object per line is read as JSON Lines, even where its first line is long, and an array in a
    .jsonl file as an array."""
    long = json.dumps({"a": "x" * 3_000_000})
    assert lines(read(f"{long}\n\n{GOOD}\n", "train.json")) == [1, 3]
    assert lines(read(f"\n[{GOOD},\n{GOOD}]", "train.jsonl")) == [2, 3]


TURNS = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (TURNS, "train.jsonl"),
        (f"{TURNS}\n{TURNS}\n", "train.jsonl"),
        (f"\n{TURNS}\n\n{TURNS}", "train.json"),
        (f"[{TURNS}]", "train.json"),
        (f"[{TURNS},\n{TURNS}]", "train.jsonl"),
        (f"[\n{TURNS},\n{TURNS}]", "train.json"),
    ],
)
def test_bare_lists_of_messages_are_rows(content: str, name: str) -> None:
    """A line, or an element of an array, that is a list of messages is a row with that conversation."""
    rows = values(read(content, name))
    assert rows == [{"messages": json.loads(TURNS)}] * content.count(TURNS)


def test_array_of_turns_in_a_json_file_is_an_array() -> None:
    """One conversation alone in a `.json` file is read as what it looks like, an array of rows."""
    assert len(read(TURNS, "train.json")) == 2


@pytest.mark.parametrize(
    "text",
    [
        '"' + "\\n" * 10**6 + '\\ud83d\\ude00"',
        '"' + "\\ud83d\\ude00" * 10**5 + '"',
        "[" + "{}," * 10**5 + "{}]",
        '"' + "\\\\" * 10**6 + 'ud800"',
    ],
    ids=["escapes", "pairs", "brackets", "backslashes"],
)
def test_long_lines_take_linear_time(text: str) -> None:
    """Ten times the line takes about ten times as long, whatever it is made of."""
    row = f'{{"a": {text}}}'
    started = time.perf_counter()
    ((_, value, _),) = read(row)
    assert not isinstance(value, RowProblem)
    assert time.perf_counter() - started < 3


def test_one_object_alone_is_refused() -> None:
    """One object over several lines in a .json file is no row and no list of them; it is refused with what to do."""
    with pytest.raises(InputError) as error:
        read('{\n  "data": []\n}', "train.json")
    assert str(error.value) == (
        "train.json: one JSON object alone, not an array of rows. "
        "Fix: put the rows into an array [...], or rename a file of one object per line to .jsonl."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f'[\n {GOOD},\n {{"a" 1}}\n]',
            "train.json:3: invalid JSON at column 7 (expecting ':' delimiter)",
        ),
        (f"[\n {GOOD}\n {GOOD}\n]", "train.json:3: invalid JSON at column 2 (expecting ',')"),
        (f"[{GOOD},\n]", "train.json:2: invalid JSON at column 1 (expecting value)"),
        (f"[{GOOD}", "train.json:1: invalid JSON at column 10 (expecting ',')"),
        (f"[{GOOD}]\n{GOOD}", "train.json:2: invalid JSON at column 1 (extra data)"),
        ('[\n{"a": "x', "train.json:2: invalid JSON at column 7 (unterminated string)"),
        (b'[\n{"a": 1},\n{"a": "\xe9"}]', "train.json:3: invalid UTF-8 at byte 8 (0xe9)"),
        (
            f'[\n{GOOD},\n{{"a": 1, "a": 2}}]',
            "train.json:3: duplicate key 'a'. Fix: keep one of them.",
        ),
        (f'[{GOOD},\n{{"a": NaN}}]', "train.json:2: NaN is not JSON. Fix: write a number or null."),
        (
            f'[{GOOD},\n\n{{"a": "\\ud800"}}]',
            "train.json:3: lone surrogate \\ud800 at character 8 of the row.",
        ),
    ],
)
def test_broken_array_stops_with_line_and_column(content: str | bytes, message: str) -> None:
    """D1, D3, D4 for arrays: an element that is not strict JSON ends the array; InputError names line and column."""
    with pytest.raises(InputError) as error:
        read(content, "train.json")
    assert str(error.value).startswith(message)


def test_array_elements_that_are_no_objects_are_bad_rows() -> None:
    """D4: they are reported each with its line and text, and the rest of the array is read."""
    rows = read(f'[\n{GOOD},\n31415926535,\n["x"],\n{GOOD}]', "train.json")
    assert lines(rows) == [2, 3, 4, 5]
    assert [text for _, _, text in rows[1:3]] == ["31415926535", '["x"]']
    reason = 'Fix: write the row as {"column": value}.'
    assert values(rows, "train.json")[1:3] == [
        f"train.json:3: expected a JSON object, got int. {reason}",
        f"train.json:4: expected a JSON object, got list. {reason}",
    ]


def test_memory_stays_at_one_line() -> None:
    """JSON Lines of 30 MB are read with a tenth of that."""
    row = json.dumps({"a": "x" * 1000})
    Path("train.jsonl").write_text("\n".join([row] * 30_000))
    tracemalloc.start()
    assert sum(1 for _ in read_json_rows(Path("train.jsonl"))) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize("seed", range(4))
def test_arrays_give_their_values_and_lines(seed: int) -> None:
    """Arrays laid out in any way give json.loads's values, and the line each element begins in."""
    draw = random.Random(seed)
    texts = [
        "é" * draw.randrange(40) + '"\\\n' + "\U0001f600" * draw.randrange(9) for _ in range(30)
    ]
    expected = [
        {"text": text, "list": [index, None, {"x": 1.5e3}]} for index, text in enumerate(texts)
    ]
    dumped = [
        json.dumps(row, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        for row in expected
    ]
    content, starts = "[", []
    for index, text in enumerate(dumped):
        content += ("," if index else "") + draw.choice(["", "\n", " \r\n\n\t"])
        starts.append(content.count("\n") + 1)
        content += text
    rows = read(content + "]\n", "train.json")
    assert values(rows) == expected
    assert lines(rows) == starts


def test_hostile_text_is_only_text() -> None:
    """D11, D12: private use, NUL, right-to-left, template syntax and 1 MB values pass through unchanged."""
    texts = [
        "\ue000\U000f0000",
        "\x00",
        "\u202e\u05d0\u200b",
        "{{7*7}} {x.__class__} {input}",
        "### Response:",
        "x" * 10**6,
    ]
    content = "\n".join(json.dumps({"a": text}) for text in texts)
    assert values(read(content)) == [{"a": text} for text in texts]


def test_parse_json_is_as_strict() -> None:
    """JSON inside strings (tool calls) goes by the same rules."""
    assert parse_json(' {"a": [1]} ') == {"a": [1]}
    for text, what in [
        ("{", "column 2"),
        ('{"a":1,"a":1}', "duplicate key"),
        ("NaN", "not JSON"),
        ("1 2", "extra data"),
    ]:
        with pytest.raises(RowProblem, match=what):
            parse_json(text)


def test_paths_outside_the_working_directory_stay_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages show a short path below the working directory, and the given one elsewhere."""
    inside = tmp_path / "sub" / "train.jsonl"
    assert json_reader.display_path(inside) == "sub/train.jsonl"
    monkeypatch.chdir("/")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json_reader.display_path(inside) == str(inside)


@pytest.mark.parametrize("broken", ['{"a": 1} {"b": 2}', '{"a": }', '{"a": "unfinished', "NaN"])
def test_elements_before_a_broken_one_are_given(broken: str) -> None:
    """A broken element is reported when it is reached, with its own line; those before it are rows."""
    rows = [
        {"text": "x" * size, "nested": {"list": [1, 2.5, None, "é\u2028"]}}
        for size in (0, 1, 90, 200)
    ]
    text = "[\n" + ",\n\n ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("rows.json").write_text(f"{text},\n{broken}]\n", encoding="utf-8")
    found: list[object] = []
    with pytest.raises(InputError, match=r"^rows\.json:9: "):
        for _, value, _ in read_json_rows(Path("rows.json")):
            found.append(value)
    assert found[:4] == rows
