"""The message of a single turn, whatever else the turn holds besides its role and its text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_recipes.data.reading.calls import expect, json_value, text_of, tool_calls
from sft_recipes.data.reading.column_advice import setting
from sft_recipes.data.reading.column_values import MEDIA, fold, is_empty
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.turn_keys import MESSAGE_KEYS, REASONING, TurnKeys
from sft_recipes.messages import CALL_ROLES, Message

# Keys of other tools that say what is trained in another way than ours.
_OTHER_FLAGS = ("loss", "trainable", "training")
_TOOL_KEYS = ("tools", "functions", "function_calls")
_PLAIN_KEYS = frozenset({*MESSAGE_KEYS, "from", "value", *REASONING})


class Origin(NamedTuple):
    """Where a message stands in its row: a column, or a turn in one and the keys that it has."""

    place: str
    role_key: str = ""
    content_key: str = ""

    @property
    def role(self) -> str:
        """The field that says who speaks."""
        return self._field(self.role_key)

    @property
    def content(self) -> str:
        """The field that holds the text."""
        return self._field(self.content_key)

    def _field(self, key: str) -> str:
        if not key:
            return self.place
        return f"{self.place}.{key}"


def turn_message(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> Message:
    """The message of a turn; keys that no template knows are left behind.

    While it is read it carries `train` and `origin`, see `conversations.py`, and `is_call`: the
    turn holds nothing but a call. Raises RowProblem for a turn that is no message, and for keys that would
    change what is trained.
    """
    role_key = keys.role_key(turn, where)
    content_key = keys.content_key(turn, where)
    given_role = text_of(turn[role_key], f"{where}.{role_key}")
    role = keys.role(given_role)
    origin = Origin(where, role_key, content_key)
    if keys.message_mapping or keys.role_mapping:
        keys.seen.update(turn)
        keys.seen.add(given_role)
    content = turn.get(content_key)
    if role == CALL_ROLES[0]:
        return _Turn(turn, where, keys).call_message(content, origin)
    if len(turn) == 2 and isinstance(content, str):
        # There is nothing else to look at, as in most turns.
        return {
            "role": role,
            "content": content,
            "train": None,
            "origin": origin,
            "is_call": False,
        }
    return _Turn(turn, where, keys).message(role, content, origin)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn, or a part of one, as it stands in the row at `where`."""

    values: Mapping[str, Any]
    where: str
    keys: TurnKeys

    def message(self, role: str, content: Any, origin: Origin) -> Message:
        """The message of a turn with this role and content."""
        self._refuse_keys()
        flag = self.train_flag()
        if isinstance(content, list):
            parts = _parts(content, origin.content)
            content = "".join(part.text for part in parts)
            flag = _flag_of_parts(parts, flag, role)
        message: Message = {
            "role": role,
            "content": content,
            "train": flag,
            "origin": origin,
            "is_call": False,
        }
        self._copy_texts(message)
        calls = self.values.get(self.keys.key("tool_calls"), self.values.get("function_call"))
        if calls not in (None, [], ""):
            where = f"{self.where}.tool_calls"
            if role != "assistant":
                raise RowProblem(where, f"a {role} turn cannot call tools", "remove the calls")
            message["tool_calls"] = tool_calls(calls, where)
            if content is None:  # templates that print the content would print "None"
                message["content"] = ""
        return message

    def call_message(self, content: Any, origin: Origin) -> Message:
        """The message of a turn that holds nothing but a call, as JSON."""
        self._refuse_keys()
        calls = content
        if not isinstance(content, dict | list):
            calls = json_value(text_of(content, self.where), self.where)
        message: Message = {
            "role": "assistant",
            "content": "",
            "train": self.train_flag(),
            "origin": origin,
            "is_call": True,
        }
        self._copy_texts(message)
        # No call at all is reported as one without a name.
        message["tool_calls"] = tool_calls(calls or {}, f"{self.where}.tool_calls")
        return message

    def train_flag(self) -> bool | None:
        """What `train` (ours) and `weight` (OpenAI's) say; None where they say nothing."""
        train_key = self.keys.key("train")
        train = self.values.get(train_key)
        weight_key = self.keys.key("weight")
        weight = self.values.get(weight_key)
        if weight is not None and weight not in (0, 1):
            what = f"expected 0 or 1, got {weight!r}"
            fix = "write 0 to leave the turn untrained"
            raise RowProblem(f"{self.where}.{weight_key}", what, fix)
        if train is not None:
            expect(bool, train, f"{self.where}.{train_key}", "true or false")
        if weight == 0 or train is False:
            return False
        if weight is None and train is None:
            return None
        return True

    def _copy_texts(self, message: Message) -> None:
        """Take over what a turn has besides its role and content and templates know."""
        for field in ("name", "tool_call_id"):
            key = self.keys.key(field)
            if self.values.get(key) is not None:
                message[field] = text_of(self.values[key], f"{self.where}.{key}")
        for key in (self.keys.key("reasoning_content"), *REASONING):
            if self.values.get(key) is not None:
                reasoning = text_of(self.values[key], f"{self.where}.{key}")
                message.setdefault("reasoning_content", reasoning)

    def _refuse_keys(self) -> None:
        """Refuse keys that would change what is trained, and that are not read here."""
        mapping = self.keys.message_mapping
        mapped = set(mapping.values())
        for name, value in self.values.items():
            if name in _PLAIN_KEYS or name in mapped or is_empty(value):
                continue
            where = f"{self.where}.{name}"
            if name == "train_detail":
                raise _parts_problem(where)
            if name in _OTHER_FLAGS:
                what = "this says whether the turn is trained, under a name that is not ours"
                asked = setting("message_mapping", {**mapping, "train": name})
                raise RowProblem(where, what, f"set {asked}")
            if name in _TOOL_KEYS:
                what = "tools of a single turn would be passed over"
                fix = (
                    "write definitions into the row's column `tools`, "
                    "and calls into the turn's `tool_calls`"
                )
                raise RowProblem(where, what, fix)
            if fold(name) in MEDIA:
                what = "this turn comes with images, video or sound, and only text is trained"
                raise RowProblem(where, what, "remove such rows")


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a turn's content: its text, and what it says of being trained, None for nothing."""

    text: str
    flag: bool | None
    where: str


