"""A foreign config while it is read: each of its keys, where it went, and the recipe that comes of it."""

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes.foreign.tables import Table
from sft_recipes.plain_values import is_file


class Group(enum.StrEnum):
    """Where a key of a foreign config went; every key is in exactly one."""

    SAME = "same"
    NO_EFFECT = "no effect"
    DIFFERENT = "different"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a foreign config, dotted (`datasets.0.path`), with all that stands below it.

    `line` is 1-based; 0 where the tool's default stands for a key that was not set.
    """

    key: str
    value: Any
    line: int

    @property
    def is_default(self) -> bool:
        """Whether nobody wrote it."""
        return self.line == 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one key: its group, why in words, and our keys that it set.

    `rule_key` is the key that was decided on: this one, or one that it stands below.
    """

    setting: Setting
    group: Group
    rule_key: str
    say: str = ""
    ours: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForeignFinding:
    """What is wrong with the config itself. `judgement`: by experience, not by fact; `source` says whose."""

    place: str
    key: str
    what: str
    judgement: bool = False
    source: str = ""

    def __str__(self) -> str:
        parts = (self.place, self.key, self.what)
        text = ": ".join(part for part in parts if part)
        if self.source:
            text += f" ({self.source})"
        return text


class Reading:
    """A foreign config and what was made of it so far.

    `settings` are the values of the file that stand inside no other, by dotted key; `tree` is the file's content.
    """

    def __init__(
        self, table: Table, path: Path, tree: Mapping[str, Any], settings: Sequence[Setting]
    ) -> None:
        self.table = table
        self.path = path
        self.tree = tree
        self.settings = {setting.key: setting for setting in settings}
        self.outcomes: dict[str, Outcome] = {}
        self.defaults: list[Outcome] = []
        self.findings: list[ForeignFinding] = []
        self.recipe: dict[str, Any] = {}
        # Which of their keys set each of ours.
        self.origins: dict[str, Setting] = {}
        # Files beside the recipe, by name.
        self.files: dict[str, str] = {}
        self.launch: str | None = None
        self.remote_code_is_not_needed = False
        # What decides on labels and stands in another file, by the names of the label rules.
        self.beside_config: dict[str, Any] = {}
        # Whether the config evaluates rows that stand in another data set.
        self.evaluates_elsewhere = False
        # Rows that stand in for data sets that are not at hand; None where there are none.
        self.data: str | None = None

    # -- what a rule may ask -----------------------------------------------------------------------

    def value(self, key: str) -> Any:
        """The value of another key, or the tool's default for it; None where there is neither."""
        value: Any = self.tree
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping):
                value = value.get(part)
            else:
                value = None
        if value is None:
            return self.table.defaults.get(key)
        return value

    def setting(self, key: str) -> Setting | None:
        """Another key with its line, or the first of those below it; None where it is not set."""
        for setting in self.below(key):
            return Setting(key, self.value(key), setting.line)
        return None

    def below(self, key: str) -> Iterator[Setting]:
        """The settings at a key and below it."""
        for setting in self.settings.values():
            if setting.key == key or setting.key.startswith(f"{key}."):
                yield setting

    def place(self, setting: Setting | None) -> str:
        """Where a key stands, for messages: its file's name, which stands in full above them, and its line."""
        if setting is None or setting.is_default:
            return self.path.name
        return f"{self.path.name}:{setting.line}"

    def find_file(self, name: str) -> Path | None:
        """A file that the config names: seen from the working directory, or from the config's folder or one above."""
        for folder in (Path(), *self.path.resolve().parents):
            if is_file(folder / name):
                return folder / name
        return None

    def local_path(self, name: str) -> str:
        """A path or name as a recipe writes it: seen from the working directory, as ours without `./` are."""
        if name.startswith("../"):
            return str(Path(name).resolve())
        return name.removeprefix("./") or "."

    # -- what a rule decides -----------------------------------------------------------------------

    def same(self, setting: Setting, ours: Mapping[str, Any]) -> None:
        """The key means the same as these keys of ours."""
        self._decide(setting, Group.SAME, "", ours)

    def differs(self, setting: Setting, say: str, ours: Mapping[str, Any] | None = None) -> None:
        """What the key asks for is done differently here, or not at all; `say` says how."""
        self._decide(setting, Group.DIFFERENT, say, ours or {})

    def no_effect(self, setting: Setting, why: str) -> None:
        """The key changes nothing here."""
        self._decide(setting, Group.NO_EFFECT, why, {})

    def block(self, setting: Setting, why: str) -> None:
        """What the key asks for is not done by this project: no recipe is written."""
        self._decide(setting, Group.BLOCKED, why, {})

    def find(
        self, setting: Setting | None, what: str, judgement: bool = False, source: str = ""
    ) -> None:
        """Something is wrong with the config itself."""
        key = setting.key if setting is not None else ""
        self.findings.append(ForeignFinding(self.place(setting), key, what, judgement, source))

    def write_file(self, name: str, text: str) -> str:
        """A file beside the recipe; returns how the recipe names it."""
        self.files[name] = text
        return f"./{name}"

    def jinja_file(self, template: str) -> str:
        """How the recipe names a template that the config holds or names as a file."""
        if "{" in template:
            return self.write_file("chat_template.jinja", template)
        return self.local_path(template)

    def put(self, key: str, value: Any, origin: Setting) -> None:
        """Set a key of ours whose account is already given."""
        self.recipe[key] = value
        self.origins[key] = origin

    def replace(self, key: str, value: Any) -> None:
        """Set a key of ours on the command line, in the place of what the config says."""
        self.recipe[key] = value
        self.origins[key] = Setting("command line", value, 0)

    def put_default(self, key: str, value: Any, say: str) -> None:
        """Set a key of ours to what the tool does by itself."""
        setting = Setting(key, value, 0)
        self._decide(setting, Group.DIFFERENT, say, {key: value})

    def _decide(self, setting: Setting, group: Group, say: str, ours: Mapping[str, Any]) -> None:
        for key, value in ours.items():
            first = self.origins.get(key)
            if first is not None and self.recipe[key] != value:
                say = f"{first.key} says {self.recipe[key]!r} of the same: keep one of the two"
                group = Group.BLOCKED
                ours = {}
                break
        for key in ours:
            self.recipe[key] = ours[key]
            self.origins[key] = setting
        if setting.is_default:
            self.defaults.append(Outcome(setting, group, setting.key, say, ours))
            return
        for leaf in self.below(setting.key):
            # What stands in the way is said, whatever was decided before.
            if leaf.key not in self.outcomes or group is Group.BLOCKED:
                self.outcomes[leaf.key] = Outcome(leaf, group, setting.key, say, ours)

    def withdraw(self, our_key: str, why: str, group: Group = Group.NO_EFFECT) -> None:
        """Take one of our keys out of the recipe, and say why of the key that set it."""
        del self.recipe[our_key]
        origin = self.origins.pop(our_key)
        self.defaults = [outcome for outcome in self.defaults if outcome.setting.key != origin.key]
        for leaf in self.below(origin.key):
            outcome = self.outcomes[leaf.key]
            rest = {key: value for key, value in outcome.ours.items() if key != our_key}
            if not rest or group is Group.BLOCKED:
                self.outcomes[leaf.key] = Outcome(leaf, group, outcome.rule_key, why, rest)

    # -- what came of it ---------------------------------------------------------------------------

    @property
    def decided(self) -> list[Outcome]:
        """One outcome for each key that was decided on, in the order of the file."""
        by_rule: dict[str, Outcome] = {}
        for key in self.settings:
            outcome = self.outcomes[key]
            by_rule.setdefault(outcome.rule_key, outcome)
        return list(by_rule.values())

    @property
    def blocked(self) -> list[Outcome]:
        """What stands in the way of a recipe."""
        return [outcome for outcome in self.decided if outcome.group is Group.BLOCKED]
