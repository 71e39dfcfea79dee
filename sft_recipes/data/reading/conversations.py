"""Conversations as rows hold them: a list of turns, under whatever keys and roles, as messages of ours.

While it is read, a message carries `train`: what the data says of training it, or None where it says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data.reading.calls import expect, json_value, text_of, tool_calls
from sft_recipes.data.reading.column_advice import setting
from sft_recipes.data.reading.column_values import (
    ROLE_KEYS,
    as_list,
    fold,
    is_empty,
    is_struct_of_lists,
)
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.refused_columns import MEDIA
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.messages import CALL_ROLES, ROLE_ALIASES, ROLES, Message

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
# Turns that hold a question and its answer at once, as some tools write them.
_ASKED = ("human", "user", "input", "question", "instruction", "prompt")
_ANSWERED = ("assistant", "gpt", "output", "answer", "response", "bot")
# Keys of other tools that say what is trained in another way than ours.
_OTHER_FLAGS = ("loss", "trainable", "training")
_TOOL_KEYS = ("tools", "functions", "function_calls")
_PLAIN_KEYS = frozenset({*MESSAGE_KEYS, "from", "value", *REASONING})


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """How the turns of a data set are read: the user's names of keys and roles, and what joins turns in a row.

    `seen` collects the keys and roles of the turns, where the user named any.
    """

    message_mapping: Mapping[str, str] = field(default_factory=dict)
    role_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    merges: bool = False
    seen: set[str] = field(default_factory=set)

    def key(self, ours: str) -> str:
        """The key under which turns hold this."""
        return self.message_mapping.get(ours, ours)

    def check_seen(self, where: str) -> None:
        """Raise InputError for a key or a role that the user named and no turn has."""
        named = {"message_mapping": list(self.message_mapping.values()), "role_mapping": []}
        for names in self.role_mapping.values():
            named["role_mapping"] += as_list(names)
        for setting_name, names in named.items():
            for name in names:
                if name not in self.seen:
                    fix = suggest(name, self.seen, "correct or remove the name")
                    raise InputError(Problem(where, setting_name, f"no turn has {name!r}", fix))

    def role(self, theirs: str) -> str:
        """Our name of a role, or CALL_ROLES' first; a name that nobody knows stays as it is."""
        for ours, names in self.role_mapping.items():
            if theirs in as_list(names):
                return ours
        folded = theirs.strip().lower()
        if folded in CALL_ROLES:
            return CALL_ROLES[0]
        folded = ROLE_ALIASES.get(folded, folded)
        return folded if folded in ROLES else theirs


def read_turns(value: Any, column: str, keys: TurnKeys) -> list[Message]:
    """Messages with our roles and fields; a turn with a call joins the assistant turn right before it."""
    messages: list[Message] = []
    for index, given in enumerate(_turns(value, column)):
        where = f"{column}[{index}]"
        turn = given
        if isinstance(given, str) and given.lstrip().startswith("{"):
            turn = json_value(given, where)
        expect(dict, turn, where, "an object with role and content")
        for part in _single_turns(turn, keys):
            _append(messages, _message(part, where, keys), where, keys)
    _refuse_unknown_roles(messages, column, keys)
    return messages


def join_turns(
    messages: list[Message], more: Sequence[Message], column: str, keys: TurnKeys
) -> list[Message]:
    """The messages with more of them behind, which stand in another column."""
    joined = list(messages)
    for index, message in enumerate(more):
        _append(joined, {**message, "is_call": False}, f"{column}[{index}]", keys)
    return joined


def _refuse_unknown_roles(messages: Sequence[Message], column: str, keys: TurnKeys) -> None:
    """Raise RowProblem for roles that nobody knows, with a mapping of all of them to choose by."""
    unknown: list[str] = []
    for message in messages:
        if message["role"] not in ROLES and message["role"] not in unknown:
            unknown.append(message["role"])
    if not unknown:
        return
    roles = [message["role"] for message in messages]
    free = [role for role in ("user", "assistant") if role not in roles] or ["user"]
    mapping: dict[str, list[str]] = {
        ours: as_list(names) for ours, names in keys.role_mapping.items()
    }
    for index, name in enumerate(unknown):
        ours = free[min(index, len(free) - 1)]
        mapping.setdefault(ours, []).append(name)
    shown: dict[str, Any] = {}
    for ours, names in mapping.items():
        shown[ours] = names[0] if len(names) == 1 else names
    fix = (
        f"use one of {', '.join(ROLES)}, or say who is who, as in {setting('role_mapping', shown)}"
    )
    raise RowProblem(
        f"{column}[{roles.index(unknown[0])}].role", f"unknown role {unknown[0]!r}", fix
    )


