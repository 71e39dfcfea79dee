"""Examples that stay beside prepared rows as messages, in JSON Lines, each with its group."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.messages import Example
from sft_recipes.text_files import interpreting, read_json_lines


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
    """The examples of a file that `write_examples` wrote; none where there is no file.

    Raises InputError for a file that is damaged.
    """
    if not path.is_file():
        return []
    fix = f"delete {path.parent}: the rows are prepared again"
    examples: list[GroupedExample] = []
    for line in read_json_lines(path, fix):
        with interpreting(line.where, fix):
            group = line.content.pop("group")
            examples.append(GroupedExample(group, Example(**line.content)))
    return examples
