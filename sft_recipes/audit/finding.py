"""What an audit looks at, rows with their texts by speaker, and what it finds.

The texts of every check stand in `checks.yaml`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from sft_recipes.messages import Example, Message
from sft_recipes.overlap import question
from sft_recipes.response_patterns import mask

SEVERITIES = ("error", "warning", "info")
_CHECKS_FILE = Path(__file__).with_name("checks.yaml")
CHECKS: Mapping[str, Any] = yaml.safe_load(_CHECKS_FILE.read_text(encoding="utf-8"))
_EXAMPLES = 10


class ProgressBar(Protocol):
    """What is told of progress: tqdm, or whatever has its `update`."""

    def update(self, n: float = 1) -> Any:
        """Count `n` rows more."""


class Turn(NamedTuple):
    """One message as text; a tool call counts as content of the assistant, as JSON."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One input row. `index` counts rows over all files from 0; `where` is `FILE:LINE`.

    `prompt` is all text that is not the assistant's and `response` all text that is, one line feed
    between messages. A raw text row is one assistant turn with an empty prompt.
    """

    index: int
    where: str
    prompt: str
    response: str
    turns: Sequence[Turn]
    example: Example

    @property
    def question(self) -> str:
        """The prompt without system messages, which all rows may share."""
        return question(self.example)


def audit_rows(examples: Iterable[Example], first_index: int = 0) -> list[AuditRow]:
    """The rows of one or several sources, numbered from `first_index`."""
    rows = []
    for index, example in enumerate(examples, first_index):
        turns = _turns(example)
        row = AuditRow(
            index=index,
            where=example.where,
            prompt=_said_by(turns, ("system", "user", "tool")),
            response=_said_by(turns, ("assistant",)),
            turns=turns,
            example=example,
        )
        rows.append(row)
    return rows


def _turns(example: Example) -> list[Turn]:
    if example.text is not None:
        return [Turn("assistant", example.text)]
    turns = []
    for message in example.messages:
        turns.append(Turn(message["role"], _content(message)))
    return turns


def _said_by(turns: Sequence[Turn], roles: Sequence[str]) -> str:
    return "\n".join(turn.content for turn in turns if turn.role in roles)


def _content(message: Message) -> str:
    parts = []
    if message.get("content"):
        parts.append(message["content"])
    if message.get("tool_calls"):
        calls = json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True)
        parts.append(calls)
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class FlaggedRow:
    """One row under one check. `index` counts input rows over all files; `where` is `FILE:LINE`.

    `detail` says what was seen there (secrets masked), `related` names the other rows concerned
    (the kept duplicate, the eval row).
    """

    index: int
    where: str
    detail: str = ""
    related: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """All rows under one check, of the `n` rows that it could look at.

    `severity` is one of `SEVERITIES`, `definition` the rule in one sentence with its limits; `fix`
    says what to do.
    """

    check: str
    severity: str
    title: str
    n: int
    rows: Sequence[FlaggedRow]
    definition: str
    fix: str

    def as_json(self) -> dict[str, Any]:
        """Plain data with the first ten rows, all of which stand in the flagged-rows file.

        A share of no rows is None.
        """
        count = len({row.index for row in self.rows})
        return {
            "check": self.check,
            "severity": self.severity,
            "title": self.title,
            "n": self.n,
            "definition": self.definition,
            "fix": self.fix,
            "examples": list(map(dataclasses.asdict, self.rows[:_EXAMPLES])),
            "count": count,
            "share": count / self.n if self.n else None,
        }


def make_finding(check: str, rows: Sequence[FlaggedRow], n: int, **fills: Any) -> Finding:
    """The finding of a check of `checks.yaml`; `fills` go into its texts."""
    texts = {key: text.format(**fills) for key, text in CHECKS[check].items()}
    return Finding(check=check, rows=rows, n=n, **texts)


def flag(row: AuditRow, detail: str, others: Sequence[AuditRow] = ()) -> FlaggedRow:
    """The row under a check, with the rows it is compared with."""
    return FlaggedRow(row.index, row.where, detail, [other.where for other in others])


def excerpt(text: str, characters: int = 120) -> str:
    """A text for people without its middle, beyond some `characters`.

    Private data is masked before the text is cut.
    """
    masked = mask(text)
    left_out = len(masked) - characters
    # What is left out has to be worth the words that say so.
    if left_out <= characters // 4:
        return masked
    end = characters // 3
    start = characters - end
    return f"{masked[:start]} [... {left_out:,} characters ...] {masked[-end:]}"
