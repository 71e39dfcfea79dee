"""Strict reader for `.jsonl` files and `.json` arrays: rows come out one by one, each with its line.

`datasets` counts bad lines from the start of a 10 MB block, turns NaN into null and lets later rows change type; here
every deviation is reported with its own file and line. Memory stays at one line, or at one element of an array and
1 MB around it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem

# In JSON that parses: a surrogate pair, a surrogate without its other half, any other escape.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..)|\\.")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it stands in its file: `row` counts from 0 (rejected rows included), `line` from 1."""

    row: int
    line: int | None
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read; `raw` is its text, undecodable bytes shown as U+FFFD."""

    row: int
    line: int | None
    problem: Problem
    raw: str


class JSONTextError(Exception):
    """JSON text that this project refuses: broken, ambiguous (duplicate keys) or not JSON at all (NaN)."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def display_path(path: Path) -> str:
    """The path as messages show it: relative when it lies below the working directory, else as it was given."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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
                raise InputError(Problem(f"{display_path(path)}:{line}", "", *_invalid_utf8(error))) from error


def parse_json(text: str) -> Any:
    """Parse one strict JSON text. Raises JSONTextError with the 1-based column of what is wrong."""
    try:
        value, end = _scan(text, _skip_space(text, 0))
        if (end := _skip_space(text, end)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        fix = "write one complete JSON object per line, or remove the line"
        raise JSONTextError(_broken(error, error.pos + 1), fix) from error
    return value


def read_json_rows(path: Path) -> Iterator[SourceRow | BadRow]:
    """Yield the rows of a JSON Lines file or of a JSON array of objects; the content decides which one it is.

    A UTF-8 byte order mark, CRLF, blank lines and a missing final newline change nothing. Raises InputError where no
    row can be told from the next: no rows, one object alone, an array in a `.jsonl` file, a malformed array element.
    """
    name, is_jsonl = display_path(path), path.suffix.lower() == ".jsonl"
    with path.open("rb") as file:
        starts = filter(None, (line.removeprefix(codecs.BOM_UTF8).lstrip()[:1] for line in file))
        first, second = next(starts, b""), next(starts, b"")
    if first == b"[" and is_jsonl:
        fix = "rename the file to .json, or write one object per line"
        raise InputError(Problem(f"{name}:1", "", "a JSON array in a .jsonl file", fix))
    if first == b"{" and second != b"{" and not is_jsonl:
        fix = "put the rows into an array [...], or rename a file of one object per line to .jsonl"
        raise InputError(Problem(name, "", "one JSON object alone, not an array of rows", fix))
    row = 0
    try:
        for line, value, text in _elements(path) if first == b"[" else _lines(path):
            if isinstance(value, dict):
                yield SourceRow(row, line, value)
            else:
                yield BadRow(row, line, _problem(f"{name}:{line}", value), text.strip())
            row += 1
    except json.JSONDecodeError as error:
        problem = Problem(f"{name}:{error.lineno}", "", _broken(error, error.colno), "repair the array there")
        raise InputError(problem) from error
    if not row:
        raise InputError(Problem(name, "", "no rows", "write at least one row into the file"))


def _lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Number, value (or the JSONTextError in its place) and text of every line that is not blank."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                text = raw.rstrip(b"\r\n").decode()
                value = parse_json(text)
            except UnicodeDecodeError as error:
                text, value = raw.decode(errors="replace"), JSONTextError(*_invalid_utf8(error))
            except JSONTextError as error:
                value = error
            yield line, value, text


def _elements(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The same of every element of an array. Raises JSONDecodeError where one cannot be told from the next."""
    window = _Window(path)
    window.skip(1)
    if window.peek() == "]":
        window.skip(1)
    else:
        delimiter = ","
        while delimiter == ",":
            window.peek()
            line = window.line
            value, text = window.element()
            yield line, value, text
            delimiter = window.peek()
            if delimiter not in (",", "]"):
                raise window.error("Expecting ','", 0)
            window.skip(1)
    if window.peek():
        raise window.error("Extra data", 0)


class _Window:
    """A piece of a file's text that grows while something in it is unfinished and forgets what was read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = self._read()
        self._text, self._at = "", 0
        self.line, self._column = 1, 1
        self.peek()

    def _read(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            try:
                while chunk := file.read(_CHUNK):
                    yield chunk
            except UnicodeDecodeError:
                for _ in text_lines(self._path):  # names the line, which the decoder of chunks does not know
                    pass
                raise

    def _grow(self) -> bool:
        chunk = next(self._chunks, "")
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def skip(self, length: int) -> None:
        """Go `length` characters on."""
        end = self._at + length
        newlines = self._text.count("\n", self._at, end)
        self.line += newlines
        self._column = end - self._text.rfind("\n", self._at, end) if newlines else self._column + length
        self._at = end

    def peek(self) -> str:
        """Go to the next character that is not white space and return it, or "" at the end of the file."""
        while True:
            self.skip(_skip_space(self._text, self._at) - self._at)
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def element(self) -> tuple[Any, str]:
        """The value that begins here, or the JSONTextError in its place, and its text; goes on behind it."""
        while True:
            start = self._at
            try:
                try:
                    value, end = _scan(self._text, start)
                except JSONTextError as error:
                    value, end = error, _scan(self._text, start, strict=False)[1]
            except json.JSONDecodeError as error:
                # Far from the end of the window it is broken; near it, or inside a string, it may be unfinished.
                unfinished = error.pos > len(self._text) - 64 or error.msg.startswith("Unterminated")
                if unfinished and self._grow():
                    continue
                raise self.error(error.msg, error.pos - start) from error
            if end == len(self._text) and self._grow():
                continue
            self.skip(end - start)
            return value, self._text[start:end]

    def error(self, message: str, position: int) -> json.JSONDecodeError:
        """The error `position` characters from here, with its line and column in the file."""
        self.skip(position)
        error = json.JSONDecodeError(message, "", 0)
        error.lineno, error.colno = self.line, self._column
        return error


def _scan(text: str, start: int, strict: bool = True) -> tuple[Any, int]:
    """The value at `start` and where it ends. Raises JSONDecodeError if it is broken, JSONTextError if refused."""
    try:
        value, end = (_STRICT if strict else _LENIENT).raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("Nested too deeply", text, start) from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise json.JSONDecodeError(str(error), text, start) from None
    if strict and (text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0):
        for escape in _ESCAPES.finditer(text, start, end):
            if lone := escape["lone"]:
                what = f"lone surrogate {lone} at character {escape.start() - start + 1} of the row"
                raise JSONTextError(what, "write the whole character, or remove the escape")
    return value, end


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JSONTextError(f"duplicate key {twice!r}", "keep one of them")
    return values


def _refuse_constant(name: str) -> None:
    raise JSONTextError(f"{name} is not JSON", "write a number or null")


# Characters of an array that are read at a time.
_CHUNK = 1 << 20

_STRICT = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder()


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


def _broken(error: json.JSONDecodeError, column: int) -> str:
    reason = error.msg.removesuffix(" starting at").removesuffix(" at")
    return f"invalid JSON at column {column} ({reason[0].lower()}{reason[1:]})"


def _invalid_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    return f"invalid UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})", "save the file as UTF-8"


def _problem(where: str, value: Any) -> Problem:
    if isinstance(value, JSONTextError):
        return Problem(where, "", value.what, value.fix)
    return Problem(where, "", f"expected a JSON object, got {type_name(value)}", 'write the row as {"column": value}')
