"""What a row's `expected_format` demands of an answer, after the idea of IFEval: only what a program can verify.

    {"type": "json"}                              one JSON value and nothing else
    {"type": "bullets", "n": 3}                   exactly three lines that begin with -, * or a bullet
    {"min_words": 10, "max_words": 50, "keywords": ["Paris"], "starts_with": "Dear", "no_commas": true}

All members of a mapping have to hold, each of them is one constraint; null members count as absent, since files with
columns add them. Keywords and the like ignore case and match whole words.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.errors import InputError, Problem, suggest

_BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)


def is_json(text: str, prose_may_follow: bool = False) -> bool:
    """Whether the stripped text is one JSON value and nothing else."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return False
    return prose_may_follow or end == len(text.strip())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


# Each constraint: the type of its value, and whether a text without outer whitespace meets it.
_VERIFIERS: Mapping[str, tuple[type, Callable[[str, Any], bool]]] = {
    "json": (bool, lambda text, wanted: is_json(text) is wanted),
    "bullets": (int, lambda text, n: len(_BULLET.findall(text)) == n),
    "min_words": (int, lambda text, n: len(text.split()) >= n),
    "max_words": (int, lambda text, n: len(text.split()) <= n),
    "paragraphs": (int, lambda text, n: len(re.split(r"\n\s*\n", text)) == n),
    "keywords": (list, lambda text, words: all(_has_word(text, word) for word in words)),
    "forbidden": (list, lambda text, words: not any(_has_word(text, word) for word in words)),
    "choices": (list, lambda text, choices: text in choices),
    "regex": (str, lambda text, pattern: re.search(pattern, text) is not None),
    "starts_with": (str, lambda text, start: text.startswith(start)),
    "ends_with": (str, lambda text, end: text.endswith(end)),
    "lower_case": (bool, lambda text, wanted: (text == text.lower()) is wanted),
    "upper_case": (bool, lambda text, wanted: (text == text.upper()) is wanted),
    "no_commas": (bool, lambda text, wanted: ("," not in text) is wanted),
}
_VALUES = {bool: "true or false", int: "a whole number", list: "a list of texts", str: "a text"}


def constraints(expected: Mapping[str, Any] | None) -> dict[str, Any]:
    """Constraints by name; `{"type": "bullets", "n": 3}` is another spelling of `{"bullets": 3}`."""
    found = {name: value for name, value in (expected or {}).items() if value is not None}
    if "type" in found:
        kind = str(found.pop("type"))
        found[kind] = found.pop("n", None) if kind == "bullets" else True
    return found


def failed_share(text: str, expected: Mapping[str, Any] | None) -> float:
    """The share of the constraints of a checked `expected_format` that the text breaks; 0 without any."""
    given = constraints(expected)
    return sum(not _VERIFIERS[name][1](text.strip(), value) for name, value in given.items()) / max(
        len(given), 1
    )


def check_expected_format(expected: Any, where: str) -> None:
    """Raise InputError unless `expected` is None or a mapping of constraints that can be verified."""
    if expected is None:
        return
    given = constraints(expected) if isinstance(expected, Mapping) else {}
    faults = [fault for name, value in given.items() if (fault := _fault(name, value))]
    if not given:
        faults = [
            ("is no mapping of constraints", 'write constraints, as {"max_words": 50}, or null')
        ]
    if faults:
        shown = json.dumps(expected, ensure_ascii=False, default=str)
        raise InputError(
            [Problem(where, "expected_format", f"{shown} {what}", fix) for what, fix in faults]
        )


def _fault(name: str, value: Any) -> tuple[str, str] | None:
    """(what, fix) of a constraint that cannot be verified."""
    if name not in _VERIFIERS:
        return f"is not known: no constraint is called {name!r}", suggest(name, _VERIFIERS)
    kind: Any = _VERIFIERS[name][0]
    texts = value if isinstance(value, list) else [str(value)]
    # `type`: True is an int to isinstance. No false or empty value demands anything.
    is_text = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
    if type(value) is not kind or not is_text or (kind is int and value < 0):
        return f"does not fit: {name} is {_VALUES[kind]}, not {value!r}", "correct the value"
    if name == "regex":
        try:
            re.compile(str(value))
        except re.error as error:
            return (
                f"holds no regular expression: {error}",
                "correct it as Python's re module reads it",
            )
    return None
