"""Names and values of columns as they are compared: folded names, what holds text, what holds a conversation."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sft_recipes.data.reading.json_reader import RowProblem, parse_json
from sft_recipes.messages import ROLE_ALIASES

# The key of a turn that says who speaks; the first that a turn has counts.
ROLE_KEYS = ("role", "from", "speaker", "sender", "author")


@lru_cache(maxsize=10_000)
def fold(name: str) -> str:
    """A column's name without what differs between data sets: case, spaces, underscores and the like."""
    return "".join(char for char in name.lower() if char.isalnum())


def root(path: str) -> str:
    """The column that a dotted path begins with."""
    return path.partition(".")[0]


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name, or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def is_struct_of_lists(value: Any) -> bool:
    """Whether this may be a list of turns as some tables hold it: `{"role": [...], "content": [...]}`."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(part, list) for part in value.values())


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages: a list of objects, a struct of lists, or either as JSON text."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = parse_json(value)
        except RowProblem:
            return False
    if is_struct_of_lists(value):
        return any(key in value for key in ROLE_KEYS)
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    return isinstance(first, dict) or (isinstance(first, str) and first.lstrip().startswith("{"))


def names_speakers(value: Any) -> bool:
    """Whether a cell holds messages whatever its column is called: some turn says who speaks."""
    if not is_conversation(value):
        return False
    first = value[0] if isinstance(value, list) else value
    return not isinstance(first, dict) or any(key in first for key in ROLE_KEYS)


def begins_with_answer(value: Any) -> bool:
    """Whether a list of messages goes on from a prompt that stands elsewhere."""
    first = value[0] if isinstance(value, list) and value else {}
    if not isinstance(first, dict):
        return False
    roles = [first[key] for key in ROLE_KEYS if key in first]
    return bool(roles) and ROLE_ALIASES.get(roles[0], roles[0]) == "assistant"


def text_path(name: str, value: Any) -> str | None:
    """A dotted path from a column to the first text in it, as `column_mapping` takes it; None where there is none."""
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
    return sorted(value.items(), key=lambda item: fold(item[0]) not in ("text", "texts"))
