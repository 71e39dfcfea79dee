"""Which keys of a turn hold its role and its text, and what its roles are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data.reading.column_advice import setting
from sft_recipes.data.reading.column_values import ROLE_KEYS, as_list, role_key
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import CALL_ROLES, ROLE_ALIASES, ROLES

REASONING = ("reasoning_content", "thinking", "reasoning")
MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "train",
    "weight",
)
# Our roles, and the turn that holds nothing but a call.
KNOWN_ROLES = (*ROLES, "function_call")
# The key of a turn that holds its text; the first that a turn has counts.
_CONTENT_KEYS = ("content", "value", "text", "utterance", "message")


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """How the turns of a data set are read: keys, roles, and what joins turns in a row.

    `seen` collects the keys and roles of the turns, where the user named any.
    """

    message_mapping: Mapping[str, str] = field(default_factory=dict)
    role_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    merges: bool = False
    seen: set[str] = field(default_factory=set)

    def key(self, field: str) -> str:
        """The key under which turns hold a field of a message."""
        return self.message_mapping.get(field, field)

    def check_seen(self, where: str) -> None:
        """Raise InputError for a key or a role that the user named and no turn has."""
        for key in self.message_mapping.values():
            self._check_seen(key, "message_mapping", where)
        for names in self.role_mapping.values():
            for name in as_list(names):
                self._check_seen(name, "role_mapping", where)

    def _check_seen(self, name: str, setting_name: str, where: str) -> None:
        if name not in self.seen:
            fix = suggest(name, self.seen, "correct or remove the name")
            raise InputError(Problem(where, setting_name, f"no turn has {name!r}", fix))

    def role(self, given: str) -> str:
        """The role that a turn's role means, or CALL_ROLES' first; an unknown one stays as it is."""
        for role, names in self.role_mapping.items():
            if given in as_list(names):
                return role
        folded = given.strip().lower()
        if folded in CALL_ROLES:
            return CALL_ROLES[0]
        role = ROLE_ALIASES.get(folded, folded)
        if role in ROLES:
            return role
        return given

    def role_key(self, turn: Mapping[str, Any], where: str) -> str:
        """The key of a turn that says who speaks. Raises RowProblem where it has none."""
        mapped = self.message_mapping.get("role")
        if mapped is None:
            known = role_key(turn)
            if known is not None:
                return known
        elif mapped in turn:
            return mapped
        raise self._unknown_key(turn, where, mapped or "role")

    def content_key(self, turn: Mapping[str, Any], where: str) -> str:
        """The key of a turn that holds its text; `content` where it has none.

        That is reported later unless the turn calls tools. Raises RowProblem where another key may
        hold the text.
        """
        mapped = self.message_mapping.get("content")
        if mapped is not None:
            if mapped in turn or self.key("tool_calls") in turn:
                return mapped
            raise self._unknown_key(turn, where, mapped)
        content = turn.get("content")
        value = turn.get("value")
        if content and value and content != value:
            mapping = setting("message_mapping", {**self.message_mapping, "content": "content"})
            what = "both 'content' and 'value' hold a text"
            raise RowProblem(where, what, f"choose, as in {mapping}")
        for name in _CONTENT_KEYS:
            if name in turn:
                return name
        if self._has_other_text(turn):
            raise self._unknown_key(turn, where, "content")
        return "content"

    def _has_other_text(self, turn: Mapping[str, Any]) -> bool:
        """Whether a turn holds text under a key that nobody knows."""
        known = {*MESSAGE_KEYS, *ROLE_KEYS, *REASONING, *self.message_mapping.values()}
        return any(isinstance(turn[key], str) for key in turn if key not in known)

    def _unknown_key(self, turn: Mapping[str, Any], where: str, name: str) -> RowProblem:
        mapping = {
            **self.message_mapping,
            "role": _guess(turn, "role"),
            "content": _guess(turn, "content"),
        }
        fix = f"say which key is which, as in {setting('message_mapping', mapping)}"
        return RowProblem(where, f"no {name!r} (found: {', '.join(turn)})", fix)


def _guess(turn: Mapping[str, Any], field: str) -> str:
    """A key of the turn that could be its role (the shortest text) or content (the longest)."""
    known = _CONTENT_KEYS
    if field == "role":
        known = ROLE_KEYS
    for name in known:
        if name in turn:
            return name
    texts: list[str] = []
    for key, value in turn.items():
        if isinstance(value, str) and key not in (*ROLE_KEYS, *_CONTENT_KEYS):
            texts.append(key)
    if not texts:
        return field.upper()
    texts.sort(key=lambda key: len(turn[key]))
    if field == "role":
        return texts[0]
    return texts[-1]