def _turns(value: Any, column: str) -> list[Any]:
    """The turns, which may be JSON text, one turn alone, or a struct of lists as tables hold it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = json_value(value, column)
    if is_struct_of_lists(value):
        return _turns_of_lists(value, column)
    if isinstance(value, dict):
        return [value]
    return expect(list, value, column, "a list of messages")


def _turns_of_lists(value: Mapping[str, Sequence[Any]], column: str) -> list[Any]:
    lengths = {name: len(part) for name, part in value.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name}: {count}" for name, count in lengths.items())
        raise RowProblem(
            column, f"lists of different lengths ({shown})", "write one entry a turn in each"
        )
    turns: list[dict[str, Any]] = []
    for parts in zip(*value.values(), strict=True):
        turn = zip(value, parts, strict=True)
        turns.append({key: part for key, part in turn if part is not None})
    return turns


def _single_turns(turn: Mapping[str, Any], keys: TurnKeys) -> list[Mapping[str, Any]]:
    """The turn, or the two or three turns of an exchange such as `{"human": ..., "assistant": ...}`."""
    if keys.message_mapping or any(key in turn for key in ROLE_KEYS):
        return [turn]
    asked = [key for key in turn if fold(key) in _ASKED]
    answered = [key for key in turn if fold(key) in _ANSWERED]
    if len(asked) != 1 or len(answered) != 1:
        return [turn]
    rest = {key: value for key, value in turn.items() if key not in (*asked, *answered, "system")}
    turns: list[Mapping[str, Any]] = [
        {"role": "user", "content": turn[asked[0]]},
        {**rest, "role": "assistant", "content": turn[answered[0]]},
    ]
    if not is_empty(turn.get("system")):
        turns.insert(0, {"role": "system", "content": turn["system"]})
    return turns


def _append(messages: list[Message], message: Message, where: str, keys: TurnKeys) -> None:
    is_call = message.pop("is_call")
    before = messages[-1] if messages else {}
    if is_call and before.get("role") == "assistant":
        if before["content"] is None:
            before["content"] = ""
        before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
        if message["train"] is False:
            before["train"] = False
    elif (
        keys.merges
        and before.get("role") == message["role"] != "tool"
        and _are_texts(before, message)
    ):
        if not _can_join(before, message):
            what = "this turn cannot be merged with the one before: that one calls a tool, or `name` or `train` differ"
            raise RowProblem(
                where, what, "make one turn of them, or put the turn between them that is missing"
            )
        _join(before, message)
    else:
        messages.append(message)


def _are_texts(before: Message, message: Message) -> bool:
    return isinstance(before["content"], str) and isinstance(message["content"], str)


def _can_join(before: Message, message: Message) -> bool:
    """Whether the text of the second turn may follow that of the first and nothing is lost or moved."""
    if "tool_calls" in before or before.get("name") != message.get("name"):
        return False
    return is_trained(before) == is_trained(message)


def is_trained(message: Message) -> bool:
    """What the data says of training a message: by default an assistant's is trained, nobody else's."""
    if message["train"] is None:
        return bool(message["role"] == "assistant")
    return bool(message["train"])


def _join(before: Message, message: Message) -> None:
    for key in ("content", "reasoning_content"):
        texts = [text for text in (before.get(key), message.get(key)) if text]
        if texts or key in before:
            before[key] = "\n\n".join(texts)
    if "tool_calls" in message:
        before["tool_calls"] = message["tool_calls"]


def _message(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> Message:
    """The message of a turn; keys that no template knows are left behind."""
    role_key = _role_key(turn, where, keys)
    content_key = _content_key(turn, where, keys)
    theirs = text_of(turn[role_key], f"{where}.{role_key}")
    role = keys.role(theirs)
    if keys.message_mapping or keys.role_mapping:
        keys.seen.update(turn)
        keys.seen.add(theirs)
    content = turn.get(content_key)
    if role == CALL_ROLES[0]:
        return _call_message(turn, content, where, keys)
    if len(turn) == 2 and isinstance(
        content, str
    ):  # there is nothing else to look at, as in most turns
        return {"role": role, "content": content, "train": None, "is_call": False}
    _refuse_keys(turn, where, keys)
    flag = _train_flag(turn, where, keys)
    if isinstance(content, list):
        content, flag = _joined_parts(content, flag, role, f"{where}.{content_key}")
    message: Message = {"role": role, "content": content, "train": flag, "is_call": False}
    _copy_texts(turn, message, where, keys)
    calls = turn.get(keys.key("tool_calls"), turn.get("function_call"))
    if calls not in (None, [], ""):
        if role != "assistant":
            raise RowProblem(
                f"{where}.tool_calls", f"a {role} turn cannot call tools", "remove the calls"
            )
        message["tool_calls"] = tool_calls(calls, f"{where}.tool_calls")
        if content is None:  # templates that print the content would print "None"
            message["content"] = ""
    return message


def _call_message(turn: Mapping[str, Any], content: Any, where: str, keys: TurnKeys) -> Message:
    """The message of a turn that holds nothing but a call, as JSON."""
    _refuse_keys(turn, where, keys)
    calls = content
    if not isinstance(content, dict | list):
        calls = json_value(text_of(content, where), where)
    message: Message = {
        "role": "assistant",
        "content": "",
        "train": _train_flag(turn, where, keys),
        "is_call": True,
    }
    _copy_texts(turn, message, where, keys)
    # No call at all is reported as one without a name.
    message["tool_calls"] = tool_calls(calls or {}, f"{where}.tool_calls")
    return message


def _copy_texts(turn: Mapping[str, Any], message: Message, where: str, keys: TurnKeys) -> None:
    """Take over what a turn has besides its role and content and templates know."""
    for ours in ("name", "tool_call_id"):
        name = keys.key(ours)
        if turn.get(name) is not None:
            message[ours] = text_of(turn[name], f"{where}.{name}")
    for name in (keys.key("reasoning_content"), *REASONING):
        if turn.get(name) is not None:
            message.setdefault("reasoning_content", text_of(turn[name], f"{where}.{name}"))


def _role_key(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> str:
    """The key of a turn that says who speaks."""
    mapped = keys.message_mapping.get("role")
    for name in ROLE_KEYS if mapped is None else (mapped,):
        if name in turn:
            return name
    raise _unknown_key(turn, where, mapped or "role", keys)


def _content_key(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> str:
    """The key of a turn that holds its text; ours where it has none, which is reported later unless it calls tools."""
    mapped = keys.message_mapping.get("content")
    if (
        mapped is None
        and turn.get("content")
        and turn.get("value")
        and turn["content"] != turn["value"]
    ):
        fix = f"choose, as in {setting('message_mapping', {**keys.message_mapping, 'content': 'content'})}"
        raise RowProblem(where, "both 'content' and 'value' hold a text", fix)
    for name in _CONTENT_KEYS if mapped is None else (mapped,):
        if name in turn:
            return name
    if mapped is not None and keys.key("tool_calls") in turn:
        return mapped
    if mapped is not None or _other_texts(turn, keys):
        raise _unknown_key(turn, where, mapped or "content", keys)
    return "content"


def _unknown_key(turn: Mapping[str, Any], where: str, name: str, keys: TurnKeys) -> RowProblem:
    mapping = {
        **keys.message_mapping,
        "role": _guess(turn, "role"),
        "content": _guess(turn, "content"),
    }
    fix = f"say which key is which, as in {setting('message_mapping', mapping)}"
    return RowProblem(where, f"no {name!r} (found: {', '.join(turn)})", fix)


def _other_texts(turn: Mapping[str, Any], keys: TurnKeys) -> list[str]:
    """Keys of a turn that hold text and that nobody knows."""
    known = {*MESSAGE_KEYS, *ROLE_KEYS, *REASONING, *keys.message_mapping.values()}
    return [key for key, value in turn.items() if isinstance(value, str) and key not in known]


def _guess(turn: Mapping[str, Any], ours: str) -> str:
    """A key of the turn that could be its role (the shortest text), or its content (the longest)."""
    known = ROLE_KEYS if ours == "role" else _CONTENT_KEYS
    for name in known:
        if name in turn:
            return name
    others = {*ROLE_KEYS, *_CONTENT_KEYS}
    texts = [key for key, value in turn.items() if isinstance(value, str) and key not in others]
    if not texts:
        return ours.upper()
    by_length = sorted(texts, key=lambda key: len(turn[key]))
    return by_length[0] if ours == "role" else by_length[-1]


def _refuse_keys(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> None:
    """Refuse keys that would change what is trained, and that are not read here."""
    mapped = set(keys.message_mapping.values())
    for name, value in turn.items():
        if name in _PLAIN_KEYS or name in mapped or is_empty(value):
            continue
        if name == "train_detail":
            raise _parts_problem(f"{where}.{name}")
        if name in _OTHER_FLAGS:
            what = "this says whether the turn is trained, under a name that is not ours"
            mapping = setting("message_mapping", {**keys.message_mapping, "train": name})
            raise RowProblem(f"{where}.{name}", what, f"set {mapping}")
        if name in _TOOL_KEYS:
            what = "tools of a single turn would be passed over"
            fix = "write definitions into the row's column `tools`, and calls into the turn's `tool_calls`"
            raise RowProblem(f"{where}.{name}", what, fix)
        if fold(name) in MEDIA:
            what = "this turn comes with images, video or sound, and only text is trained"
            raise RowProblem(f"{where}.{name}", what, "remove such rows")


def _train_flag(turn: Mapping[str, Any], where: str, keys: TurnKeys) -> bool | None:
    """What `train` (ours) and `weight` (OpenAI's) say of a turn or of a part of one; None where they say nothing."""
    train_key, weight_key = keys.key("train"), keys.key("weight")
    train, weight = turn.get(train_key), turn.get(weight_key)
    if weight is not None and weight not in (0, 1):
        fix = "write 0 to leave the turn untrained"
        raise RowProblem(f"{where}.{weight_key}", f"expected 0 or 1, got {weight!r}", fix)
    if train is not None:
        expect(bool, train, f"{where}.{train_key}", "true or false")
    if weight == 0 or train is False:
        return False
    if weight is None and train is None:
        return None
    return True


def _joined_parts(
    parts: Sequence[Any], turn_flag: bool | None, role: str, where: str
) -> tuple[str, bool | None]:
    """The text of content parts, and the flag of the turn, with which flags of its parts must agree."""
    texts: list[str] = []
    flags: list[bool | None] = []
    for index, part in enumerate(parts):
        texts.append(_part(part, f"{where}[{index}]"))
        flags.append(_train_flag(part, f"{where}[{index}]", TurnKeys()))
        if not is_empty(part.get("train_detail")):
            raise _parts_problem(f"{where}[{index}].train_detail")
    if all(flag is None for flag in flags):
        return "".join(texts), turn_flag
    # A part that says nothing is trained as the turn is: an assistant's by default, nobody else's.
    otherwise = turn_flag if turn_flag is not None else role == "assistant"
    whole = otherwise if flags[0] is None else flags[0]
    if turn_flag is not None:
        whole = turn_flag
    for index, flag in enumerate(flags):
        if flag is not None and flag != whole:
            raise _parts_problem(f"{where}[{index}]")
        if flag is None and otherwise != whole:
            raise _parts_problem(f"{where}[{flags.index(whole)}]")
    return "".join(texts), whole


def _parts_problem(where: str) -> RowProblem:
    what = "parts of a turn cannot be trained, or left untrained, one by one"
    return RowProblem(where, what, "split the turn, or set `train` on the whole turn")


def _part(part: Any, where: str) -> str:
    kind = expect(dict, part, where, "an object with type and text").get("type")
    if kind != "text":
        what = f"a part of type {kind!r}; images are not supported, nor is anything else but text"
        raise RowProblem(where, what, "keep only text parts")
    return text_of(part.get("text"), f"{where}.text")
