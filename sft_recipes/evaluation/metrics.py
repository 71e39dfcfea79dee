"""What one answer is worth, and what a list of answers is worth.

`score_row` gives the values of one row; `summarise` and the functions beside it turn rows into estimates. Rows are
plain dicts, so a saved `samples.jsonl` can be summarised again. No torch here.

Literal strings that the reference answer contains too are never held against an answer: a document that is meant to
have a heading "### Input:" does not leak the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.statistics import Estimate, bootstrap_estimate, mean_estimate, proportion_of

FLAGS = (
    "empty",
    "special_token_leak",
    "template_leak",
    "next_turn",
    "loop",
    "repetitive",
    "unterminated",
    "open_structure",
    "prompt_echo",
    "constraint_fail",
)
# The metrics that are 0 or 1 in each row, and so are compared in pairs: their name over rows and in a row.
BINARY_METRICS = {
    "exact_match": "exact_match",
    "completion_rate": "complete",
    "format_adherence": "well_formed",
    "eos_rate": "eos",
}
# Flags that mean an answer was not brought to its end; `unterminated` is judged from the stop reason.
INCOMPLETE = ("empty", "loop", "next_turn", "open_structure")

LOOP_PERIOD, LOOP_COPIES, LOOP_WORDS, LOOP_CHARACTERS = 64, 3, 24, 96
REPETITIVE_WORDS, REPETITIVE_SHARE = 50, 0.5
ECHO_WORDS = 6

_USER_HEADER = re.compile(
    r"^[ \t]*(?:<[^>\n]{1,32}>[ \t]*(?:user|human)\b|[#*\[ \t]*(?:user|human|instruction|question|q)[\]*]*[ \t]*:)",
    re.IGNORECASE | re.MULTILINE,
)
_ASKS_FOR_TURNS = re.compile(
    r"\b(?:dialog(?:ue)?s?|conversations?|chats?|quiz(?:zes)?|faqs?|interviews?|questions|q ?& ?a|transcripts?)\b",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Leaks:
    """Literal strings that have no place in an answer.

    `control_tokens` anywhere; each line of the template's own text `segments` at the start of a line.
    """

    control_tokens: Sequence[str] = ()
    segments: Sequence[str] = ()


def score_row(
    *,
    instruction: str,
    reference: str | None,
    response: str,
    stop_reason: str,
    expected_format: Mapping[str, Any] | None = None,
    leaks: Leaks | None = None,
    response_tokens: int | None = None,
    reference_tokens: int | None = None,
) -> dict[str, Any]:
    """All values of one row; None where a value is not defined. `instruction` is the last user message.

    `length_ratio` is in tokens, None without a reference; the `chapter_*` values count words as in the chapter.
    """
    flags = find_flags(
        instruction=instruction,
        reference=reference or "",
        response=response,
        stop_reason=stop_reason,
        expected_format=expected_format,
        leaks=leaks or Leaks(),
    )
    ended = stop_reason in ("eos", "stop_string")
    return {
        "flags": flags,
        "exact_match": None if reference is None else response.strip() == reference.strip(),
        "eos": stop_reason == "eos",
        "complete": ended and not any(flag in flags for flag in INCOMPLETE),
        "well_formed": not flags,
        "response_tokens": response_tokens,
        "reference_tokens": reference_tokens,
        "length_ratio": response_tokens / reference_tokens
        if response_tokens is not None and reference_tokens
        else None,
        "chapter_length_ratio": None if reference is None else chapter_length_ratio(reference, response),
        "chapter_completion_rate": chapter_completion(instruction, response),
        "chapter_format_adherence": chapter_format(response),
    }


def find_flags(
    *,
    instruction: str,
    reference: str,
    response: str,
    stop_reason: str,
    expected_format: Mapping[str, Any] | None,
    leaks: Leaks,
) -> list[str]:
    """The flags of `FLAGS` that this answer earns, in that order."""
    expects_json = expected_format is not None and expected_format.get("type") == "json"
    raised = {
        "empty": not response.strip(),
        "special_token_leak": any(token in response and token not in reference for token in leaks.control_tokens),
        "template_leak": leaks_template(response, reference, leaks.segments),
        "next_turn": starts_next_turn(instruction, reference, response),
        "loop": is_loop(response, cut_short=stop_reason == "length"),
        "repetitive": is_repetitive(response),
        "unterminated": stop_reason not in ("eos", "stop_string"),
        "open_structure": has_open_structure(response, expects_json),
        "prompt_echo": echoes(instruction, response) and not echoes(instruction, reference),
        "constraint_fail": expected_format is not None and not meets(response, expected_format),
    }
    return [flag for flag in FLAGS if raised[flag]]


def leaks_template(response: str, reference: str, segments: Sequence[str]) -> bool:
    """Whether a line of the answer starts with a line of the template's own text."""
    markers = {line.strip() for segment in segments for line in segment.splitlines()}
    markers = {marker for marker in markers if len(marker) >= 3 and any(map(str.isalnum, marker))}
    return any(_starts_a_line(marker, response) and not _starts_a_line(marker, reference) for marker in sorted(markers))


