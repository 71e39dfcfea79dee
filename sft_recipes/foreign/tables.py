"""What is known of a tool's keys: one YAML file a tool, read once.

A file holds `tool`, `version` and `source` (what it was read from), `unknown_keys` (whether the tool ignores or refuses
a key that it does not know), `interpolated` (whether its values may name others, `${output_dir}`), and the rules of its
keys:

    exact: {their key: our key}     the same meaning, so the value is carried over
    values: {their key: {value: {set: {our key: value}, say: what differs}, other value: {harmless: why}, ...}}
                                    the value decides; `"*"` stands for all others, `{to: our key, say: ...}`
    harmless: {their key: why}      without effect here
    differs: {their key: {to: our key, say: what differs}}
    refused: {their key: why}       blocks, unless it is switched off
    dead: {their key: why}          the tool itself does not use it
    defaults: {their key: value}    what the tool does where the key is not set, taken as if it were written
    known: [their key]              names of its schema that no rule is for

Keys are dotted paths, `*` for any entry of a list; a rule covers all that stands below its key, unless a longer one
does. What else a file holds is read by the tool's module.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

_KINDS = ("exact", "values", "harmless", "differs", "refused", "dead")


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What one key means here: the kind of the rule, and what the file says."""

    kind: str
    content: Any


@dataclass(frozen=True)
class Table:
    """The file of one tool. `more` holds what only the tool's module reads."""

    name: str
    tool: str
    version: str
    source: str
    ignores_unknown_keys: bool
    is_interpolated: bool
    rules: Mapping[str, KeyRule]
    defaults: Mapping[str, Any]
    known: frozenset[str]
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The tool with its version."""
        return f"{self.tool} {self.version}"


@lru_cache
def read_table(name: str) -> Table:
    """The table of a tool, by the name of its file."""
    path = Path(__file__).with_name(f"{name}.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rules = dict(_rules(content))
    return Table(
        name=name,
        tool=content.pop("tool"),
        version=str(content.pop("version")),
        source=content.pop("source"),
        ignores_unknown_keys=content.pop("unknown_keys") == "ignored",
        is_interpolated=content.pop("interpolated", False),
        rules=rules,
        defaults=content.pop("defaults", {}),
        known=frozenset(content.pop("known", ())),
        more=content,
    )


def _rules(content: dict[str, Any]) -> Iterator[tuple[str, KeyRule]]:
    """Take the rules out of a table's content. Raises ValueError for a key that has two."""
    ruled = set()
    for kind in _KINDS:
        for key, value in content.pop(kind, {}).items():
            if key in ruled:
                raise ValueError(f"{content['tool']}: two rules for {key}")
            ruled.add(key)
            if kind == "values":
                value = {value_text(name): meaning for name, meaning in value.items()}
            yield key, KeyRule(kind, value)


def value_text(value: Any) -> str:
    """A plain value as YAML writes it: true, null, 4, auto."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(value)


def is_off(value: Any) -> bool:
    """Whether a value says that what the key is for is not wanted."""
    return value is None or value in (False, 0, "", [], {})
