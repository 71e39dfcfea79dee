"""Patterns in texts that audit and evaluation share: refusals, loops, secrets, and the like.

The expressions stand in `response_patterns.yaml`. All rules look at the letters only: they miss
what is said in other words or another language than English, and a text that quotes such words is
found too.
"""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_RULES_FILE = Path(__file__).with_suffix(".yaml")
PATTERNS: Mapping[str, Any] = yaml.safe_load(_RULES_FILE.read_text(encoding="utf-8"))

REFUSAL_CHARACTERS = 200
# The longest unit of a loop in words, how often it has to stand there, and how much text that is
# at least.
LOOP_PERIOD = 64
LOOP_COPIES = 3
LOOP_WORDS = 24
LOOP_CHARACTERS = 96
REPETITIVE_WORDS = 50
REPETITIVE_SHARE = 0.5
OPENER_WORDS = 4
# How much before a value is looked at for its name.
_NAME_CHARACTERS = 32
# Five digits nearly in a row: every kind of personal data but an address by e-mail has them.
_DIGITS = re.compile(r"\d(?:[ ().-]{0,2}\d){4}")


class PrivateSpan(NamedTuple):
    """Where a secret or a piece of personal data stands in a text, and which kind it is."""

    kind: str
    start: int
    end: int


@lru_cache
def pattern(name: str) -> re.Pattern[str]:
    """All expressions of one list of `response_patterns.yaml` as one.

    `control_tokens` are literal texts there.
    """
    if name == "control_tokens":
        return literal_pattern(PATTERNS[name])
    choices = [f"(?:{expression})" for expression in PATTERNS[name]]
    return re.compile("|".join(choices), re.IGNORECASE | re.MULTILINE)


def literal_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """An expression for any of these texts, the longest first."""
    longest_first = sorted(set(texts), key=len, reverse=True)
    never = "(?!)"
    return re.compile("|".join(map(re.escape, longest_first)) or never)


def find(name: str, text: str) -> str:
    """What the first match of a list says, or ""."""
    match = pattern(name).search(text.replace("\u2019", "'"))
    return match.group() if match else ""


def find_refusal(answer: str) -> str:
    """The words in the first 200 characters that make an answer a rule-based refusal, or ""."""
    return find("refusal", answer.lstrip()[:REFUSAL_CHARACTERS])


def refusal_error() -> dict[str, Any]:
    """How often the rule is right, for printing beside counts: `precision` and `recall`.

    Measured on our own `n` labelled answers (tests/audit/refusals.yaml), with the Wilson intervals
    `precision_ci` and `recall_ci`.
    """
    measured = PATTERNS["measured"]
    return {**measured, "n": measured["answers"], **PATTERNS["measured_intervals"]}


def find_next_turn(answer: str, question: str) -> str:
    """A user's header behind some answer text, or "".

    Where a dialogue, quiz or the like was asked for, it is none.
    """
    if pattern("asks_for_turns").search(question):
        return ""
    for header in pattern("user_header").finditer(answer):
        if answer[: header.start()].strip():
            return header.group().strip()
    return ""


