"""Conversations with every text replaced by a unique marker: what stands between is the template's.

Markers look like words and numbers that no conversation holds. A layout depends only on what is
left of a conversation then: its structure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.messages import Message

NEXT = "QZnextZQ"
LATER = "QZlaterZQ"
ANSWER = "QZanswerZQ"
REASON = "QZreasonZQ"
_ANY_MARKER = re.compile(r"QZ[0-9a-zx]+ZQ|90\d{8}09")
_THINK_TAG = re.compile(r"(</?think>)")


@dataclass(slots=True)
class MarkedMessage:
    """A message with each text and number replaced by a marker, and the markers in their order."""

    message: Message
    markers: list[str] = field(default_factory=list)


def structure(messages: Sequence[Message]) -> str:
    """What the layout of a conversation depends on: its messages with every text replaced."""
    call_ids: dict[str, str] = {}
    parts: list[Any] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str) or "think>" in content:
            parts.append(_marked(message, index, call_ids).message)
        # Most messages are plain text, and finding their layout is most of this function's calls.
        elif content.strip():
            parts.append((message["role"], "text"))
        else:
            parts.append((message["role"], f"blank: {content}"))
    return repr(parts)


def mark_conversation(messages: Sequence[Message]) -> list[MarkedMessage]:
    """The messages with markers in place of their texts and numbers."""
    call_ids: dict[str, str] = {}
    return [_marked(message, index, call_ids) for index, message in enumerate(messages)]


def marker(index: int, count: int) -> str:
    """The marker of the text number `count` of message `index`."""
    return f"QZ{index}x{count}ZQ"


def end_of_last_marker(text: str) -> int:
    """Where the last marker of a rendered conversation ends; 0 where there is none."""
    end = 0
    for match in _ANY_MARKER.finditer(text):
        end = match.end()
    return end


def _marked(message: Message, index: int, call_ids: dict[str, str]) -> MarkedMessage:
    """The message with markers in place of its texts and numbers. Blank texts but an answer stay.

    `call_ids` collects the markers of call ids, equal ones for equal ids.
    """
    always_marked = ""
    if message["role"] == "assistant" and "tool_calls" not in message:
        always_marked = "content"
    marking = _Marking(index, call_ids, always_marked)
    marked: Message = {}
    for key, value in message.items():
        if value is not None:
            marked[key] = marking.replace(value, key)
    return MarkedMessage(marked, marking.markers)


@dataclass(slots=True)
class _Marking:
    """Replaces the texts of one message.

    `always_marked`: the key whose text is replaced if blank, too.
    """

    index: int
    call_ids: dict[str, str]
    always_marked: str
    markers: list[str] = field(default_factory=list)

    def replace(self, value: Any, key: str) -> Any:
        """A value of the message, or a part of one below that key, with markers in it."""
        if isinstance(value, Mapping):
            parts: dict[str, Any] = {}
            for name, part in value.items():
                # Arguments of a call may be called anything, `id` and `type` among it.
                parts[name] = self.replace(part, key if key == "arguments" else name)
            return parts
        if isinstance(value, list | tuple):
            return [self.replace(part, key) for part in value]
        if key in ("role", "type") or value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._replace_text(value, key)
        if key in ("id", "tool_call_id"):
            return self._call_id(str(value))
        number = int(f"90{self.index:04}{len(self.markers):04}09")
        self.markers.append(str(number))
        return number

    def _replace_text(self, text: str, key: str) -> str:
        if not text.strip() and key != self.always_marked:
            return text
        if "think>" in text and key == self.always_marked:
            return self._replace_around_tags(text)
        if key in ("id", "tool_call_id"):
            return self._call_id(text)
        return self._add_marker()

    def _add_marker(self) -> str:
        new = marker(self.index, len(self.markers))
        self.markers.append(new)
        return new

    def _call_id(self, call_id: str) -> str:
        """The marker of an id. Some templates demand nine letters or digits."""
        new = self.call_ids.setdefault(call_id, f"QZ{len(self.call_ids):05}ZQ")
        self.markers.append(new)
        return new

    def _replace_around_tags(self, text: str) -> str:
        """Markers around the reasoning tags of an answer, which some templates look for."""
        replaced = ""
        for part in _THINK_TAG.split(text):
            if part.strip() and not _THINK_TAG.fullmatch(part):
                part = self._add_marker()
            replaced += part
        if not self.markers:  # nothing but tags
            replaced += self._add_marker()
        return replaced
