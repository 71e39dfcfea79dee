"""The one shape all data takes inside this project: messages of `{role, content}`.

Formats convert at the door (`data/formats.py`); everything behind it sees an `Example`.

Rules that `find_message_problem` checks, after role aliases were mapped:
- at least one message, at least one assistant turn, the last message is an assistant's;
- roles are system, user, assistant or tool; a system message stands only first;
- user and assistant alternate; a tool message follows an assistant's tool call or another tool message;
- content is text; only an assistant message that calls a tool may leave it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Names other formats and projects give the same roles (ShareGPT, Vicuna, LLaMA-Factory, OpenAI, Gemini).
ROLE_ALIASES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "prompter": "user",
    "developer": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}

# What a message may carry besides role and content; anything else is not handed to a template.
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "instruction", "input")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data on its way to the trainer.

    `messages` ends with an assistant turn. `train[i]` says whether assistant message `i` may be trained
    (the per-message `train: false` of the data). `text` is set instead for `format: raw`, where messages is empty.
    `row` is the 0-based index in its source, `line` the 1-based line of its file where the reader knows it.
    `columns` are extra columns somebody asked for (such as `task_type` or `expected_format` in evaluation).
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
        """`FILE:LINE` where the line is known, else `SOURCE row N` (0-based, as in `inspect --json`)."""
        return f"{self.source}:{self.line}" if self.line is not None else f"{self.source} row {self.row}"

    def is_trainable(self, index: int) -> bool:
        """Whether message `index` is an assistant turn that the data allows to train."""
        return self.messages[index]["role"] == "assistant" and (not self.train or self.train[index])


def find_message_problem(messages: Sequence[Message]) -> tuple[str, str, str] | None:
    """Return `(field, what, fix)` for the first broken rule of the module docstring, or None."""
    if not messages:
        return "messages", "the conversation is empty", "remove the row or add messages"
    for index, message in enumerate(messages):
        problem = _role_problem(messages, index) or _content_problem(message, index)
        if problem:
            return problem
    if not any(message["role"] == "assistant" for message in messages):
        return "messages", "there is no assistant turn", "remove the row or add an answer"
    if messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        return f"messages[{len(messages) - 1}].role", f"the last turn is {last!r}, not 'assistant'", "cut the row there"
    return None


def _role_problem(messages: Sequence[Message], index: int) -> tuple[str, str, str] | None:
    role = messages[index].get("role")
    field = f"messages[{index}].role"
    if role not in ROLES:
        known = ", ".join(ROLES)
        aliases = ", ".join(f"{alias}={name}" for alias, name in ROLE_ALIASES.items())
        return field, f"unknown role {role!r}", f"use one of {known} (aliases: {aliases})"
    previous = messages[index - 1]["role"] if index else None
    if role == "system" and index:
        return field, "a system message stands in the middle", "put it first or remove it"
    if role == "user" and previous == "user":
        return field, "two user messages in a row", "join them into one"
    if role == "assistant" and previous == "assistant":
        return field, "two assistant messages in a row", "join them into one"
    if role == "assistant" and previous in (None, "system"):
        return field, "the assistant speaks before any user", "remove that turn or add the user's"
    if role == "tool" and not (
        previous == "tool" or (previous == "assistant" and messages[index - 1].get("tool_calls"))
    ):
        return field, "a tool message without a tool call before it", "add the assistant's tool_calls or remove it"
    return None


def _content_problem(message: Message, index: int) -> tuple[str, str, str] | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return None
    kind = "missing or null" if content is None else type(content).__name__
    return f"messages[{index}].content", f"expected a string, got {kind}", "write the text as one string"
