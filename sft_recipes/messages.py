"""The one shape all data takes inside this project: messages of `{role, content}`.

Formats convert at the door (`data/formats.py`); everything behind it sees an `Example`.

Rules that `find_message_problem` checks, after role aliases were mapped:
- at least one message, at least one assistant turn, the last message is an assistant's;
- roles are system, user, assistant or tool; a system message may stand anywhere, the template
  decides later;
- no two turns of one role in a row but a tool's; a user speaks before the assistant does;
- a tool message follows an assistant's tool call or another tool message;
- content is text; a row whose assistant only calls a tool may leave it out, and gets an empty one
  at the door.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Names other formats and projects give the same roles (ShareGPT, Vicuna, LLaMA-Factory, ms-swift,
# OpenAI, Gemini).
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bot", "model", "ai"),
    "tool": (
        "observation",
        "function",
        "ipython",
        "tool_response",
        "function_response",
        "environment",
    ),
    "system": ("developer",),
    "function_call": ("tool_call", "tool_calls"),
}
# Turns of these roles hold nothing but a call that the assistant makes, as JSON.
CALL_ROLES = ("function_call", *_OTHER_NAMES["function_call"])


def _role_aliases() -> dict[str, str]:
    roles: dict[str, str] = {}
    for role, aliases in _OTHER_NAMES.items():
        for alias in aliases:
            roles[alias] = role
    for alias in CALL_ROLES:
        roles[alias] = "assistant"
    return roles


ROLE_ALIASES: Mapping[str, str] = _role_aliases()

# How models spell a call inside their text (Hermes and Qwen, Mistral, Llama, and XML of others).
_INLINE_CALL = re.compile(r"<\|?tool_call|\[TOOL_CALLS\]|<\|python_tag\|>|<function")


def place(source: str, row: int, line: int | None = None) -> str:
    """`FILE:LINE` where the line is known, else `SOURCE:row N (counted from 0)`.

    That is the row of `inspect --json`.
    """
    if line is not None:
        return f"{source}:{line}"
    return f"{source}:row {row} (counted from 0)"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data on its way to the trainer.

    `messages` ends with an assistant turn. `train` is empty where the data says nothing; else
    `train[i]` says whether assistant message `i` may be trained, and of any other message whether
    the data asks to train it, which only `train_on: all` does. `text` is set instead for `format:
    raw` and `rendered`, where messages is empty. `rendered`: that text is the rendering of a chat
    template, control tokens and all. `row` counts from 0, `line` from 1 where the reader knows it.
    `columns` are extra columns somebody asked for. `data_set`: of a held-out row of a mixture, the
    name of its data set.
    """

    messages: Sequence[Message]
    source: str
    row: int
    line: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    train: Sequence[bool] = ()
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    rendered: bool = False
    data_set: str = ""

    @property
    def asks_to_train_others(self) -> int | None:
        """The first message that the data asks to train although no assistant wrote it, or None."""
        for index, message in enumerate(self.messages):
            if self.train and self.train[index] and message["role"] != "assistant":
                return index
        return None

    @property
    def where(self) -> str:
        """Where the row stands, for messages."""
        return place(self.source, self.row, self.line)

    def is_trainable(self, index: int) -> bool:
        """Whether message `index` is an assistant turn that the data allows to train."""
        return self.messages[index]["role"] == "assistant" and (not self.train or self.train[index])


def visible(text: str) -> str:
    """The text for people's eyes, with what is hidden in it spelled as `⟨U+200B⟩`.

    Hidden are control, direction, zero-width and unassigned characters. Newline and tab stay. So no
    text hides anything, and none acts on a terminal.
    """
    return re.sub(r"[^\x20-\x7e\n\t]", _spell_out, text)


def _spell_out(match: re.Match[str]) -> str:
    char = match.group()
    # isprintable() refuses every space but the usual one.
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    return f"\u27e8U+{ord(char):04X}\u27e9"


class MessageProblem(NamedTuple):
    """A broken rule: where, what is wrong, and what to change.

    `position`: of the message, None where the conversation as a whole breaks it; `key`: `role` or
    `content`.
    """

    position: int | None
    key: str
    what: str
    fix: str


def find_message_problem(messages: Sequence[Message]) -> MessageProblem | None:
    """The first broken rule of the module docstring, or None."""
    if not messages:
        fix = "remove the row or add messages"
        return MessageProblem(None, "", "the conversation is empty", fix)
    before: Message = {}
    speaker: Message = {}  # the last message that is no system's
    for index, message in enumerate(messages):
        problem = _role_problem(index, message, before, speaker)
        if problem is not None:
            return problem
        before = message
        if message["role"] != "system":
            speaker = message
        if not isinstance(message.get("content"), str):
            return _content_problem(index, message)
    if not any(message["role"] == "assistant" for message in messages):
        fix = "remove the row or add an answer"
        return MessageProblem(None, "", "there is no assistant turn", fix)
    last = messages[-1]["role"]
    if last != "assistant":
        what = f"the last turn is {last!r}, not 'assistant'"
        return MessageProblem(len(messages) - 1, "role", what, "cut the row there")
    return None


def _content_problem(index: int, message: Message) -> MessageProblem:
    content = message.get("content")
    kind = type(content).__name__
    if content is None:
        kind = "missing or null"
    what = f"expected a string, got {kind}"
    return MessageProblem(index, "content", what, "write the text as one string")


def _role_problem(
    index: int, message: Message, before: Message, speaker: Message
) -> MessageProblem | None:
    """What is wrong with the role of a message.

    `before`: the message before it; `speaker`: the last that is no system's.
    """
    role = message.get("role")
    if role not in ROLES:
        aliases = ", ".join(f"{alias}={name}" for alias, name in ROLE_ALIASES.items())
        fix = f"use one of {', '.join(ROLES)} (aliases: {aliases})"
        return MessageProblem(index, "role", f"unknown role {role!r}", fix)
    if role == before.get("role") and role != "tool":
        fix = "join them into one, or set `consecutive_turns: merge`"
        return MessageProblem(index, "role", f"two {role} messages in a row", fix)
    if role == "assistant" and not speaker:
        what = "the assistant speaks before any user"
        return MessageProblem(index, "role", what, "remove that turn or add the user's")
    if role == "tool" and speaker.get("role") != "tool" and not _calls_tool(speaker):
        what = "a tool message without a tool call before it"
        return MessageProblem(index, "role", what, "add the assistant's tool_calls or remove it")
    return None


def _calls_tool(message: Message) -> bool:
    """Whether a message calls a tool, in its own field or inline in the way of some model."""
    return (
        bool(message.get("tool_calls"))
        or _INLINE_CALL.search(message.get("content") or "") is not None
    )
