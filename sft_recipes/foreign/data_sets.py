"""The data sets of a foreign config: entry by entry, then as `dataset_name` or `datasets`."""

from collections.abc import Iterator, Mapping
from typing import Any

from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.recipe_keys import NAMES_INSIDE

# Keys of ours that hold a mapping, which several of theirs may add to.
_MAPPINGS = ("column_mapping", "message_mapping", "role_mapping")
_AT_TOP = {"path": "dataset_name", **{inside: top for top, inside in NAMES_INSIDE.items()}}
# Keys that only stand inside `datasets`.
_ONLY_INSIDE = ("data_files", "fraction", "held_out")


class DataSets:
    """The data sets below one key of a config."""

    def __init__(self, reading: Reading, key: str) -> None:
        self.reading = reading
        self.key = key
        self._entries: list[Entry] = []

    def entry(self, number: int) -> "Entry":
        """The data set at this place of the list."""
        entry = Entry(self.reading, f"{self.key}.{number}")
        self._entries.append(entry)
        return entry

    def finish(self) -> None:
        """Put the data sets into the recipe. Blocks where they need different templates."""
        origin = self.reading.setting(self.key)
        templates = {entry.template for entry in self._entries}
        if len(templates) > 1 and origin is not None:
            names = ", ".join(sorted(str(name or "the model's own") for name in templates))
            self.reading.block(origin, f"one recipe has one template, and these sets need {names}")
            return
        template = templates.pop() if templates else None
        if template is not None and origin is not None:
            self.reading.put("chat_template", template, origin)
        sources = [entry.ours for entry in self._entries]
        if origin is None or not sources:
            return
        lone = len(sources) == 1 and sources[0].keys().isdisjoint(_ONLY_INSIDE)
        if lone:
            for key, value in sources[0].items():
                self.reading.put(_AT_TOP.get(key, key), value, origin)
        else:
            self.reading.put("datasets", sources, origin)


class Entry:
    """One data set: what its keys mean, and the keys of ours that come of them."""

    def __init__(self, reading: Reading, key: str) -> None:
        self.reading = reading
        self.key = key
        self.ours: dict[str, Any] = {}
        self.template: str | None = None

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
