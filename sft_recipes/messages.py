"""The one shape all data takes inside this project: messages of `{role, content}`.

Formats convert at the door (`data/formats.py`); everything behind it sees an `Example`.

Rules that `find_message_problem` checks, after role aliases were mapped:
- at least one message, at least one assistant turn, the last message is an assistant's;
- roles are system, user, assistant or tool; a system message stands only first;
- user and assistant alternate; a tool message follows an assistant's tool call or another tool message;
- content is text; a row whose assistant only calls a tool may leave it out, and gets an empty one at the door.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Names other formats and projects give the same roles (ShareGPT, Vicuna, LLaMA-Factory, OpenAI, Gemini).
ROLE_ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython"), "tool"),
    "developer": "system",
}


def place(source: str, row: int, line: int | None = None) -> str:
    """`FILE:LINE` where the line is known, else `SOURCE row N` (0-based, as in `inspect --json`)."""
    return f"{source}:{line}" if line is not None else f"{source} row {row}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data on its way to the trainer.

    `messages` ends with an assistant turn. `train[i]` says whether assistant message `i` may be trained
    (the per-message `train: false` of the data). `text` is set instead for `format: raw`, where messages is empty.
    `row` counts from 0, `line` from 1 where the reader knows it. `columns` are extra columns somebody asked for.
    """

    messages: Sequence[Message]
    source: str
    row: int
    line: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    train: Sequence[bool] = ()
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Where the row stands, for messages."""
        return place(self.source, self.row, self.line)

    def is_trainable(self, index: int) -> bool:
        """Whether message `index` is an assistant turn that the data allows to train."""
        return self.messages[index]["role"] == "assistant" and (not self.train or self.train[index])


def visible(text: str) -> str:
    """The text for people's eyes: control, direction, zero-width and unassigned characters spelled as `⟨U+200B⟩`.

    Newline and tab stay. So no text hides anything, and none acts on a terminal.
    """
    return re.sub(r"[^\x20-\x7e\n\t]", _spell_out, text)


def _spell_out(match: re.Match[str]) -> str:
    char = match.group()
    # isprintable() refuses every space but the usual one.
    is_shown = char.isprintable() or unicodedata.category(char) == "Zs"
    return char if is_shown else f"\u27e8U+{ord(char):04X}\u27e9"


def find_message_problem(messages: Sequence[Message]) -> tuple[str, str, str] | None:
    """Return `(field, what, fix)` for the first broken rule of the module docstring, or None."""
    if not messages:
        return "messages", "the conversation is empty", "remove the row or add messages"
    for index, message in enumerate(messages):
        if problem := _role_problem(message, messages[index - 1] if index else {}):
            return f"messages[{index}].role", *problem
        if not isinstance(content := message.get("content"), str):
            kind = "missing or null" if content is None else type(content).__name__
            return f"messages[{index}].content", f"expected a string, got {kind}", "write the text as one string"
    if not any(message["role"] == "assistant" for message in messages):
        return "messages", "there is no assistant turn", "remove the row or add an answer"
    if (last := messages[-1]["role"]) != "assistant":
        return f"messages[{len(messages) - 1}].role", f"the last turn is {last!r}, not 'assistant'", "cut the row there"
    return None


def _role_problem(message: Message, previous: Message) -> tuple[str, str] | None:
    role, before = message.get("role"), previous.get("role")
    if role not in ROLES:
        aliases = ", ".join(f"{alias}={name}" for alias, name in ROLE_ALIASES.items())
        return f"unknown role {role!r}", f"use one of {', '.join(ROLES)} (aliases: {aliases})"
    if role == "system" and previous:
        return "a system message stands in the middle", "put it first or remove it"
    if role == before and role != "tool":
        return f"two {role} messages in a row", "join them into one"
    if role == "assistant" and before in (None, "system"):
        return "the assistant speaks before any user", "remove that turn or add the user's"
    if role == "tool" and before != "tool" and not previous.get("tool_calls"):
        return "a tool message without a tool call before it", "add the assistant's tool_calls or remove it"
    return None
