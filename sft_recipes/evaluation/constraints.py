"""What a row's `expected_format` demands of an answer, after the idea of IFEval.

Only what a program can verify:

    {"type": "json"}                  one JSON value and nothing else
    {"type": "bullets", "n": 3}       exactly three lines that begin with -, * or a bullet
    {"min_words": 10, "max_words": 50, "keywords": ["Paris"], "starts_with": "Dear"}

All members of a mapping have to hold, each of them is one constraint; null members count as absent,
since files with columns add them. Keywords and the like ignore case and match whole words.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem, suggest

_BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")


class Fault(NamedTuple):
    """Why a constraint cannot be verified, in the words of an error."""

    what: str
    fix: str


class Verifier(NamedTuple):
    """The type of a constraint's value, and whether a text without outer white space meets it."""

    kind: type
    is_met: Callable[[str, Any], bool]


def is_json(text: str, prose_may_follow: bool = False) -> bool:
    """Whether the stripped text is one JSON value and nothing else."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return False
    return prose_may_follow or end == len(text.strip())


def _has_all_words(text: str, words: Sequence[str]) -> bool:
    return all(_has_word(text, word) for word in words)


def _has_no_word(text: str, words: Sequence[str]) -> bool:
    return not any(_has_word(text, word) for word in words)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


VERIFIERS: Mapping[str, Verifier] = {
    "json": Verifier(bool, lambda text, wanted: is_json(text) is wanted),
    "bullets": Verifier(int, lambda text, n: len(_BULLET.findall(text)) == n),
    "min_words": Verifier(int, lambda text, n: len(text.split()) >= n),
    "max_words": Verifier(int, lambda text, n: len(text.split()) <= n),
    "paragraphs": Verifier(int, lambda text, n: len(_BLANK_LINES.split(text)) == n),
    "keywords": Verifier(list, _has_all_words),
    "forbidden": Verifier(list, _has_no_word),
    "choices": Verifier(list, lambda text, choices: text in choices),
    "regex": Verifier(str, lambda text, pattern: re.search(pattern, text) is not None),
    "starts_with": Verifier(str, lambda text, start: text.startswith(start)),
    "ends_with": Verifier(str, lambda text, end: text.endswith(end)),
    "lower_case": Verifier(bool, lambda text, wanted: (text == text.lower()) is wanted),
    "upper_case": Verifier(bool, lambda text, wanted: (text == text.upper()) is wanted),
    "no_commas": Verifier(bool, lambda text, wanted: ("," not in text) is wanted),
}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    list: "a list of texts",
    str: "a text",
}


def constraints(expected: Mapping[str, Any] | None) -> dict[str, Any]:
    """Constraints by name; `{"type": "bullets", "n": 3}` is also written `{"bullets": 3}`."""
    given = {name: value for name, value in (expected or {}).items() if value is not None}
    kind = given.pop("type", None)
    if kind == "bullets":
        given["bullets"] = given.pop("n", None)
    elif kind is not None:
        given[str(kind)] = True
    return given


def broken_constraints(text: str, expected: Mapping[str, Any] | None) -> list[str]:
    """The names of those constraints of a checked `expected_format` that the text breaks."""
    broken = []
    for name, value in constraints(expected).items():
        if not VERIFIERS[name].is_met(text.strip(), value):
            broken.append(name)
    return broken


def check_expected_format(expected: Any, where: str) -> None:
    """Raise InputError unless `expected` is None or a mapping of constraints to be verified."""
    if expected is None:
        return
    shown = json.dumps(expected, ensure_ascii=False, default=str)
    problems = []
    for fault in _faults(expected):
        what = f"{shown} {fault.what}"
        problems.append(Problem(where, "expected_format", what, fault.fix))
    if problems:
        raise InputError(problems)


def _faults(expected: Any) -> list[Fault]:
    given = constraints(expected) if isinstance(expected, Mapping) else {}
    if not given:
        fix = 'write constraints, as {"max_words": 50}, or null'
        return [Fault("is no mapping of constraints", fix)]
    faults = []
    for name, value in given.items():
        fault = _fault(name, value)
        if fault is not None:
            faults.append(fault)
    return faults


def _fault(name: str, value: Any) -> Fault | None:
    """Why a constraint cannot be verified, or None."""
    if name not in VERIFIERS:
        what = f"is not known: no constraint is called {name!r}"
        return Fault(what, suggest(name, VERIFIERS))
    kind = VERIFIERS[name].kind
    if not _fits(value, kind):
        what = f"does not fit: {name} is {_KINDS[kind]}, not {value!r}"
        return Fault(what, "correct the value")
    if name == "regex":
        try:
            re.compile(value)
        except re.error as error:
            fix = "correct it as Python's re module reads it"
            return Fault(f"holds no regular expression: {error}", fix)
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type and demands anything: no empty or negative one does."""
    # Not isinstance: True is an int to that.
    if type(value) is not kind:
        return False
    if isinstance(value, int):
        return value >= 0
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and all(isinstance(text, str) and text.strip() for text in value)
