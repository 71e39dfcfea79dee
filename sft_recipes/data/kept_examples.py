"""Examples that stay beside prepared rows as messages, in JSON Lines, each with its group."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.messages import Example


@dataclass(frozen=True, slots=True)
class GroupedExample:
    """An example and the group of its prompt; 0 where nobody asks for groups."""

    group: int
    example: Example


def write_examples(path: Path, examples: Iterable[GroupedExample]) -> None:
    """Write examples in place of whatever stands in the file."""
    path.unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    for grouped in examples:
        entry: dict[str, Any] = {"group": grouped.group}
        for name in Example.__slots__:
            entry[name] = getattr(grouped.example, name)
        entries.append(entry)
    append_json_lines(path, entries)


def read_examples(path: Path) -> list[GroupedExample]:
    """The examples of a file that `write_examples` wrote; none where there is no file."""
    if not path.is_file():
        return []
    examples: list[GroupedExample] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            group = entry.pop("group")
            examples.append(GroupedExample(group, Example(**entry)))
    return examples
