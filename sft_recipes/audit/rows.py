"""The shape in which every audit check sees a row: its texts by speaker, and where the row stands."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sft_recipes.messages import Example, Message


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One input row. `index` counts rows over all files of the audit from 0; `where` is `FILE:LINE`.

    `prompt` is all text that is not the assistant's and `response` all text that is, one line feed between messages.
    `turns` are `(role, content)` in order; a tool call counts as content of the assistant, as JSON. A raw text row is
    one assistant turn with an empty prompt.
    """

    index: int
    where: str
    prompt: str
    response: str
    turns: Sequence[tuple[str, str]]
    example: Example

    @property
    def question(self) -> str:
        """The prompt without system messages: what tells one row from another where all share a system prompt."""
        return "\n".join(content for role, content in self.turns if role not in ("assistant", "system"))


def audit_rows(examples: Iterable[Example], first_index: int = 0) -> list[AuditRow]:
    """The rows of one or several sources, numbered from `first_index`."""
    rows = []
    for index, example in enumerate(examples, first_index):
        turns = [(message["role"], _content(message)) for message in example.messages]
        turns = [("assistant", example.text)] if example.text is not None else turns
        prompt = "\n".join(content for role, content in turns if role != "assistant")
        response = "\n".join(content for role, content in turns if role == "assistant")
        rows.append(AuditRow(index, example.where, prompt, response, turns, example))
    return rows


def _content(message: Message) -> str:
    calls = message.get("tool_calls")
    parts = [message.get("content") or "", json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else ""]
    return "\n".join(part for part in parts if part)
