"""Checks of what single turns say: one pass over the texts."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sft_recipes import response_patterns as patterns
from sft_recipes.audit.finding import AuditRow, Finding, FlaggedRow, excerpt, flag, make_finding

_DEAD_LINK_WORDS, _SHOWN_CHARACTERS = 50, 120

Found = tuple[dict[str, str], Counter[str]]
_Look = Callable[[str, str, re.Pattern[str]], str]


def text_findings(
    rows: Sequence[AuditRow], own: Sequence[str], bar: Any
) -> tuple[list[Finding], dict[str, int]]:
    """One finding per check, empty ones included, and how often each type of private data occurs.

    `own`: the control tokens of the run's tokenizer, if it is known. `bar.update(n)` is told of progress.
    """
    spelled = patterns.literal_pattern([*patterns.PATTERNS["control_tokens"], *own])
    checks = (*_ANSWER, *_QUESTION, *_ANY, "secret", "personal_data")
    flagged: dict[str, list[FlaggedRow]] = {check: [] for check in checks}
    kinds: Counter[str] = Counter()
    for row in rows:
        details, private = check_turns(row.turns, spelled)
        kinds.update(private)
        for check, detail in details.items():
            flagged[check].append(flag(row, detail))
        bar.update()
    fills = {
        "own": f"{len(own) or 'no'} known",
        "words": _DEAD_LINK_WORDS,
        **patterns.PATTERNS["measured"],
    }
    fills |= {
        "characters": patterns.REFUSAL_CHARACTERS,
        "patterns": len(patterns.PATTERNS["refusal"]),
    }
    return [make_finding(check, some, len(rows), **fills) for check, some in flagged.items()], dict(
        kinds
    )


def check_turns(turns: Sequence[tuple[str, str]], spelled: re.Pattern[str]) -> Found:
    """The checks that a row fails, each with where and what, and the private data it holds by type."""
    found: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    before = ""
    for number, (role, content) in enumerate(turns, 1):
        for check, look in (_ANY | {"assistant": _ANSWER, "user": _QUESTION}.get(role, {})).items():
            if check not in found and (detail := look(content, before, spelled)):
                found[check] = f"{role} (turn {number}): {excerpt(detail)!r}"
        for kind, _, _ in patterns.private_spans(content):
            kinds[kind] += 1
            check = (
                "secret" if patterns.PATTERNS["private"][kind].get("secret") else "personal_data"
            )
            found.setdefault(check, f"{role} (turn {number}): {kind}")
        before = content
    return found, kinds


def _repetition(answer: str, *_: Any) -> str:
    if patterns.is_loop(answer) or patterns.is_repetitive(answer):
        return answer[-_SHOWN_CHARACTERS:]
    return patterns.find("letter_run", answer)


def _end_text(answer: str, *_: Any) -> str:
    """The text of an end token with which the answer ends; with nothing before it, it is an empty answer."""
    stripped = answer.strip()
    for token in patterns.PATTERNS["end_texts"]:
        if stripped.endswith(token) and stripped != token:
            return str(token)
    return ""


def _open_fence(answer: str, *_: Any) -> str:
    fences = (
        [line for line in answer.splitlines() if line.lstrip().startswith("```")]
        if "```" in answer
        else []
    )
    return fences[-1].strip() if len(fences) % 2 else ""


def _dead_link(question: str, *_: Any) -> str:
    link = patterns.find("dead_link", question).strip()
    return link if len(question.split()) - len(link.split()) < _DEAD_LINK_WORDS else ""


# A check gets the text of a turn, that of the turn before it, and the control tokens; it returns what it found.
_ANSWER: dict[str, _Look] = {
    "empty_answer": lambda text, _, spelled: (
        "" if spelled.sub("", text).strip() else text.strip() or "no text"
    ),
    "end_text": _end_text,
    "placeholder": lambda text, *_: (
        text.strip() if patterns.pattern("placeholder").fullmatch(text.strip()) else ""
    ),
    "refusal": lambda text, *_: patterns.find_refusal(text),
    "identity": lambda text, *_: patterns.find("identity", text),
    "cutoff": lambda text, *_: patterns.find("cutoff", text),
    "repetition": _repetition,
    "next_turn": lambda text, before, _: patterns.find_next_turn(text, before),
    "answer_is_prompt": lambda text, before, _: (
        text if text.strip() and text.split() == before.split() else ""
    ),
    "open_fence": _open_fence,
}
_QUESTION: dict[str, _Look] = {"dead_link": _dead_link}
_ANY: dict[str, _Look] = {
    "control_tokens": lambda text, _, spelled: (
        match.group() if (match := spelled.search(text)) else ""
    ),
    "mojibake": lambda text, *_: "" if text.isascii() else patterns.find("mojibake", text),
    "control_character": lambda text, *_: patterns.find("control_character", text),
}
