"""Strict reader for `.jsonl` files and `.json` arrays: row by row, each with its line.

`datasets` counts bad lines from the start of a 10 MB block, turns NaN into null and lets later rows
change type; here every deviation is reported with its own file and line. Memory stays at one line,
or at the text of an array. A row that is a bare list of messages is read as `{"messages": [...]}`.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.data.reading.row_files import display_path, file_kind, open_bytes
from sft_recipes.errors import InputError, Problem

# In JSON that parses: a surrogate pair, or a surrogate without its other half. An even number of
# backslashes before it are escaped themselves; all else is skipped without a stop, for a line may
# hold millions of escapes.
_SURROGATES = re.compile(
    r"(?<!\\)(?:\\\\)*(?:\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..))"
)
_SPACE = re.compile(r"[ \t\n\r]*")
# What renders, compares and copies a value later on goes down level by level, and Python has few
# hundred of them.
DEEPEST = 100
# Keys of which a turn of a conversation has at least one.
_TURN_KEYS = ("role", "from")


class RowProblem(Exception):
    """What is wrong with one row, or with JSON text inside it; `field` may be empty."""

    def __init__(self, field: str, what: str, fix: str) -> None:
        super().__init__(field, what, fix)
        self.field = field
        self.what = what
        self.fix = fix

    def at(self, where: str) -> Problem:
        """The same with the place of the row."""
        return Problem(where, self.field, self.what, self.fix)


class Row(NamedTuple):
    """A row of a file: its line (from 1) where the file has lines, and its values or what is wrong.

    `text` is the row as it stands in the file, where that is known.
    """

    line: int | None
    content: dict[str, Any] | RowProblem
    text: str


def append_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add a line for each entry to a JSON Lines file, which is made where there is none."""
    with path.open("a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def type_name(value: Any) -> str:
    """How messages call the type of a JSON value."""
    if value is None:
        return "null"
    return type(value).__name__


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark.

    Raises InputError where it is not UTF-8.
    """
    with open_bytes(path) as file:
        encoding = "utf-8-sig"
        for line, raw in enumerate(file, 1):
            try:
                yield raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(_invalid_utf8(error).at(f"{display_path(path)}:{line}")) from error
            encoding = "utf-8"


def parse_json(text: str) -> Any:
    """Parse one strict JSON text. Raises RowProblem, with the 1-based column where it is broken."""
    try:
        value, end = _scan(text, _skip_space(text, 0))
        end = _skip_space(text, end)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        fix = "write one complete JSON object per line, or remove the line"
        raise _broken(error.msg, error.pos + 1, fix) from error
    return value


def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file or of a JSON array of rows.

    The content decides which one it is.

    A UTF-8 byte order mark, CRLF, blank lines and a missing final newline change nothing. Raises
    InputError for no rows, one object alone in a `.json` file, and at the first element of an array
    that is not strict JSON.
    """
    name = display_path(path)
    is_json_lines = file_kind(path) == "jsonl"
    first, second = _first_lines(path)
    if first.startswith("{") and not second.startswith("{") and not is_json_lines:
        fix = "put the rows into an array [...], or rename a file of one object per line to .jsonl"
        raise InputError(Problem(name, "", "one JSON object alone, not an array of rows", fix))
    rows = _lines(path)
    if first.startswith("[") and not _is_list_of_messages(first, second, is_json_lines):
        rows = _elements(path)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise InputError(Problem(name, "", "no rows", "write at least one row into the file"))


def _content(value: Any) -> dict[str, Any] | RowProblem:
    """What a row holds, from the JSON value in its place."""
    if isinstance(value, dict | RowProblem):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"messages": value}
    what = f"expected a JSON object, got {type_name(value)}"
    return RowProblem("", what, 'write the row as {"column": value}')


