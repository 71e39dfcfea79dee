"""What an audit looks at, rows with their texts by speaker, and what it finds: which rows, and what to do."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.messages import Example, Message
from sft_recipes.response_patterns import mask

SEVERITIES = ("error", "warning", "info")
CHECKS: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_name("checks.yaml").read_text(encoding="utf-8")
)


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
        return "\n".join(
            content for role, content in self.turns if role not in ("assistant", "system")
        )


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
    parts = [
        message.get("content") or "",
        json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "",
    ]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class FlaggedRow:
    """One row under one check. `index` counts input rows over all files of the audit from 0; `where` is `FILE:LINE`.

    `detail` says what was seen there (secrets masked), `related` names the other rows concerned (the kept duplicate,
    the eval row).
    """

    index: int
    where: str
    detail: str = ""
    related: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """All rows under one check, of the `n` rows that it could look at.

    `severity` is one of `SEVERITIES`, `definition` the rule in one sentence with its limits; `fix` says what to do.
    """

    check: str
    severity: str
    title: str
    n: int
    rows: Sequence[FlaggedRow]
    definition: str
    fix: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON with the first ten rows, all of which stand in the flagged-rows file; a share of no rows
        is None.
        """
        content = dataclasses.asdict(dataclasses.replace(self, rows=self.rows[:10]))
        content["examples"], count = content.pop("rows"), len({row.index for row in self.rows})
        return {**content, "count": count, "share": count / self.n if self.n else None}


def make_finding(check: str, rows: Sequence[FlaggedRow], n: int, **fills: Any) -> Finding:
    """The finding of a check of `checks.yaml`; `fills` go into its texts."""
    texts = {key: text.format(**fills) for key, text in CHECKS[check].items()}
    return Finding(check=check, rows=rows, n=n, **texts)


def flag(row: AuditRow, detail: str, others: Sequence[AuditRow] = ()) -> FlaggedRow:
    """The row under a check, with the rows it is compared with."""
    return FlaggedRow(row.index, row.where, detail, [other.where for other in others])


def excerpt(text: str, characters: int = 120) -> str:
    """A text for people without its middle, beyond some `characters`; private data is masked before it is cut."""
    masked = mask(text)
    left_out, end = len(masked) - characters, characters // 3
    if left_out <= characters // 4:
        return masked
    return f"{masked[: characters - end]} [... {left_out:,} characters ...] {masked[-end:]}"
