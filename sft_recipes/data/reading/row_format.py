"""How the rows of one source are read: the format, and the names that its columns and keys have."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sft_recipes.data.reading.column_values import NamesInRow, as_list, first_step
from sft_recipes.data.reading.known_formats import FORMATS
from sft_recipes.data.reading.refused_columns import Reading
from sft_recipes.data.reading.turn_keys import KNOWN_ROLES, MESSAGE_KEYS, TurnKeys
from sft_recipes.errors import InputError, Problem, suggest

# Columns of text, which several names may make up.
_JOINABLE = ("instruction", "input", "output", "system", "prompt", "completion", "text")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one source are read.

    `column_mapping` is {column: its name in the rows, or a list of names whose texts are joined}, as
    the user gave it; a name may lead into nested values, as in `instances.0.input`. `extra` are
    further columns to keep on the examples of the rows that have them. `recognised` is {column: its
    name} where one was recognised unasked.
    """

    name: str
    column_mapping: Mapping[str, NamesInRow]
    extra: Sequence[str] = ()
    allow_empty_output: bool = False
    recognised: Mapping[str, str] = field(default_factory=dict)
    keys: TurnKeys = field(default_factory=TurnKeys)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read of a row."""
        format = FORMATS[self.name]
        return (*format.required, *format.other_columns, *self.extra)

    @property
    def mapping(self) -> dict[str, NamesInRow]:
        """All columns that are read under another name, by the user's word or unasked."""
        return {**self.recognised, **self.column_mapping}

    def used_columns(self) -> set[str]:
        """The names in the rows that are read; others are ignored."""
        mapping = self.mapping
        names: set[str] = set()
        for column in self.columns:
            names.update(as_list(mapping.get(column, column)))
        return names.union(map(first_step, names))

    def reading(self) -> Reading:
        """What decides which columns may be passed over."""
        return Reading(self.name, self.mapping, self.column_mapping, frozenset(self.used_columns()))

    def check(self, where: str) -> None:
        """Raise InputError for a format, or a name in one of the mappings, that does not exist."""
        if self.name not in FORMATS:
            what = f"unknown format {self.name!r}"
            raise InputError(Problem(where, "format", what, suggest(self.name, FORMATS)))
        for column in self.column_mapping:
            if column not in self.columns:
                what = f"{column!r} is no column of format {self.name}"
                known = ", ".join(self.columns)
                fix = f"map one of {known}; write it as {{our name: name in the file}}"
                raise InputError(Problem(where, "column_mapping", what, fix))
        for column, names in self.column_mapping.items():
            if not isinstance(names, str) and (column not in _JOINABLE or not names):
                what = f"{column!r} is given a list of columns"
                fix = f"name one column; only {', '.join(_JOINABLE)} can be joined of several"
                raise InputError(Problem(where, "column_mapping", what, fix))
        _check_names(where, "message_mapping", self.keys.message_mapping, MESSAGE_KEYS)
        _check_names(where, "role_mapping", self.keys.role_mapping, KNOWN_ROLES)


def _check_names(where: str, key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            fix = f"use one of {', '.join(known)}; write it as {{our name: name in the file}}"
            raise InputError(Problem(where, key, f"{name!r} is no name of ours", fix))