def _first_lines(path: Path) -> tuple[str, str]:
    """The first line that is not blank, and the next; "" where there is none."""
    lines: list[str] = []
    with open_bytes(path) as file:
        for raw in file:
            text = raw.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()
            if text:
                lines.append(text)
            if len(lines) == 2:
                break
    first, second, *_ = [*lines, "", ""]
    return first, second


def _is_list_of_messages(first: str, second: str, is_json_lines: bool) -> bool:
    """Whether a line that begins with a bracket is a row, a bare list of messages.

    Else it begins an array of rows.
    """
    if second and not second.startswith("["):
        return False
    if second:
        try:
            return isinstance(parse_json(first), list)
        except RowProblem:
            return False
    if not is_json_lines:
        return False
    try:
        element, _ = _scan(first, _skip_space(first, 1))
    except (json.JSONDecodeError, RowProblem):
        return False
    return isinstance(element, dict) and any(key in element for key in _TURN_KEYS)


def _lines(path: Path) -> Iterator[Row]:
    """The row of every line that is not blank."""
    with open_bytes(path) as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                text = raw.rstrip(b"\r\n").decode()
                value = parse_json(text)
            except UnicodeDecodeError as error:
                text = raw.decode(errors="replace")
                value = _invalid_utf8(error)
            except RowProblem as error:
                value = error
            yield Row(line, _content(value), text.strip())


def _elements(path: Path) -> Iterator[Row]:
    """The row of every element of an array. Raises InputError where one is broken or refused."""
    text = "".join(text_lines(path))
    line = 1
    counted = 0  # characters whose line breaks are in `line`
    at = _skip_space(text, text.index("[") + 1)
    try:
        more = text[at : at + 1] != "]"
        while more:
            line += text.count("\n", counted, at)
            counted = at
            value, end = _scan(text, at)
            yield Row(line, _content(value), text[at:end].strip())
            at = _skip_space(text, end)
            more = text[at : at + 1] == ","
            if more:
                at = _skip_space(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ','", text, at)
        at = _skip_space(text, at + 1)
        if at != len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        problem = _broken(error.msg, error.colno, "repair the array there")
        raise InputError(problem.at(f"{display_path(path)}:{error.lineno}")) from error
    except RowProblem as error:
        raise InputError(error.at(f"{display_path(path)}:{line}")) from error


def _scan(text: str, start: int) -> tuple[Any, int]:
    """The value at `start` and where it ends.

    Raises JSONDecodeError if it is broken, RowProblem if refused.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        # Nested too deeply; an integer with more digits than Python converts.
        raise json.JSONDecodeError(str(error), text, start) from None
    brackets = text.count("{", start, end) + text.count("[", start, end)
    if brackets > DEEPEST and _is_too_deep(value):
        what = f"nested more than {DEEPEST} deep"
        raise RowProblem("", what, "flatten the value, or remove the row")
    if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
        _refuse_lone_surrogates(text, start, end)
    return value, end


def _refuse_lone_surrogates(text: str, start: int, end: int) -> None:
    for match in _SURROGATES.finditer(text, start, end):
        lone = match["lone"]
        if lone:
            character = match.start("lone") - start + 1
            what = f"lone surrogate {lone} at character {character} of the row"
            raise RowProblem("", what, "write the whole character, or remove the escape")


def _is_too_deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for container in level:
            children = container
            if isinstance(container, dict):
                children = container.values()
            for child in children:
                if isinstance(child, dict | list):
                    inside.append(child)
        if not inside:
            return False
        level = inside
    return True


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
    # The empty string matches as well.
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _broken(reason: str, column: int, fix: str) -> RowProblem:
    reason = reason.removesuffix(" starting at").removesuffix(" at")
    reason = reason[0].lower() + reason[1:]
    return RowProblem("", f"invalid JSON at column {column} ({reason})", fix)


def _invalid_utf8(error: UnicodeDecodeError) -> RowProblem:
    what = f"invalid UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})"
    return RowProblem("", what, "save the file as UTF-8")