def _starts_a_line(marker: str, text: str) -> bool:
    # A marker that ends in a letter has to end a word: "user" is not the start of "users".
    boundary = r"(?!\w)" if marker[-1].isalnum() else ""
    return re.search(rf"^[ \t]*{re.escape(marker)}{boundary}", text, re.MULTILINE) is not None


def starts_next_turn(instruction: str, reference: str, response: str) -> bool:
    """Whether a user's header follows some answer text, unless a dialogue, quiz or the like was asked for."""
    if _ASKS_FOR_TURNS.search(instruction) or _USER_HEADER.search(reference):
        return False
    return any(response[: header.start()].strip() for header in _USER_HEADER.finditer(response))


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
    for period in range(1, min(LOOP_PERIOD, len(units) // LOOP_COPIES) + 1):
        length = period
        while length < len(units) and units[-1 - length] == units[-1 - length + period]:
            length += 1
        if length >= max(span, LOOP_COPIES * period):
            return True
    return False


def repeated_share(text: str, n: int = 4) -> float | None:
    """rep-n: 1 - distinct / all word n-grams, None for fewer than n words."""
    words = text.casefold().split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def is_repetitive(text: str) -> bool:
    """At least 50 words of which half or more of the 4-grams are repeats."""
    return len(text.split()) >= REPETITIVE_WORDS and (repeated_share(text) or 0.0) >= REPETITIVE_SHARE


def has_open_structure(text: str, expects_json: bool = False) -> bool:
    """An unclosed code fence, or JSON that does not parse where JSON was expected or begun."""
    stripped = text.strip()
    if stripped.count("```") % 2:
        return True
    if expects_json:
        return not is_json(stripped)
    if not re.match(r'\{\s*"|\[\s*[{"]', stripped):
        return False
    try:
        json.JSONDecoder().raw_decode(stripped)  # prose may follow it
    except json.JSONDecodeError:
        return True
    return False


def is_json(text: str) -> bool:
    """Whether the stripped text is one JSON value and nothing else."""
    try:
        json.loads(text.strip())
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def echoes(instruction: str, text: str) -> bool:
    """Whether the text starts with the whole instruction of at least 6 words."""
    return len(instruction.split()) >= ECHO_WORDS and text.strip().startswith(instruction.strip())


def meets(text: str, expected: Mapping[str, Any]) -> bool:
    """Whether the text has the format of an `expected_format` that `check_expected_format` accepted."""
    if expected["type"] == "json":
        return is_json(text)
    return len(_BULLET.findall(text)) == expected["n"]


def check_expected_format(expected: Any, where: str) -> None:
    """Raise InputError unless `expected` is None, `{"type": "json"}` or `{"type": "bullets", "n": count}`."""
    if expected is None:
        return
    kind = expected.get("type") if isinstance(expected, Mapping) else None
    count = expected.get("n") if isinstance(expected, Mapping) else None
    if kind == "json" or (kind == "bullets" and isinstance(count, int) and not isinstance(count, bool) and count > 0):
        return
    fix = 'use {"type": "json"}, {"type": "bullets", "n": 3} or null'
    raise InputError(Problem(where, "expected_format", f"{json.dumps(expected, default=str)} is not known", fix))


def chapter_length_ratio(reference: str, response: str) -> float:
    """The chapter's `length_ratio`: words of the answer over words of the reference, at least 1."""
    return len(response.split()) / max(len(reference.split()), 1)


def chapter_completion(instruction: str, response: str) -> float | None:
    """The chapter's `_assess_completion`: share of the instruction's words found in the answer, None without words."""
    keywords = instruction.lower().split()
    return sum(keyword in response.lower() for keyword in keywords) / len(keywords) if keywords else None


def chapter_format(response: str) -> float:
    """The chapter's `_assess_format`: 0 empty, .5 starts with `### `, else 1."""
    stripped = response.strip()
    return 0.0 if not stripped else 0.5 if stripped.startswith("### ") else 1.0


Rows = Sequence[Mapping[str, Any]]


def summarise(rows: Rows) -> dict[str, Estimate]:
    """Every metric over scored rows. Headlines first; length ratios; then the chapter's own."""
    return {
        **{name: proportion_of(_column(rows, key), higher_is_better=True) for name, key in BINARY_METRICS.items()},
        **_length_metrics(rows),
        "chapter_length_ratio": mean_estimate(_column(rows, "chapter_length_ratio"), unit="words / reference words"),
        "chapter_completion_rate": mean_estimate(
            _column(rows, "chapter_completion_rate"), unit="keyword share", higher_is_better=True
        ),
        "chapter_format_adherence": mean_estimate(
            _column(rows, "chapter_format_adherence"), unit="score 0, 0.5, 1", higher_is_better=True
        ),
    }


def summarise_flags(rows: Rows) -> dict[str, Estimate]:
    """The share of rows with each flag."""
    return {flag: proportion_of([flag in row["flags"] for row in rows], higher_is_better=False) for flag in FLAGS}


def _length_metrics(rows: Rows) -> dict[str, Estimate]:
    import numpy as np

    unit = "tokens / reference tokens"
    present = [row for row in rows if row["length_ratio"] is not None]
    ratios = [row["length_ratio"] for row in present]
    finished = [row["length_ratio"] for row in present if row["stop_reason"] != "length"]
    positive = [ratio for ratio in ratios if ratio > 0]

    def geometric_mean(values: Any, axis: int) -> Any:
        return np.exp(np.mean(np.log(values), axis=axis))

    def corpus_ratio(responses: Any, references: Any, axis: int) -> Any:
        return np.sum(responses, axis=axis) / np.sum(references, axis=axis)

    def estimate(*samples: Sequence[float], statistic: Any) -> Estimate:
        return bootstrap_estimate(*samples, statistic=statistic, unit=unit, n_excluded=len(rows) - len(samples[0]))

    tokens = [[row[name] for row in present] for name in ("response_tokens", "reference_tokens")]
    outside = [None if row["length_ratio"] is None else not 0.5 <= row["length_ratio"] <= 2 for row in rows]
    return {
        "length_ratio": estimate(ratios, statistic=np.median),
        "length_ratio_finished": estimate(finished, statistic=np.median),
        "length_ratio_geometric": estimate(positive, statistic=geometric_mean),
        "length_ratio_corpus": estimate(*tokens, statistic=corpus_ratio),
        "length_ratio_outside": proportion_of(outside, higher_is_better=False),
    }


def _column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]
