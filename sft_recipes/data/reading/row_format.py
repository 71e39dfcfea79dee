"""How the rows of one source are read: the format, and the names that its columns and keys have."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sft_recipes.data.reading.column_values import as_list, root
from sft_recipes.data.reading.columns import FORMATS, TheirNames
from sft_recipes.data.reading.refused_columns import Reading
from sft_recipes.data.reading.turn_keys import KNOWN_ROLES, MESSAGE_KEYS, TurnKeys
from sft_recipes.errors import InputError, Problem, suggest

# Columns of text, which several of theirs may make up.
_JOINABLE = ("instruction", "input", "output", "system", "prompt", "completion", "text")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one source are read.

    `column_mapping` is {our name: their name, or a list of names whose texts are joined}; their
    name may lead into nested values, as in `instances.0.input`. `extra` are further columns to keep
    on the examples (under our name) of the rows that have them. `recognised` is {our name: their
    name} where a column was recognised unasked.
    """

    name: str
    column_mapping: Mapping[str, TheirNames]
    extra: Sequence[str] = ()
    allow_empty_output: bool = False
    recognised: Mapping[str, str] = field(default_factory=dict)
    keys: TurnKeys = field(default_factory=TurnKeys)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row, under our names."""
        columns = FORMATS[self.name]
        return (*columns.required, *columns.optional, *self.extra)

    @property
    def mapping(self) -> dict[str, TheirNames]:
        """All columns that are read under another name, by the user's word or unasked."""
        return {**self.recognised, **self.column_mapping}

    def used_columns(self) -> set[str]:
        """The columns that are read, under the names they have in the rows; others are ignored."""
        mapping = self.mapping
        names: set[str] = set()
        for ours in self.columns:
            names.update(as_list(mapping.get(ours, ours)))
        return names.union(map(root, names))

    def reading(self) -> Reading:
        """What decides which columns may be passed over."""
        return Reading(self.name, self.mapping, self.column_mapping, frozenset(self.used_columns()))

    def check(self, where: str) -> None:
        """Raise InputError for a format, or a name in one of the mappings, that does not exist."""
        if self.name not in FORMATS:
            what = f"unknown format {self.name!r}"
            raise InputError(Problem(where, "format", what, suggest(self.name, FORMATS)))
        for name in self.column_mapping:
            if name not in self.columns:
                what = f"{name!r} is no column of format {self.name}"
                known = ", ".join(self.columns)
                fix = f"map one of {known}; write it as {{our name: name in the file}}"
                raise InputError(Problem(where, "column_mapping", what, fix))
        for name, theirs in self.column_mapping.items():
            if not isinstance(theirs, str) and (name not in _JOINABLE or not theirs):
                fix = f"name one column; only {', '.join(_JOINABLE)} can be joined of several"
                raise InputError(
                    Problem(where, "column_mapping", f"{name!r} is given a list of columns", fix)
                )
        _check_names(where, "message_mapping", self.keys.message_mapping, MESSAGE_KEYS)
        _check_names(where, "role_mapping", self.keys.role_mapping, KNOWN_ROLES)


def _check_names(where: str, key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            fix = f"use one of {', '.join(known)}; write it as {{our name: name in the file}}"
            raise InputError(Problem(where, key, f"{name!r} is no name of ours", fix))
