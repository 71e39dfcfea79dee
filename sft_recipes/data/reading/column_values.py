"""Names and values of columns as they are compared: folded names, kinds of values."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from sft_recipes.data.reading.json_reader import RowProblem, parse_json
from sft_recipes.messages import ROLE_ALIASES

# The name of a column in the rows, or the names of several whose texts are joined. A name may be a
# dotted path (`instances.0.input`).
NamesInRow = str | Sequence[str]

# The key of a turn that says who speaks; the first that a turn has counts.
ROLE_KEYS = ("role", "from", "speaker", "sender", "author")

_MEDIA_KINDS = ("image", "img", "picture", "video", "audio")
_MEDIA_ENDINGS = ("", "s", "path", "paths", "file", "files", "url", "urls", "bytes")
# Folded names of columns, and keys of turns, that hold what is no text.
MEDIA = frozenset(map("".join, product(_MEDIA_KINDS, _MEDIA_ENDINGS)))


@lru_cache(maxsize=10_000)
def fold(name: str) -> str:
    """A column's name without case, spaces, underscores and the like."""
    return "".join(filter(str.isalnum, name.lower()))


def first_step(path: str) -> str:
    """The name in the row that a dotted path begins with."""
    return path.partition(".")[0]


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name, or several, as a list."""
    if isinstance(names, str):
        return [names]
    return list(names)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {}


def is_struct_of_lists(value: Any) -> bool:
    """Whether this may be a list of turns as some tables hold it.

    That is `{"role": [...], "content": [...]}`.
    """
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(part, list) for part in value.values())


def role_key(turn: Mapping[str, Any]) -> str | None:
    """The key of a turn that says who speaks, or None."""
    for key in ROLE_KEYS:
        if key in turn:
            return key
    return None


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages: objects in a list, a struct of lists, or JSON text of it."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = parse_json(value)
        except RowProblem:
            return False
    if is_struct_of_lists(value):
        return role_key(value) is not None
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    if isinstance(first, str):
        return first.lstrip().startswith("{")
    return isinstance(first, dict)


def names_speakers(value: Any) -> bool:
    """Whether a cell holds messages whatever its column is called: some turn says who speaks."""
    if not is_conversation(value):
        return False
    first = value
    if isinstance(value, list):
        first = value[0]
    return not isinstance(first, dict) or role_key(first) is not None


def begins_with_answer(value: Any) -> bool:
    """Whether a list of messages goes on from a prompt that stands elsewhere."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    key = role_key(value[0])
    if key is None:
        return False
    role = value[0][key]
    return ROLE_ALIASES.get(role, role) == "assistant"


def text_path(name: str, value: Any) -> str | None:
    """A dotted path from a column to the first text in it, as `column_mapping` takes it.

    None where there is none.
    """
    if isinstance(value, str):
        return name
    if isinstance(value, Mapping):
        for key, part in _text_first(value):
            path = text_path(f"{name}.{key}", part)
            if path is not None:
                return path
    if isinstance(value, list) and value:
        return text_path(f"{name}.0", value[0])
    return None


def lines_path(name: str, value: Any) -> str | None:
    """A dotted path from a column to a text or a list of texts in it; None where there is none."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return name
    if isinstance(value, Mapping):
        for key, part in _text_first(value):
            path = lines_path(f"{name}.{key}", part)
            if path is not None:
                return path
        return None
    return text_path(name, value)


def _text_first(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The parts of an object, those called text before labels, numbers and the like."""
    texts: list[tuple[str, Any]] = []
    others: list[tuple[str, Any]] = []
    for key, part in value.items():
        if fold(key) in ("text", "texts"):
            texts.append((key, part))
        else:
            others.append((key, part))
    return texts + others
