"""What a key of a recipe and its value may be: types, ranges, refused names and old names.

No list of types stands here: `typing` hints of dataclasses, TRL's and ours, say what fits, and what
it is called in an error. Names and their replacements stand in `recipe_keys.yaml`.
"""

import enum
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sft_recipes.errors import Problem, suggest
from sft_recipes.number_range import Range
from sft_recipes.plain_values import fault_of, quoted, shown
from sft_recipes.recipe import BLOCK_KEYS, PATHS

TABLES: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_name("recipe_keys.yaml").read_text(encoding="utf-8")
)
# Old or foreign names for what a current key does; keys this project does not take, with what to do
# instead; where a new key is not quite the old one.
RENAMED: Mapping[str, str] = TABLES["renamed"]
REFUSED: Mapping[str, str] = TABLES["refused"]
NOTES: Mapping[str, str] = TABLES["notes"]
# How advice begins that only takes a key out, with the reason behind it.
REMOVE = "remove it; "
REFUSED_VALUES: Mapping[str, Mapping[str, str]] = TABLES["refused_values"]
# Keys that other keys switch on (NEEDS) or off (IDLE), with the values of those that do.
NEEDS: Mapping[str, Mapping[str, list[Any]]] = TABLES["needs"]
IDLE: Mapping[str, Mapping[str, list[Any]]] = TABLES["idle"]
# Values that say in so many words that what a key is for is not wanted.
SWITCHED_OFF = (False, 0, "no", "none")
# No key is longer; what is longer is no misspelt one.
_LONGEST_KEY = 80

_UNIONS = (typing.Union, types.UnionType)
# How a type is called in an error, where Python's own name says little to someone who writes YAML.
_TYPE_NAMES: Mapping[Any, str] = {bool: "true or false", Mapping: "dict", Sequence: "list"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe: the type of its value, its default, what a number and a text may be, and
    what it means.

    `words`: the only texts that it takes, where not any. TRL's documentation says what TRL's keys
    mean.
    """

    kind: Any
    default: Any = None
    range: Range | None = None
    meaning: str = ""
    words: Sequence[str] = ()

    @property
    def expected(self) -> str:
        """What a value has to be, in words: `float from 0 to 1`."""
        if self.words:
            return self._expected_words()
        if self.range is None:
            return type_name(self.kind)
        return f"{type_name(self.kind)} {self.range}"

    def _expected_words(self) -> str:
        others = [kind for kind in _alternatives(self.kind) if kind not in (str, types.NoneType)]
        text = "one of " + ", ".join(self.words)
        if not others:
            return text
        names = " or ".join(type_name(kind) for kind in others)
        return f"{names} {self.range or ''}".rstrip() + f" or {text}"

    def fits(self, value: Any) -> bool:
        """Whether a plain YAML value is of the key's type and one of those that it takes."""
        if not fits_type(value, self.kind):
            return False
        if isinstance(value, str):
            return not self.words or value in self.words
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number:
            return True
        if self.range is None:
            return math.isfinite(value)
        return self.range.holds(value)


def fits_type(value: Any, kind: Any) -> bool:
    """Whether a YAML value fits a type hint; an int fits a float, an enum takes its values."""
    arguments = typing.get_args(kind)
    if choices := _choices(kind):
        return value in choices or (value is None and types.NoneType in arguments)
    origin = typing.get_origin(kind) or kind
    if origin in _UNIONS:
        return any(fits_type(value, alternative) for alternative in arguments)
    if origin in (list, Sequence):
        return isinstance(value, list) and _all_fit(value, *arguments)
    if origin is Mapping and arguments:
        key_kind, value_kind = arguments
        return (
            isinstance(value, Mapping)
            and _all_fit(value, key_kind)
            and _all_fit(value.values(), value_kind)
        )
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin)


def _all_fit(values: Iterable[Any], kind: Any = Any) -> bool:
    """Whether every one of the values fits a type hint."""
    return all(fits_type(value, kind) for value in values)


def type_name(kind: Any) -> str:
    """What a value of this type is called in an error; null, which any key takes, is not named."""
    if choices := _choices(kind):
        return "one of " + ", ".join(map(str, choices))
    if typing.get_origin(kind) is Mapping and typing.get_args(kind)[-1] is not Any:
        return "a mapping of names to names, {ours: theirs}"
    names = []
    for alternative in _alternatives(kind):
        if alternative is not types.NoneType:
            plain = typing.get_origin(alternative) or alternative
            names.append(_TYPE_NAMES.get(plain) or plain.__name__)
    return " or ".join(names)


