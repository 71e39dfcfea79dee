"""Conversations as rows hold them, under whatever keys and roles, as messages of ours.

While it is read, a message carries `train`: what the data says of training it, or None where it
says nothing; and `origin`: where it stands in the row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.data.reading.calls import expect, json_value
from sft_recipes.data.reading.column_advice import setting
from sft_recipes.data.reading.column_values import (
    as_list,
    fold,
    is_empty,
    is_struct_of_lists,
    role_key,
)
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.turn_keys import TurnKeys
from sft_recipes.data.reading.turn_message import Origin, turn_message
from sft_recipes.messages import ROLES, Message

# Turns that hold a question and its answer at once, as some tools write them.
_ASKED = ("human", "user", "input", "question", "instruction", "prompt")
_ANSWERED = ("assistant", "gpt", "output", "answer", "response", "bot")


def read_turns(value: Any, column: str, keys: TurnKeys) -> list[Message]:
    """Messages with our roles and fields.

    A turn with a call joins the assistant turn right before it.
    """
    messages: list[Message] = []
    for index, given in enumerate(_turns(value, column)):
        where = f"{column}[{index}]"
        turn = given
        if isinstance(given, str) and given.lstrip().startswith("{"):
            turn = json_value(given, where)
        expect(dict, turn, where, "an object with role and content")
        for part in _single_turns(turn, keys):
            message = turn_message(part, where, keys)
            if part is not turn:
                message["origin"] = Origin(where)  # the keys of a part are not the row's
            _append(messages, message, keys)
    _refuse_unknown_roles(messages, keys)
    return messages


def join_turns(
    messages: Sequence[Message], more: Sequence[Message], keys: TurnKeys
) -> list[Message]:
    """The messages with more of them behind, which stand in another column."""
    joined = list(messages)
    for message in more:
        _append(joined, {**message, "is_call": False}, keys)
    return joined


def _refuse_unknown_roles(messages: Sequence[Message], keys: TurnKeys) -> None:
    """Raise RowProblem for roles that nobody knows, with a mapping of all of them to choose by."""
    unknown: list[str] = []
    for message in messages:
        if message["role"] not in ROLES and message["role"] not in unknown:
            unknown.append(message["role"])
    if not unknown:
        return
    roles = [message["role"] for message in messages]
    where = messages[roles.index(unknown[0])]["origin"].role
    who_is_who = setting("role_mapping", _complete_role_mapping(roles, unknown, keys))
    fix = f"use one of {', '.join(ROLES)}, or say who is who, as in {who_is_who}"
    raise RowProblem(where, f"unknown role {unknown[0]!r}", fix)


def _complete_role_mapping(
    roles: Sequence[str], unknown: Sequence[str], keys: TurnKeys
) -> dict[str, Any]:
    """The user's role mapping with the unknown roles in it, under known ones that nobody has."""
    free = [role for role in ("user", "assistant") if role not in roles] or ["user"]
    mapping: dict[str, list[str]] = {}
    for role, names in keys.role_mapping.items():
        mapping[role] = as_list(names)
    for index, name in enumerate(unknown):
        role = free[min(index, len(free) - 1)]
        mapping.setdefault(role, []).append(name)
    shown: dict[str, Any] = dict(mapping)
    for role, names in mapping.items():
        if len(names) == 1:
            shown[role] = names[0]
    return shown


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
        what = f"lists of different lengths ({shown})"
        raise RowProblem(column, what, "write one entry a turn in each")
    turns: list[dict[str, Any]] = []
    for parts in zip(*value.values(), strict=True):
        turn: dict[str, Any] = {}
        for key, part in zip(value, parts, strict=True):
            if part is not None:
                turn[key] = part
        turns.append(turn)
    return turns


def _single_turns(turn: Mapping[str, Any], keys: TurnKeys) -> list[Mapping[str, Any]]:
    """The turn, or the turns of an exchange such as `{"human": ..., "assistant": ...}`."""
    if keys.message_mapping or role_key(turn) is not None:
        return [turn]
    asked = [key for key in turn if fold(key) in _ASKED]
    answered = [key for key in turn if fold(key) in _ANSWERED]
    if len(asked) != 1 or len(answered) != 1:
        return [turn]
    rest = dict(turn)
    for key in (*asked, *answered, "system"):
        rest.pop(key, None)
    turns: list[Mapping[str, Any]] = [
        {"role": "user", "content": turn[asked[0]]},
        {**rest, "role": "assistant", "content": turn[answered[0]]},
    ]
    if not is_empty(turn.get("system")):
        turns.insert(0, {"role": "system", "content": turn["system"]})
    return turns


def _append(messages: list[Message], message: Message, keys: TurnKeys) -> None:
    """Add a message behind the others, or to the last of them where both are one turn."""
    is_call = message.pop("is_call")
    if not messages:
        messages.append(message)
        return
    before = messages[-1]
    if is_call and before["role"] == "assistant":
        _add_call(before, message)
    elif keys.merges and _are_one_turn(before, message):
        if not _can_merge(before, message):
            reason = "that one calls a tool, or `name` or `train` differ"
            what = f"this turn cannot be merged with the one before: {reason}"
            fix = "make one turn of them, or put the turn between them that is missing"
            raise RowProblem(message["origin"].place, what, fix)
        _merge(before, message)
    else:
        messages.append(message)


def _add_call(before: Message, message: Message) -> None:
    """Add the calls of a turn that holds nothing else to the assistant's turn before it."""
    if before["content"] is None:
        before["content"] = ""
    before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
    if message["train"] is False:
        before["train"] = False


def _are_one_turn(before: Message, message: Message) -> bool:
    """Whether `consecutive_turns: merge` joins these two: texts of one role, no tool's."""
    if before["role"] != message["role"] or message["role"] == "tool":
        return False
    return isinstance(before["content"], str) and isinstance(message["content"], str)


def _can_merge(before: Message, message: Message) -> bool:
    """Whether the text of the second turn may follow that of the first, nothing lost or moved."""
    if "tool_calls" in before or before.get("name") != message.get("name"):
        return False
    return is_trained(before) == is_trained(message)


def is_trained(message: Message) -> bool:
    """What the data says of training a message; an assistant's is by default."""
    if message["train"] is None:
        return bool(message["role"] == "assistant")
    return bool(message["train"])


def _merge(before: Message, message: Message) -> None:
    for key in ("content", "reasoning_content"):
        texts = list(filter(None, (before.get(key), message.get(key))))
        if texts or key in before:
            before[key] = "\n\n".join(texts)
    if "tool_calls" in message:
        before["tool_calls"] = message["tool_calls"]
