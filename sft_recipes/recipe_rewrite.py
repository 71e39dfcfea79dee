"""Old keys of a recipe file under their current names: only those keys, and values whose form changed, are touched."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import parse_value, read_yaml
from sft_recipes.recipe_keys import NOTES, current


def rewrite(path: Path) -> list[str]:
    """Give old keys of the file their current names; returns one line per change, `FILE:LINE: old -> new (note)`.

    A key whose current name is set as well is left alone: reading the recipe reports it. Raises InputError, with the
    file as it was, if it is no recipe or would not load to the same values under the new names.
    """
    values, _ = read_yaml(path)
    text = path.read_bytes().decode("utf-8")
    root: Any = yaml.compose(text, yaml.SafeLoader)
    nodes = {key.value: (key, value) for key, value in root.value}
    expected: dict[str, Any] = {}
    edits: list[tuple[int, int, str]] = []
    changes: list[str] = []
    for old, before in values.items():
        new, after = current(old, before) or (old, before)
        if new != old and new in {*values, *expected}:
            new, after = old, before
        expected[new] = after
        if (new, after) == (old, before):
            continue
        key, value = nodes[old]
        edits.append((key.start_mark.index, key.end_mark.index, new))
        shown = f"{old} -> {new}"
        if after != before:
            edits.append(
                (
                    value.start_mark.index,
                    value.end_mark.index,
                    yaml.safe_dump(after).partition("\n")[0],
                )
            )
            shown = f"{old}: {value.value} -> {new}: {edits[-1][2]}"
        changes.append(
            f"{path}:{key.start_mark.line + 1}: {shown}"
            + (f" ({NOTES[old]})" if old in NOTES else "")
        )
    for start, end, written in sorted(edits, reverse=True):
        text = text[:start] + written + text[end:]
    if changes:
        _replace(path.resolve(), text, expected)
    return changes


def _replace(path: Path, text: str, expected: Mapping[str, Any]) -> None:
    found = parse_value(text)
    if found != expected or list(found) != list(expected):
        what = "old keys could not be renamed without changing other values"
        raise InputError(
            Problem(str(path), "", what, "rename them by hand; check without --fix lists them")
        )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    shutil.copymode(path, temporary)
    temporary.replace(path)