def _alternatives(kind: Any) -> Sequence[Any]:
    """The members of a union, or the type alone."""
    if typing.get_origin(kind) in _UNIONS:
        return typing.get_args(kind)
    return (kind,)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of an enum even where TRL takes any text beside it; else none."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    choices: list[Any] = []
    for alternative in _alternatives(kind):
        if isinstance(alternative, type) and issubclass(alternative, enum.Enum):
            choices += [member.value for member in alternative]
    return tuple(choices)


# -- what is wrong with keys -----------------------------------------------------------------------


class Setting(NamedTuple):
    """One key and its value."""

    key: str
    value: Any


class _Fault(NamedTuple):
    what: str
    fix: str


def current(key: str, value: Any) -> Setting | None:
    """The key and value that now say what these said; None if that has to be decided by hand."""
    if key == "warmup_ratio" and value is not None:
        # A share below 1 stays one; a ratio of 1 would turn into one step.
        is_share = fits_type(value, float) and value < 1
        if not is_share:
            return None
    new_key = RENAMED.get(key, key)
    conversions = TABLES["values"].get(key, {})
    if value in list(conversions):
        return Setting(new_key, conversions[value])
    if conversions and new_key != key and value is not None:
        return None
    return Setting(new_key, value)


@dataclass(frozen=True, slots=True)
class KeyCheck:
    """Keys as they stand somewhere, which are known there, and where that is, for errors.

    `places` says where each key was set, if not at `where`; `prefix` is the block they stand in.
    """

    values: Mapping[str, Any]
    known: Mapping[str, Key]
    where: str
    places: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def problems(self) -> list[Problem]:
        """What is wrong with the keys and their values, in the order they were written."""
        problems = []
        for key, value in self.values.items():
            fault: _Fault | None = None
            if key not in self.known:
                fault = self._wrong_key(key)
            elif value is not None:
                fault = self._wrong_value(key, value)
            if fault:
                place = self.places.get(key, self.where)
                problems.append(Problem(place, self.prefix + shown(key), *fault))
        return problems

    def _wrong_key(self, key: str) -> _Fault:
        if key in REFUSED:
            return _Fault("not taken by this project", REFUSED[key])
        if key in RENAMED:
            return self._renamed(key)
        fix = "remove it; docs/reference/recipe-keys.md lists every key"
        if self.prefix:  # a block has few keys: all are listed
            fix = ""
        if not isinstance(key, str) or len(key) > _LONGEST_KEY:
            return _Fault("unknown key", "remove it")
        return _Fault("unknown key", suggest(key, self.known, otherwise=fix))

    def _renamed(self, key: str) -> _Fault:
        """What to say of an old name: `check --fix` is offered where it would rewrite it."""
        new_key = RENAMED[key]
        what = f"is now called {new_key!r}"
        if key in NOTES:
            what += f" ({NOTES[key]})"
        if new_key in self.values:
            return _Fault(what, f"remove it; {new_key} is set as well")
        fix = f"write `{new_key}: ...`"
        in_file = self.places.get(key, "").startswith(self.where)
        if in_file and current(key, self.values[key]):
            fix += ", or let `sft-recipes check --fix` rewrite it"
        return _Fault(what, fix)

    def _wrong_value(self, key: str, value: Any) -> _Fault | None:
        unusable = fault_of(value, holds_keys=key in BLOCK_KEYS, is_path=key in PATHS)
        if unusable:
            return _Fault(unusable, "write another value, or remove the key")
        instead = REFUSED_VALUES.get(key, {}).get(str(value))
        if instead:
            return _Fault(f"{value!r} is not taken", instead)
        now = current(key, value)
        # By identity first: NaN differs from itself.
        if now is not None and now.value is not value and now.value != value:
            what = f"{quoted(value)} is now called {now.value!r}"
            return _Fault(what, "write that, or run `sft-recipes check --fix`")
        if not self.known[key].fits(value):
            what = f"expected {self.known[key].expected}, got {quoted(value)}"
            return _Fault(what, "write it in that form")
        return None


# -- keys without effect -----------------------------------------------------------------------------


def switches_off(key: str, values: Mapping[str, Any]) -> list[str]:
    """The other keys whose values leave this one without effect."""
    idle = IDLE.get(key, {})
    idling = [switch for switch, states in idle.items() if values.get(switch) in states]
    if idling:
        return idling
    needs = NEEDS.get(key, {})
    for switch, states in needs.items():
        value = values.get(switch)
        switched_on = value in states if states else bool(value)
        if switched_on or value in SWITCHED_OFF:
            return []
    return list(needs)


def states_of(switches: Iterable[str], values: Mapping[str, Any]) -> str:
    """Keys with their values, for a message: `eval_strategy: no, packing: not set`."""
    return ", ".join(f"{key}: {values.get(key, 'not set')}".lower() for key in switches)
