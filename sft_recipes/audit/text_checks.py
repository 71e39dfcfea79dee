"""Checks of what single turns say: one pass over the texts."""

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
    Turn,
    excerpt,
    flag,
    make_finding,
)

_DEAD_LINK_WORDS = 50
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class _Said:
    """The text of a turn, that of the turn before it, and an expression for all control tokens."""

    text: str
    before: str
    control_tokens: re.Pattern[str]


# A check returns what it found, "" for nothing.
_Check = Callable[[_Said], str]


@dataclass(frozen=True, slots=True)
class _RowFaults:
    """The checks that a row fails, with where and what, and its private data by kind."""

    details: dict[str, str] = field(default_factory=dict)
    private: Counter[str] = field(default_factory=Counter)


def text_findings(
    rows: Sequence[AuditRow], own: Sequence[str], bar: Any
) -> tuple[list[Finding], dict[str, int]]:
    """One finding per check, empty ones included, and how often each kind of private data occurs.

    `own`: the control tokens of the run's tokenizer, if it is known. `bar.update(n)` is told of
    progress.
    """
    control_tokens = patterns.literal_pattern([*patterns.PATTERNS["control_tokens"], *own])
    checks = (*_OF_ANSWERS, *_OF_QUESTIONS, *_OF_ALL, "secret", "personal_data")
    flagged: dict[str, list[FlaggedRow]] = {check: [] for check in checks}
    private: Counter[str] = Counter()
    for row in rows:
        faults = _check_turns(row.turns, control_tokens)
        private.update(faults.private)
        for check, detail in faults.details.items():
            flagged[check].append(flag(row, detail))
        bar.update()
    findings = []
    for check, flagged_rows in flagged.items():
        finding = make_finding(
            check,
            flagged_rows,
            len(rows),
            own=f"{len(own) or 'no'} known",
            words=_DEAD_LINK_WORDS,
            characters=patterns.REFUSAL_CHARACTERS,
            patterns=len(patterns.PATTERNS["refusal"]),
            **patterns.PATTERNS["measured"],
        )
        findings.append(finding)
    return findings, dict(private)


def _check_turns(turns: Sequence[Turn], control_tokens: re.Pattern[str]) -> _RowFaults:
    """Of each check the first turn that fails it."""
    faults = _RowFaults()
    before = ""
    for number, turn in enumerate(turns, 1):
        speaker = f"{turn.role} (turn {number})"
        said = _Said(turn.content, before, control_tokens)
        for check, look in _checks_of(turn.role).items():
            if check in faults.details:
                continue
            detail = look(said)
            if detail:
                faults.details[check] = f"{speaker}: {excerpt(detail)!r}"
        for span in patterns.private_spans(turn.content):
            faults.private[span.kind] += 1
            is_secret = patterns.PATTERNS["private"][span.kind].get("secret")
            check = "secret" if is_secret else "personal_data"
            faults.details.setdefault(check, f"{speaker}: {span.kind}")
        before = turn.content
    return faults


def _checks_of(role: str) -> Mapping[str, _Check]:
    if role == "assistant":
        return _OF_ALL | _OF_ANSWERS
    if role == "user":
        return _OF_ALL | _OF_QUESTIONS
    return _OF_ALL


def _empty_answer(said: _Said) -> str:
    if said.control_tokens.sub("", said.text).strip():
        return ""
    return said.text.strip() or "no text"


def _end_text(said: _Said) -> str:
    """The text of an end token behind an answer; with nothing before it, it is an empty answer."""
    answer = said.text.strip()
    for token in patterns.PATTERNS["end_texts"]:
        if answer.endswith(token) and answer != token:
            return str(token)
    return ""


def _placeholder(said: _Said) -> str:
    answer = said.text.strip()
    return answer if patterns.pattern("placeholder").fullmatch(answer) else ""


def _refusal(said: _Said) -> str:
    return patterns.find_refusal(said.text)


def _identity(said: _Said) -> str:
    return patterns.find("identity", said.text)


def _cutoff(said: _Said) -> str:
    return patterns.find("cutoff", said.text)


def _repetition(said: _Said) -> str:
    if patterns.is_loop(said.text) or patterns.is_repetitive(said.text):
        return said.text[-_SHOWN_CHARACTERS:]
    return patterns.find("letter_run", said.text)


def _next_turn(said: _Said) -> str:
    return patterns.find_next_turn(said.text, said.before)


def _answer_is_prompt(said: _Said) -> str:
    words = said.text.split()
    return said.text if words and words == said.before.split() else ""


def _open_fence(said: _Said) -> str:
    if "```" not in said.text:
        return ""
    fences = [line for line in said.text.splitlines() if line.lstrip().startswith("```")]
    is_open = len(fences) % 2 == 1
    return fences[-1].strip() if is_open else ""


def _dead_link(said: _Said) -> str:
    link = patterns.find("dead_link", said.text).strip()
    other_words = len(said.text.split()) - len(link.split())
    return link if other_words < _DEAD_LINK_WORDS else ""


def _control_tokens(said: _Said) -> str:
    match = said.control_tokens.search(said.text)
    return match.group() if match else ""


def _mojibake(said: _Said) -> str:
    if said.text.isascii():
        return ""
    return patterns.find("mojibake", said.text)


def _control_character(said: _Said) -> str:
    return patterns.find("control_character", said.text)


_OF_ANSWERS: dict[str, _Check] = {
    "empty_answer": _empty_answer,
    "end_text": _end_text,
    "placeholder": _placeholder,
    "refusal": _refusal,
    "identity": _identity,
    "cutoff": _cutoff,
    "repetition": _repetition,
    "next_turn": _next_turn,
    "answer_is_prompt": _answer_is_prompt,
    "open_fence": _open_fence,
}
_OF_QUESTIONS: dict[str, _Check] = {
    "dead_link": _dead_link,
}
_OF_ALL: dict[str, _Check] = {
    "control_tokens": _control_tokens,
    "mojibake": _mojibake,
    "control_character": _control_character,
}
