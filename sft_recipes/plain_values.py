"""What any value of a recipe has to be, whatever its key: plain data of a sane size, for YAML and for
callers in Python alike. No torch here.
"""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from sft_recipes.yaml_reader import DEEPEST, MOST_VALUES

SHOWN_CHARACTERS = 200
# What every system takes: a name of 255 bytes, a path of 1,024 (macOS; Linux takes 4,096).
LONGEST_NAME = 255
LONGEST_PATH = 1024
_BITS = 64
_SCALARS = (str, int, float, bool, type(None))


class _Shortened(reprlib.Repr):
    """A value for an error: its beginning, however long or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = SHOWN_CHARACTERS
        self.maxother = SHOWN_CHARACTERS
        self.maxlist = 12
        self.maxdict = 12

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers of thousands of digits."""
        if x.bit_length() > 4 * _BITS:
            return f"a whole number of {x.bit_length():,} bits"
        return repr(x)


_SHORTENED = _Shortened()


def shown(value: Any) -> str:
    """A value for an error, shortened; text without quotes."""
    if isinstance(value, str):
        return _printable(value)
    return _SHORTENED.repr(value)


def quoted(value: Any) -> str:
    """A value for an error, shortened, text in quotes."""
    return _SHORTENED.repr(value)


def _printable(text: str) -> str:
    """The beginning of a text, in a form that any terminal takes."""
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def fault_of(value: Any, holds_keys: bool = False, is_path: bool = False) -> str:
    """What keeps a value from being of use whatever its key means; empty if nothing does.

    `holds_keys`: a block, whose keys are looked at one by one as well. `is_path`: its texts name
    files, folders or repositories. A number that is the whole value is left to its key's range.
    """
    fault = _fault_of_size(value) or _fault_of_emptiness(value)
    if fault:
        return fault
    for part in _all_parts(value):
        is_number_of_its_own = part is value or holds_keys
        fault = _fault_of_part(part, may_be_infinite=is_number_of_its_own)
        if not fault and is_path and isinstance(part, str):
            fault = _fault_of_path(part)
        if fault:
            return fault
    return ""


def _fault_of_size(value: Any) -> str:
    """Whether a value is so deep or so large that looking at all of it would not end."""
    level = [value]
    seen = 0
    for _ in range(DEEPEST):
        seen += len(level)
        if seen > MOST_VALUES:
            return f"holds more than {MOST_VALUES:,} values"
        level = list(chain.from_iterable(map(_parts_of, level)))
        if not level:
            return ""
    return f"is nested more than {DEEPEST} deep"


def _fault_of_emptiness(value: Any) -> str:
    is_blank = isinstance(value, str) and not value.strip()
    if is_blank or value == []:
        return "is empty"
    if isinstance(value, list) and "" in value:
        return "has an empty text in its list"
    return ""


def _all_parts(value: Any) -> Iterator[Any]:
    """The value and all values inside it."""
    yield value
    for part in _parts_of(value):
        yield from _all_parts(part)


def _parts_of(value: Any) -> Sequence[Any]:
    """The values directly inside a value."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return value
    return ()


def _fault_of_part(value: Any, may_be_infinite: bool) -> str:
    """What is wrong with one value, those inside it aside."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                return f"has the key {quoted(key)}, which is not text"
        return ""
    if isinstance(value, (list, tuple)):
        return ""
    if not isinstance(value, _SCALARS):
        return f"is a {type(value).__name__}, which no recipe can hold"
    if isinstance(value, str):
        return _fault_of_text(value)
    if isinstance(value, int) and value.bit_length() >= _BITS:
        return f"has a whole number of more than {_BITS - 1} bits"
    if isinstance(value, float) and not may_be_infinite and not math.isfinite(value):
        return f"has the number {value}"
    return ""


def _fault_of_text(text: str) -> str:
    if "\0" in text:
        return "has a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair ({text[error.start]!a})"
    return ""


def _fault_of_path(text: str) -> str:
    if text.startswith("~"):
        return "begins with ~, which only a shell expands: write the folder in full"
    content = text.encode("utf-8", "surrogatepass")
    longest = max(map(len, content.split(b"/")))
    if longest > LONGEST_NAME:
        return f"has a name of {longest:,} bytes; file systems take {LONGEST_NAME}"
    if len(content) > LONGEST_PATH:
        return f"is a path of {len(content):,} bytes; systems take {LONGEST_PATH:,}"
    return ""


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
