"""Strict reader for `.jsonl` files and `.json` arrays: rows come out one by one, each with its line.

`datasets` counts bad lines from the start of a 10 MB block, turns NaN into null and lets later rows change type; here
every deviation is reported with its own file and line. Memory stays at one line, or at the text of an array.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem

# In JSON that parses: a surrogate pair, a surrogate without its other half, any other escape.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..)|\\.")
_SPACE = re.compile(r"[ \t\n\r]*")
# What renders, compares and copies a value later on goes down level by level, and Python has few hundred of them.
DEEPEST = 100


class RowProblem(Exception):
    """What is wrong with one row, or with JSON text inside it; `field` may be empty."""

    def __init__(self, field: str, what: str, fix: str) -> None:
        super().__init__(field, what, fix)
        self.field, self.what, self.fix = field, what, fix

    def at(self, where: str) -> Problem:
        """The same with the place of the row."""
        return Problem(where, self.field, self.what, self.fix)


# Line (from 1) where the file has lines; values, or what is wrong with them; the text, where values are missing.
Row = tuple[int | None, dict[str, Any] | RowProblem, str]


def display_path(path: Path) -> str:
    """The path as messages show it: relative when it lies below the working directory, else as it was given."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def append_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add a line for each entry to a JSON Lines file, which is made where there is none."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def type_name(value: Any) -> str:
    """How messages call the type of a JSON value."""
    return "null" if value is None else type(value).__name__


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark. Raises InputError where it is not UTF-8."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(_invalid_utf8(error).at(f"{display_path(path)}:{line}")) from error


def parse_json(text: str) -> Any:
    """Parse one strict JSON text. Raises RowProblem, with the 1-based column where it is broken."""
    try:
        value, end = _scan(text, _skip_space(text, 0))
        if (end := _skip_space(text, end)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        fix = "write one complete JSON object per line, or remove the line"
        raise _broken(error.msg, error.pos + 1, fix) from error
    return value


def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file or of a JSON array of objects; the content decides which one it is.

    A UTF-8 byte order mark, CRLF, blank lines and a missing final newline change nothing. Raises InputError for no
    rows, one object alone in a `.json` file, and at the first element of an array that is not strict JSON.
    """
    name, line = display_path(path), None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        starts = "".join(text.lstrip()[0] for text in islice(filter(str.strip, file), 2))
    if starts[:1] == "{" and starts != "{{" and path.suffix.lower() != ".jsonl":
        fix = "put the rows into an array [...], or rename a file of one object per line to .jsonl"
        raise InputError(Problem(name, "", "one JSON object alone, not an array of rows", fix))
    for line, value, text in _elements(path) if starts[:1] == "[" else _lines(path):
        if not isinstance(value, dict | RowProblem):
            what = f"expected a JSON object, got {type_name(value)}"
            value = RowProblem("", what, 'write the row as {"column": value}')
        yield line, value, text.strip()
    if line is None:
        raise InputError(Problem(name, "", "no rows", "write at least one row into the file"))


def _lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Number, value (or the RowProblem in its place) and text of every line that is not blank."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                text = raw.rstrip(b"\r\n").decode()
                value = parse_json(text)
            except UnicodeDecodeError as error:
                text, value = raw.decode(errors="replace"), _invalid_utf8(error)
            except RowProblem as error:
                value = error
            yield line, value, text


def _elements(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The same of every element of an array. Raises InputError where one is broken or refused."""
    text, line, counted = "".join(text_lines(path)), 1, 0
    at = _skip_space(text, text.index("[") + 1)
    try:
        more = text[at : at + 1] != "]"
        while more:
            line, counted = line + text.count("\n", counted, at), at
            value, end = _scan(text, at)
            yield line, value, text[at:end]
            at = _skip_space(text, end)
            if more := text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ','", text, at)
        if (at := _skip_space(text, at + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        problem = _broken(error.msg, error.colno, "repair the array there")
        raise InputError(problem.at(f"{display_path(path)}:{error.lineno}")) from error
    except RowProblem as error:
        raise InputError(error.at(f"{display_path(path)}:{line}")) from error


def _scan(text: str, start: int) -> tuple[Any, int]:
    """The value at `start` and where it ends. Raises JSONDecodeError if it is broken, RowProblem if refused."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer with more digits than Python converts
        if isinstance(error, json.JSONDecodeError):
            raise
        raise json.JSONDecodeError(str(error), text, start) from None
    brackets = text.count("{", start, end) + text.count("[", start, end)
    if brackets > DEEPEST and _depth(value) > DEEPEST:
        raise RowProblem("", f"nested more than {DEEPEST} deep", "flatten the value, or remove the row")
    if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
        for escape in _ESCAPES.finditer(text, start, end):
            if lone := escape["lone"]:
                what = f"lone surrogate {lone} at character {escape.start() - start + 1} of the row"
                raise RowProblem("", what, "write the whole character, or remove the escape")
    return value, end


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level, depth = [part for parts in inside for part in parts if isinstance(part, dict | list)], depth + 1
    return depth


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowProblem("", f"duplicate key {twice!r}", "keep one of them")
    return values


def _refuse_constant(name: str) -> None:
    raise RowProblem("", f"{name} is not JSON", "write a number or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # the empty string matches as well


def _broken(reason: str, column: int, fix: str) -> RowProblem:
    reason = reason.removesuffix(" starting at").removesuffix(" at")
    return RowProblem("", f"invalid JSON at column {column} ({reason[0].lower()}{reason[1:]})", fix)


def _invalid_utf8(error: UnicodeDecodeError) -> RowProblem:
    what = f"invalid UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})"
    return RowProblem("", what, "save the file as UTF-8")
