"""Text and JSON that a run, a person or another program wrote: damage is an error that names file and line.

All files of this kind are read here, but for data sets, whose rows have rules of their own (`data/reading/`); YAML is
read in `yaml_reader.py`.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem

# The fix where nothing else can help.
RESTORE = "restore it from a copy"
# What reading a value in a place where another was expected raises.
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Line(NamedTuple):
    """A line of a JSON Lines file: where it stands (`FILE:LINE`), and its object."""

    where: str
    content: dict[str, Any]


def read_text(path: Path, fix: str) -> str:
    """The text of a file in UTF-8. Raises InputError, with this fix, for a file that holds none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise InputError(Problem(str(path), "", what, fix)) from error
    except ValueError as error:  # a name with NUL
        raise InputError(Problem(repr(str(path)), "", str(error), fix)) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = f"byte {content[error.start]:#04x} is no UTF-8"
        raise InputError(Problem(f"{path}:{line}", "", what, fix)) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(Problem(f"{path}:{line}", "", "holds NUL bytes", fix))
    if not text.strip():
        raise InputError(Problem(str(path), "", "is empty", fix))
    return text


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, with this fix, for anything else."""
    text = read_text(path, fix)
    try:
        return _json_object(text)
    except _NoJson as error:
        raise InputError(Problem(f"{path}:{error.line}", "", str(error), fix)) from error


def read_json_lines(path: Path, fix: str) -> Iterator[Line]:
    """Each object of a JSON Lines file; a file without lines gives none.

    Raises InputError for a line that is none, also for two in one line.
    """
    if path.is_file() and path.stat().st_size == 0:
        return
    # Not `splitlines`: U+2028 and others end lines there, and JSON leaves them in texts as they are.
    for number, line in enumerate(read_text(path, fix).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield Line(where, _json_object(line))
            except _NoJson as error:
                raise InputError(Problem(where, "", str(error), fix)) from error


class _NoJson(Exception):
    """Why a text is no JSON object, and in which of its lines."""

    def __init__(self, what: str, line: int = 1) -> None:
        super().__init__(what)
        self.line = line


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _NoJson(f"is no JSON ({error.msg}, column {error.colno})", error.lineno) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise _NoJson(f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise _NoJson(f"holds {type(content).__name__}, not an object")
    return content


@contextlib.contextmanager
def interpreting(where: Path | str, fix: str) -> Iterator[None]:
    """Around code that takes the content of a file apart: a value that is missing or of another kind is the file's
    fault, not the program's. Raises InputError with this fix.
    """
    try:
        yield
    except _MISFITS as error:
        what = f"does not hold what belongs there ({type(error).__name__}: {error})"
        raise InputError(Problem(str(where), "", what, fix)) from error
