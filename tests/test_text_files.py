"""Damaged text and JSON files are named with their line, and nothing else than InputError comes out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sft_recipes.errors import InputError
from sft_recipes.text_files import interpreting, read_json, read_json_lines

FIX = "restore it"
# content -> where and what the error says of it.
DAMAGED = {
    "empty": (b"", "file: is empty"),
    "blank": (b" \n\n", "file: is empty"),
    "cut": (b'{"a": 1,\n "b": ', "file:2: is no JSON"),
    "NUL": (b'{"a":\n "\x00"}', "file:2: holds NUL"),
    "a list": (b"[1]", "file:1: holds list"),
    "null": (b"null", "file:1: holds NoneType"),
    "latin-1": ('{"a":\n "é"}'.encode("latin-1"), "file:2: byte 0xe9 is no UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "file:1: byte 0xff is no UTF-8"),
    "two objects": (b'{"a": 1}{"a": 2}', "file:1: is no JSON"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "file:1: is no JSON"),
    "deep": (b'{"a": ' + b"[" * 100_000, "file:1: is no JSON"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    """Each kind of damage is an error with file, line and the caller's fix, for one object and for lines of them."""
    content, message = DAMAGED[damage]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_json(path, FIX)
    assert message in str(refusal.value) and str(refusal.value).endswith("Fix: restore it.")
    if damage not in ("empty", "cut", "NUL", "latin-1"):
        with pytest.raises(InputError, match="file"):
            list(read_json_lines(path, FIX))


def test_what_is_no_file(tmp_path: Path) -> None:
    """A missing file, a folder, a name with NUL and one that is too long are errors with the name."""
    for path in (tmp_path, tmp_path / "none", tmp_path / "\0", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="Fix: restore it"):
            read_json(path, FIX)


def test_lines_end_where_json_ends_them(tmp_path: Path) -> None:
    """U+2028 and U+0085 inside texts end no line; a byte order mark and blank lines are no damage."""
    path = tmp_path / "file"
    path.write_text('\ufeff{"a": "x\u2028y\x85"}\n\n{"a": 2}\n', encoding="utf-8")
    lines = list(read_json_lines(path, FIX))
    assert [line.content["a"] for line in lines] == ["x\u2028y\x85", 2]
    assert [line.where for line in lines] == [f"{path}:1", f"{path}:3"]


def test_any_flipped_or_cut_bytes(tmp_path: Path) -> None:
    """Of 600 random damages to a good file none raises anything but InputError."""
    draw = random.Random(0)
    good = b'{"schema_version": 1, "state": "finished", "list": [1.5, null, {"x": "\xc3\xa9"}]}\n'
    path = tmp_path / "file"
    refused = 0
    for _ in range(600):
        content = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randint(0, len(content))])
        for read in (read_json, lambda *given: list(read_json_lines(*given))):
            try:
                read(path, FIX)
            except InputError:
                refused += 1
    assert refused > 600


def test_content_that_does_not_fit() -> None:
    """A missing or other value is the file's fault, with the fix; other errors pass."""
    content: dict = {"info": None}
    with (
        pytest.raises(
            InputError, match=r"metrics\.json: does not hold what belongs there .*Fix: restore it"
        ),
        interpreting("metrics.json", FIX),
    ):
        content["info"]["data"]
    with pytest.raises(OSError), interpreting("metrics.json", FIX):
        raise OSError