def _parts(parts: Sequence[Any], where: str) -> list[_Part]:
    """The parts of a content that is a list. Raises RowProblem for any that is no text."""
    texts: list[_Part] = []
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        text = _part_text(part, place)
        flag = _Turn(part, place, TurnKeys()).train_flag()
        if not is_empty(part.get("train_detail")):
            raise _parts_problem(f"{place}.train_detail")
        texts.append(_Part(text, flag, place))
    return texts


def _flag_of_parts(parts: Sequence[_Part], turn_flag: bool | None, role: str) -> bool | None:
    """The flag of a turn from that of the turn itself and those of its parts, which must agree."""
    flagged = [part for part in parts if part.flag is not None]
    if not flagged:
        return turn_flag
    # A part that says nothing is trained as the turn is: an assistant's by default, nobody else's.
    default = turn_flag
    if default is None:
        default = role == "assistant"
    whole = turn_flag
    if whole is None:
        whole = parts[0].flag
    if whole is None:
        whole = default
    for part in parts:
        if part.flag is None and default != whole:
            # Named is the part that asks for what the silent ones do not get.
            asking = next(other for other in flagged if other.flag == whole)
            raise _parts_problem(asking.where)
        if part.flag is not None and part.flag != whole:
            raise _parts_problem(part.where)
    return whole


def _parts_problem(where: str) -> RowProblem:
    what = "parts of a turn cannot be trained, or left untrained, one by one"
    return RowProblem(where, what, "split the turn, or set `train` on the whole turn")


def _part_text(part: Any, where: str) -> str:
    kind = expect(dict, part, where, "an object with type and text").get("type")
    if kind != "text":
        what = f"a part of type {kind!r}; images are not supported, nor is anything else but text"
        raise RowProblem(where, what, "keep only text parts")
    return text_of(part.get("text"), f"{where}.text")