def is_loop(text: str, cut_short: bool = False) -> bool:
    """Whether the text ends in 3 or more exact copies of at most 64 words, 24 words in all.

    Texts of fewer than 24 words are looked at by character instead (96 of them), for scripts
    without spaces. `cut_short`: the last word may be half a word and is left out.
    """
    units = text.split()
    span = LOOP_WORDS
    if cut_short:
        units = units[:-1]
    if len(units) < LOOP_WORDS:
        units = list("".join(text.split()))
        span = LOOP_CHARACTERS
    units.reverse()
    longest_period = min(LOOP_PERIOD, len(units) // LOOP_COPIES)
    for period in range(1, longest_period + 1):
        if _repeating_length(units, period) >= max(span, LOOP_COPIES * period):
            return True
    return False


def _repeating_length(units: Sequence[str], period: int) -> int:
    """How many units from the first on equal those `period` later, the first copy included."""
    length = period
    while length < len(units) and units[length] == units[length - period]:
        length += 1
    return length


def repetition(text: str, n: int = 4) -> float | None:
    """rep-n: the share of a text's word n-grams that are repeats; None without any."""
    words = text.casefold().split()
    count = len(words) - n + 1
    if count < 1:
        return None
    grams = set()
    for start in range(count):
        grams.add(tuple(words[start : start + n]))
    return 1 - len(grams) / count


def is_repetitive(text: str) -> bool:
    """At least 50 words of which half or more of the 4-grams are repeats."""
    if len(text.split()) < REPETITIVE_WORDS:
        return False
    share = repetition(text)
    return share is not None and share >= REPETITIVE_SHARE


def opener(text: str) -> str | None:
    """The first four words of a longer text in lower case.

    None for a shorter one: a whole answer is no opening.
    """
    words = text[:200].casefold().split(None, OPENER_WORDS)
    if len(words) <= OPENER_WORDS:
        return None
    return " ".join(words[:OPENER_WORDS])


def private_spans(text: str, kinds: Collection[str] | None = None) -> list[PrivateSpan]:
    """Every secret and every piece of personal data by the rules of the YAML, in order.

    `kinds`: which rules, all of them if left out.
    """
    has_digits = _DIGITS.search(text) is not None
    spans: list[PrivateSpan] = []
    for kind, rule in PATTERNS["private"].items():
        if kinds is not None and kind not in kinds:
            continue
        # Most texts hold none: these two tests are many times as fast as the expressions.
        may_hold = has_digits
        if "needs" in rule:
            may_hold = any(mark in text for mark in rule["needs"])
        if may_hold:
            spans.extend(_spans_of(kind, rule, text))
    return sorted(spans, key=lambda span: span.start)


def secret_kinds() -> list[str]:
    """Kinds of private spans that are secrets; the others are personal data."""
    return [kind for kind, rule in PATTERNS["private"].items() if rule.get("secret")]


def _spans_of(kind: str, rule: Mapping[str, Any], text: str) -> Iterator[PrivateSpan]:
    for match in re.finditer(rule["pattern"], text):
        # A value that the pattern only looks ahead at belongs to the span.
        part = match.lastgroup or 0
        if "before" in rule:
            before = text[max(0, match.start() - _NAME_CHARACTERS) : match.start()]
            if re.search(rule["before"], before) is None:
                continue
        if _is_valid(rule, match[part]):
            yield PrivateSpan(kind, match.start(), match.end(part))


def mask(text: str) -> str:
    """The text with every private span replaced by the name of its kind, as `[email]`.

    Mask first, then cut.
    """
    parts = []
    end = 0
    for span in private_spans(text):
        # A span that overlaps the one before it is hidden with that one.
        if span.start >= end:
            parts.append(text[end : span.start])
            parts.append(f"[{span.kind.replace('_', ' ')}]")
        end = max(end, span.end)
    parts.append(text[end:])
    return "".join(parts)


def _is_valid(rule: Mapping[str, Any], text: str) -> bool:
    if "digits" in rule:
        least, most = rule["digits"]
        if not least <= sum(map(str.isdigit, text)) <= most:
            return False
    if "valid" in rule:
        return _VALIDATORS[rule["valid"]](text)
    return True


def _luhn(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    digits.reverse()
    total = sum(digits[::2])
    for digit in digits[1::2]:
        tens, ones = divmod(2 * digit, 10)
        total += tens + ones
    return total % 10 == 0


def _iban(text: str) -> bool:
    code = text.replace(" ", "")
    # ISO 13616: the country and check digits go to the end, letters count from A = 10 to Z = 35.
    moved = code[4:] + code[:4]
    number = "".join(str(int(character, 36)) for character in moved)
    return 15 <= len(code) <= 34 and int(number) % 97 == 1


def _global_ip(text: str) -> bool:
    # 1.2.3.4 and the like are versions and section numbers far more often than addresses.
    numbers = list(map(int, text.split(".")))
    is_address = ".".join(map(str, numbers)) == text and 31 < max(numbers) < 256
    return is_address and ipaddress.ip_address(text).is_global


# What examples write in the place of a secret: within a value, and as all of it but its digits.
_EXAMPLE = re.compile(
    r"your|example|placeholder|change_?me|redacted|dummy|xxxx|\*\*\*|\.\.\.|%s|environ|getenv"
    r"|\A\$\w|\$[({]|(.)\1{7}",
    re.IGNORECASE,
)
_EXAMPLE_WORDS = frozenset(
    "pass password passwd secret token user username hidden masked".split()
    + "none null true false string value".split()
)
# Names in code (`settings.password`) and words hold no digit; a longer value without one may be
# several words put together as a password.
_NAME = re.compile(r"[^\W\d]+(?:\.[^\W\d]+)*")
_LONG_VALUE = 16
_WORD_CHARACTERS = 6  # of a word in quotes: `password="swordfish"`
# What stands between a name and its value.
_ASSIGNMENT = re.compile(r"""(?P<sign>[=:]>?)[ \t]*(?P<quote>["']?)(?:(?:[Bb]earer|[Bb]asic) )?""")
_PATH = re.compile(r"[~.]{0,2}/[\w.-]+/.*")


def _key(text: str) -> bool:
    return _EXAMPLE.search(text) is None


def _address_secret(text: str) -> bool:
    """Whether `user:password`, or a token in its place, is no example."""
    _, colon, password = text.rpartition(":")
    if colon:
        return not _is_example(password)
    return _is_mixed(password)


def _assigned_secret(text: str) -> bool:
    """Whether `= value` or `: value` is no example, name, word or path."""
    assignment = _ASSIGNMENT.match(text)
    assert assignment is not None
    value = text[assignment.end() :]
    if _is_example(value) or _PATH.fullmatch(value):
        return False
    if _NAME.fullmatch(value):
        is_literal = assignment["sign"] == "=" and assignment["quote"]
        return bool(is_literal) and len(value) >= _WORD_CHARACTERS
    return _is_mixed(value) or len(value) >= _LONG_VALUE


def _is_mixed(value: str) -> bool:
    """Of letters and digits, or with a sign that no word has."""
    has_letter = any(map(str.isalpha, value))
    has_sign = re.search(r"[^\w.:/-]", value) is not None
    return has_letter and (has_sign or any(map(str.isdigit, value)))


def _is_example(value: str) -> bool:
    word = re.sub(r"[\W\d_]", "", value).casefold()
    return word in _EXAMPLE_WORDS or _EXAMPLE.search(value) is not None


_VALIDATORS: Mapping[str, Callable[[str], bool]] = {
    "luhn": _luhn,
    "iban": _iban,
    "global_ip": _global_ip,
    "key": _key,
    "address_secret": _address_secret,
    "assigned_secret": _assigned_secret,
}
