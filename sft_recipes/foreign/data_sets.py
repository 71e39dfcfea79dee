"""The data sets of a foreign config: entry by entry, then as `dataset_name` or `datasets`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.recipe_keys import NAMES_INSIDE

# Keys of ours that hold a mapping, which several of theirs may add to.
_MAPPINGS = ("column_mapping", "message_mapping", "role_mapping")
_AT_TOP = {"path": "dataset_name", **{inside: top for top, inside in NAMES_INSIDE.items()}}
# Keys that only stand inside `datasets`.
_ONLY_INSIDE = ("data_files", "fraction", "held_out")
# A part of a split as `datasets` writes it, in percent or in rows.
_PART = re.compile(r"(?P<split>\w+)\[(?P<start>\d*)%?:(?P<stop>\d*)%?\]")


def put_sources(reading: Reading, origin: Setting, sources: Sequence[Mapping[str, Any]]) -> None:
    """Put data sets into the recipe: a lone one at its top, where all its keys may stand there."""
    lone = len(sources) == 1 and sources[0].keys().isdisjoint(_ONLY_INSIDE)
    if lone:
        for key, value in sources[0].items():
            reading.put(_AT_TOP.get(key, key), value, origin)
    elif sources:
        reading.put("datasets", list(sources), origin)


class DataSets:
    """The data sets below one key of a config."""

    def __init__(self, reading: Reading, key: str) -> None:
        self.reading = reading
        self.key = key
        self._entries: list[Entry] = []

    def entry(self, number: int | None = None) -> "Entry":
        """The data set at this place of the list; without one, the only set, whose keys stand there themselves."""
        key = self.key if number is None else f"{self.key}.{number}"
        entry = Entry(self.reading, key)
        self._entries.append(entry)
        return entry

    def finish(self) -> None:
        """Put the data sets into the recipe. Blocks where they need different templates."""
        origin = self.reading.setting(self.key)
        templates = {entry.template for entry in self._entries}
        if len(templates) > 1 and origin is not None:
            names = " and ".join(sorted(str(name or "the model's own") for name in templates))
            why = f"data sets in several templates ({names}): a recipe has one, so bring the rows into one format"
            self.reading.block(origin, why)
            return
        template = templates.pop() if templates else None
        if template is not None and origin is not None:
            self.reading.put("chat_template", template, origin)
        if origin is not None:
            self._limit_rows(origin)
            put_sources(self.reading, origin, [entry.ours for entry in self._entries])

    def _limit_rows(self, origin: Setting) -> None:
        limits = [entry.max_rows for entry in self._entries if entry.max_rows is not None]
        if limits and len(self._entries) > 1:
            self.reading.block(
                origin, "a number of rows of one set among several: write `weight` by hand"
            )
        elif limits:
            self.reading.put("max_rows", limits[0], origin)


class Entry:
    """One data set: what its keys mean, and the keys of ours that come of them."""

    def __init__(self, reading: Reading, key: str) -> None:
        self.reading = reading
        self.key = key
        self.ours: dict[str, Any] = {}
        self.template: str | None = None
        self.max_rows: int | None = None

    def names(self) -> Iterator[str]:
        """The names of the keys that are set in this entry."""
        content = self.reading.value(self.key)
        if isinstance(content, Mapping):
            yield from (name for name in content if content[name] is not None)

    def value(self, name: str) -> Any:
        """The value of one of its keys."""
        return self.reading.value(f"{self.key}.{name}")

    def setting(self, name: str) -> Setting:
        """One of its keys with its line; the entry where it is not set."""
        own = self.reading.setting(f"{self.key}.{name}") or self.reading.setting(self.key)
        assert own is not None
        return own

    def same(self, name: str, ours: Mapping[str, Any]) -> None:
        """The key means the same as these of ours inside `datasets`."""
        self._put(ours)
        self.reading.same(self.setting(name), {})

    def differs(self, name: str, say: str, ours: Mapping[str, Any]) -> None:
        """The key does something else here."""
        self._put(ours)
        self.reading.differs(self.setting(name), say)

    def no_effect(self, name: str, why: str) -> None:
        """The key changes nothing here."""
        self.reading.no_effect(self.setting(name), why)

    def block(self, name: str, why: str) -> None:
        """What the key asks for is not done here."""
        self.reading.block(self.setting(name), why)

    def block_whole(self, why: str) -> None:
        """Rows like these are not read here."""
        setting = self.reading.setting(self.key)
        if setting is not None:
            self.reading.block(setting, why)

    def find(self, name: str, what: str) -> None:
        """Something is wrong with the config itself."""
        self.reading.find(self.setting(name), what)

    def take_split(self, name: str, split: str) -> None:
        """A split's name, or a part of one: `train[:10%]`, `train[:500]`."""
        part = _PART.fullmatch(split)
        if part is not None and "%" in split:
            share = (int(part["stop"] or 100) - int(part["start"] or 0)) / 100
            say = f"a seeded {share:.0%} of the rows in place of this part"
            self.differs(name, say, {"split": part["split"], "weight": share})
        elif part is not None and part["stop"]:
            self.max_rows = int(part["stop"]) - int(part["start"] or 0)
            say = f"{self.max_rows} rows drawn by seed in place of this part"
            self.differs(name, say, {"split": part["split"]})
        elif "[" in split or "+" in split:
            self.block(name, f"{split!r}: a recipe names one split of a data set")
        else:
            self.same(name, {"split": split})

    def use_template(self, template: str | None) -> None:
        """Which template its rows are written in; None is the model's own."""
        if template is not None:
            self.template = template

    def _put(self, ours: Mapping[str, Any]) -> None:
        for key, value in ours.items():
            if key in _MAPPINGS:
                self.ours[key] = {**self.ours.get(key, {}), **value}
            else:
                self.ours[key] = value
