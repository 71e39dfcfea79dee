"""Checks of what single turns say: one pass over the texts.

To add one, write a function that gets a turn and returns what it found there, put it into one of
the three tables at the end, and its texts into `checks.yaml`; `docs/how-to/add-a-check.md` goes
through it.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes import response_patterns as patterns
from sft_recipes.audit.finding import (
    AuditRow,
    Finding,
    FlaggedRow,
    ProgressBar,
    Turn,
    excerpt,
    flag,
    make_finding,
)

_DEAD_LINK_WORDS = 50
_SHOWN_CHARACTERS = 120
# Code inside an answer, up to its end where the fence is never closed.
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
# What a check returns of a turn that is in order.
_NOTHING = ""


@dataclass(frozen=True, slots=True)
class _CheckedTurn:
    """The text of a turn, and what checks need beside it.

    `text_before`: the text of the turn before it, whoever spoke, "" for the first; for an answer
    that is the user's turn, the result of a tool, or a system prompt. `control_tokens` finds any
    control token that is known.
    """

    text: str
    text_before: str
    control_tokens: re.Pattern[str]


# A check returns the words that it found in a turn, for the report to show, or `_NOTHING`.
_Check = Callable[[_CheckedTurn], str]


@dataclass(frozen=True, slots=True)
class _RowFaults:
    """The checks that a row fails, with where and what, and its private data by kind."""

    details: dict[str, str] = field(default_factory=dict)
    private: Counter[str] = field(default_factory=Counter)


def text_findings(
    rows: Sequence[AuditRow], tokenizer_tokens: Sequence[str], bar: ProgressBar
) -> tuple[list[Finding], dict[str, int]]:
    """One finding per check, empty ones included, and how often each kind of private data occurs.

    `tokenizer_tokens`: the control tokens of the run's tokenizer, if it is known. `bar` is told of
    each row.
    """
    known_tokens = [*patterns.PATTERNS["control_tokens"], *tokenizer_tokens]
    control_tokens = patterns.literal_pattern(known_tokens)
    checks = (*_OF_ANSWERS, *_OF_QUESTIONS, *_OF_ALL, "secret", "personal_data")
    flagged: dict[str, list[FlaggedRow]] = {check: [] for check in checks}
    private: Counter[str] = Counter()
    for row in rows:
        faults = _check_turns(row.turns, control_tokens)
        private.update(faults.private)
        for check, detail in faults.details.items():
            flagged[check].append(flag(row, detail))
        bar.update()
    fills = _fills(len(tokenizer_tokens))
    findings = []
    for check, flagged_rows in flagged.items():
        finding = make_finding(check, flagged_rows, len(rows), **fills.get(check, {}))
        findings.append(finding)
    return findings, dict(private)


def _fills(tokenizer_tokens: int) -> Mapping[str, Mapping[str, Any]]:
    """What the words in braces in `checks.yaml` stand for, by check."""
    return {
        "control_tokens": {"known": f"{tokenizer_tokens or 'no'} known"},
        "dead_link": {"words": _DEAD_LINK_WORDS},
        "refusal": {
            "patterns": len(patterns.PATTERNS["refusal"]),
            "characters": patterns.REFUSAL_CHARACTERS,
            **patterns.PATTERNS["measured"],
        },
    }


def _check_turns(turns: Sequence[Turn], control_tokens: re.Pattern[str]) -> _RowFaults:
    """Of each check the first turn that fails it."""
    faults = _RowFaults()
    text_before = ""
    for number, turn in enumerate(turns, 1):
        speaker = f"{turn.role} (turn {number})"
        checked = _CheckedTurn(turn.content, text_before, control_tokens)
        for name, check in _checks_of(turn.role).items():
            if name in faults.details:
                continue
            words = check(checked)
            if words:
                faults.details[name] = f"{speaker}: {excerpt(words)!r}"
        for span in patterns.private_spans(turn.content):
            faults.private[span.kind] += 1
            name = "personal_data"
            if patterns.PATTERNS["private"][span.kind].get("secret"):
                name = "secret"
            faults.details.setdefault(name, f"{speaker}: {span.kind}")
        text_before = turn.content
    return faults


def _checks_of(role: str) -> Mapping[str, _Check]:
    if role == "assistant":
        return _OF_ALL | _OF_ANSWERS
    if role == "user":
        return _OF_ALL | _OF_QUESTIONS
    return _OF_ALL


def _empty_answer(turn: _CheckedTurn) -> str:
    if turn.control_tokens.sub("", turn.text).strip():
        return _NOTHING
    return turn.text.strip() or "no text"


def _end_text(turn: _CheckedTurn) -> str:
    """The text of an end token behind an answer; with nothing before it, it is an empty answer."""
    answer = turn.text.strip()
    for token in patterns.PATTERNS["end_texts"]:
        if answer.endswith(token) and answer != token:
            return str(token)
    return _NOTHING


def _placeholder(turn: _CheckedTurn) -> str:
    answer = turn.text.strip()
    if patterns.pattern("placeholder").fullmatch(answer):
        return answer
    return _NOTHING


def _unfilled(turn: _CheckedTurn) -> str:
    if "{{" not in turn.text:
        return _NOTHING
    prose = _CODE.sub("", turn.text)
    # Templates are written with the same braces: what asks for one, or is one, is in order.
    if patterns.find("asks_for_markup", turn.text_before) or patterns.find("markup", prose):
        return _NOTHING
    return patterns.find("unfilled", prose)


def _refusal(turn: _CheckedTurn) -> str:
    return patterns.find_refusal(turn.text)


def _identity(turn: _CheckedTurn) -> str:
    return patterns.find("identity", turn.text)


def _cutoff(turn: _CheckedTurn) -> str:
    return patterns.find("cutoff", turn.text)


def _repetition(turn: _CheckedTurn) -> str:
    if patterns.is_loop(turn.text) or patterns.is_repetitive(turn.text):
        return turn.text[-_SHOWN_CHARACTERS:]
    return patterns.find("letter_run", turn.text)


def _next_turn(turn: _CheckedTurn) -> str:
    return patterns.find_next_turn(turn.text, turn.text_before)


def _answer_is_prompt(turn: _CheckedTurn) -> str:
    words = turn.text.split()
    if words and words == turn.text_before.split():
        return turn.text
    return _NOTHING


def _open_fence(turn: _CheckedTurn) -> str:
    if "```" not in turn.text:
        return _NOTHING
    fences: list[str] = []
    for line in turn.text.splitlines():
        if line.lstrip().startswith("```"):
            fences.append(line.strip())
    is_open = len(fences) % 2 == 1
    if is_open:
        return fences[-1]
    return _NOTHING


def _dead_link(turn: _CheckedTurn) -> str:
    link = patterns.find("dead_link", turn.text).strip()
    other_words = len(turn.text.split()) - len(link.split())
    if other_words < _DEAD_LINK_WORDS:
        return link
    return _NOTHING


def _control_tokens(turn: _CheckedTurn) -> str:
    match = turn.control_tokens.search(turn.text)
    if match is None:
        return _NOTHING
    return match.group()


def _mojibake(turn: _CheckedTurn) -> str:
    if turn.text.isascii():
        return _NOTHING
    return patterns.find("mojibake", turn.text)


def _control_character(turn: _CheckedTurn) -> str:
    return patterns.find("control_character", turn.text)


# Checks of every assistant turn.
_OF_ANSWERS: dict[str, _Check] = {
    "empty_answer": _empty_answer,
    "end_text": _end_text,
    "placeholder": _placeholder,
    "unfilled": _unfilled,
    "refusal": _refusal,
    "identity": _identity,
    "cutoff": _cutoff,
    "repetition": _repetition,
    "next_turn": _next_turn,
    "answer_is_prompt": _answer_is_prompt,
    "open_fence": _open_fence,
}
# Checks of every user turn.
_OF_QUESTIONS: dict[str, _Check] = {
    "dead_link": _dead_link,
}
# Checks of every turn, whoever speaks.
_OF_ALL: dict[str, _Check] = {
    "control_tokens": _control_tokens,
    "mojibake": _mojibake,
    "control_character": _control_character,
}
