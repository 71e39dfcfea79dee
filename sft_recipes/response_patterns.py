"""Patterns in texts that audit and evaluation share: refusals, loops, another's identity, secrets, and the like.

The expressions stand in `response_patterns.yaml`. All rules look at the letters only: they miss what is said in other
words or another language than English, and a text that quotes such words is found too.
"""

import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

PATTERNS: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
REFUSAL_CHARACTERS = 200
LOOP_PERIOD, LOOP_COPIES, LOOP_WORDS, LOOP_CHARACTERS = 64, 3, 24, 96
_DIGITS = re.compile(r"\d(?:[ ().-]{0,2}\d){4}")
REPETITIVE_WORDS, REPETITIVE_SHARE = 50, 0.5
OPENER_WORDS = 4


@lru_cache
def pattern(name: str) -> re.Pattern[str]:
    """All expressions of one list of `response_patterns.yaml` as one; `control_tokens` are literal texts there."""
    if name == "control_tokens":
        return literal_pattern(PATTERNS[name])
    return re.compile(
        "|".join(f"(?:{one})" for one in PATTERNS[name]), re.IGNORECASE | re.MULTILINE
    )


def literal_pattern(texts: Any) -> re.Pattern[str]:
    """An expression for any of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or "(?!)")


def find(name: str, text: str) -> str:
    """What the first match of a list says, or ""."""
    match = pattern(name).search(text.replace("\u2019", "'"))
    return match.group() if match else ""


def find_refusal(answer: str) -> str:
    """The words in the first 200 characters that make an answer a rule-based refusal, or ""."""
    return find("refusal", answer.lstrip()[:REFUSAL_CHARACTERS])


def refusal_error() -> dict[str, Any]:
    """How often the rule is right on our own labelled answers (tests/audit/refusals.yaml), for printing beside counts.

    `precision` and `recall` with their Wilson intervals `precision_ci` and `recall_ci`, of `n` answers.
    """
    measured = PATTERNS["measured"]
    return {**measured, "n": measured["answers"], **PATTERNS["measured_intervals"]}


def find_next_turn(answer: str, question: str) -> str:
    """A user's header that follows some answer text, unless a dialogue, quiz or the like was asked for, or ""."""
    if pattern("asks_for_turns").search(question):
        return ""
    headers = (
        header
        for header in pattern("user_header").finditer(answer)
        if answer[: header.start()].strip()
    )
    return next((header.group().strip() for header in headers), "")


def is_loop(text: str, cut_short: bool = False) -> bool:
    """Whether the text ends in at least 3 exact copies of at most 64 words that span at least 24 words.

    Texts of fewer than 24 words are looked at by character instead (96 of them), for scripts without spaces.
    `cut_short`: the last word may be half a word and is left out.
    """
    units, span = text.split(), LOOP_WORDS
    if cut_short:
        units = units[:-1]
    if len(units) < LOOP_WORDS:
        units, span = list("".join(text.split())), LOOP_CHARACTERS
    units.reverse()
    for period in range(1, min(LOOP_PERIOD, len(units) // LOOP_COPIES) + 1):
        repeated = takewhile(
            lambda pair: pair[0] == pair[1], zip(units, units[period:], strict=False)
        )
        if period + sum(1 for _ in repeated) >= max(span, LOOP_COPIES * period):
            return True
    return False


def repetition(text: str, n: int = 4) -> float | None:
    """rep-n: the share of a text's word n-grams that are repeats, 1 - distinct / all; None without any."""
    words = text.casefold().split()
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def is_repetitive(text: str) -> bool:
    """At least 50 words of which half or more of the 4-grams are repeats."""
    return len(text.split()) >= REPETITIVE_WORDS and (repetition(text) or 0) >= REPETITIVE_SHARE


def opener(text: str) -> str | None:
    """The first four words of a longer text in lower case; None for a shorter one: an answer is no opening."""
    words = text[:200].casefold().split(None, OPENER_WORDS)
    return " ".join(words[:OPENER_WORDS]) if len(words) > OPENER_WORDS else None


def private_spans(text: str) -> list[tuple[str, int, int]]:
    """`(type, start, end)` of every secret and every piece of personal data by the rules of the YAML, in order."""
    found: list[tuple[str, int, int]] = []
    has_digits = _DIGITS.search(text) is not None
    for kind, rule in PATTERNS["private"].items():
        if any(part in text for part in rule["needs"]) if "needs" in rule else has_digits:
            matches = re.finditer(rule["pattern"], text)
            found += [(kind, *match.span()) for match in matches if _is_valid(rule, match.group())]
    return sorted(found, key=lambda span: span[1])


def mask(text: str) -> str:
    """The text with every private span replaced by the name of its type, as `[email]`. Mask first, then cut."""
    parts, end = [], 0
    for kind, start, stop in private_spans(text):
        if start >= end:
            parts += [text[end:start], f"[{kind.replace('_', ' ')}]"]
        end = max(end, stop)
    return "".join([*parts, text[end:]]) if end else text


def _is_valid(rule: Mapping[str, Any], text: str) -> bool:
    least, most = rule.get("digits", (0, len(text)))
    is_valid = {"luhn": _luhn, "iban": _iban, "global_ip": _global_ip}.get(
        rule.get("valid", ""), bool
    )
    return least <= sum(map(str.isdigit, text)) <= most and is_valid(text)


def _luhn(text: str) -> bool:
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    code = text.replace(" ", "")
    number = int("".join(str(int(character, 36)) for character in code[4:] + code[:4]))
    return 15 <= len(code) <= 34 and number % 97 == 1


def _global_ip(text: str) -> bool:
    # 1.2.3.4 and the like are versions and section numbers far more often than addresses.
    numbers = [int(number) for number in text.split(".")]
    is_address = ".".join(map(str, numbers)) == text and 31 < max(numbers) < 256
    return is_address and ipaddress.ip_address(text).is_global
