"""What one answer is worth, and what a list of answers is worth.

`score_row` gives the values of one row, `summarise` turns rows into the metrics of `report/metrics.yaml`. Rows are
plain dicts, so a saved `samples.jsonl` can be summarised again. No torch here.

Literal strings that the reference answer contains too are never held against an answer: a document that is meant to
have a heading "### Input:" does not leak the template.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sft_recipes.errors import InputError, Problem
from sft_recipes.report.evaluation_report import METRIC_TEXTS, MetricText
from sft_recipes.response_patterns import find_next_turn, is_loop, is_repetitive, pattern
from sft_recipes.statistics import CONFIDENCE, Estimate, bootstrap_estimate, mean_estimate, proportion_of

# The metrics that are 0 or 1 in each row, and so are compared in pairs: their name over rows and in a row.
BINARY_METRICS = {
    "exact_match": "exact_match",
    "completion_rate": "complete",
    "format_adherence": "well_formed",
    "eos_rate": "eos",
}
ENDED = ("eos", "stop_string")
# Flags that mean an answer was not brought to its end; `unterminated` is judged from the stop reason.
INCOMPLETE = ("empty", "loop", "next_turn", "open_structure")

ECHO_WORDS = 6

_BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it is judged by.

    `instruction` is the last user message; `reference` and the token counts are None where there are none. What has no
    place in an answer: `control_tokens` anywhere, a line of `template_segments`, the template's own text, at the start
    of a line.
    """

    instruction: str
    reference: str | None
    response: str
    stop_reason: str
    expected_format: Mapping[str, Any] | None = None
    control_tokens: Sequence[str] = ()
    template_segments: Sequence[str] = ()
    response_tokens: int | None = None
    reference_tokens: int | None = None
    max_new_tokens: int | None = None

    @property
    def expected(self) -> str:
        """The reference, empty if there is none."""
        return self.reference or ""


def score_row(answer: Answer) -> dict[str, Any]:
    """All values of one row; None where a value is not defined.

    `length_ratio` is in tokens, None without a reference; the `chapter_*` values count words as in the chapter.
    """
    flags = [name for name, is_raised in FLAGS.items() if is_raised(answer)]
    tokens, reference_tokens, budget = answer.response_tokens, answer.reference_tokens, answer.max_new_tokens
    has_reference = answer.reference is not None
    return {
        "reference": answer.reference,
        "response": answer.response,
        "stop_reason": answer.stop_reason,
        "flags": flags,
        "exact_match": answer.response.strip() == answer.expected.strip() if has_reference else None,
        "eos": answer.stop_reason == "eos",
        "complete": answer.stop_reason in ENDED and not set(INCOMPLETE) & set(flags),
        "well_formed": not flags,
        "response_tokens": tokens,
        "reference_tokens": reference_tokens,
        "length_ratio": tokens / reference_tokens if tokens is not None and reference_tokens else None,
        "chapter_length_ratio": chapter_length_ratio(answer.expected, answer.response) if has_reference else None,
        "chapter_completion_rate": chapter_completion(answer.instruction, answer.response),
        "chapter_format_adherence": chapter_format(answer.response),
        # One token of the budget goes to the terminator.
        "reference_beyond_budget": None if budget is None or reference_tokens is None else reference_tokens >= budget,
    }


def leaks_template(answer: Answer) -> bool:
    """Whether a line of the answer starts with a line of the template's own text."""
    markers = {line.strip() for segment in answer.template_segments for line in segment.splitlines()}
    for marker in markers:
        if len(marker) >= 3 and any(map(str.isalnum, marker)):
            # A marker that ends in a letter has to end a word: "user" is not the start of "users".
            boundary = r"(?!\w)" if marker[-1].isalnum() else ""
            line = re.compile(rf"^[ \t]*{re.escape(marker)}{boundary}", re.MULTILINE)
            if line.search(answer.response) and not line.search(answer.expected):
                return True
    return False


def starts_next_turn(answer: Answer) -> bool:
    """Whether a user's header follows some answer text, unless such lines were asked for or the reference has them."""
    is_expected = pattern("user_header").search(answer.expected) is not None
    return not is_expected and bool(find_next_turn(answer.response, answer.instruction))


def has_open_structure(answer: Answer) -> bool:
    """An unclosed code fence, or JSON that does not parse where JSON was expected or begun."""
    text = answer.response.strip()
    if text.count("```") % 2:
        return True
    if (answer.expected_format or {}).get("type") == "json":
        return not is_json(text)
    return re.match(r'\{\s*"|\[\s*[{"]', text) is not None and not is_json(text, prose_may_follow=True)


def is_json(text: str, prose_may_follow: bool = False) -> bool:
    """Whether the stripped text is one JSON value and nothing else."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return False
    return prose_may_follow or end == len(text.strip())


def echoes(instruction: str, text: str) -> bool:
    """Whether the text starts with the whole instruction of at least 6 words."""
    return len(instruction.split()) >= ECHO_WORDS and text.strip().startswith(instruction.strip())


def meets(text: str, expected: Mapping[str, Any]) -> bool:
    """Whether the text has the format of an `expected_format` that `check_expected_format` accepted."""
    return is_json(text) if expected["type"] == "json" else len(_BULLET.findall(text)) == expected["n"]


# Whether an answer earns the flag; an answer without any is well formed.
FLAGS: Mapping[str, Callable[[Answer], bool]] = {
    "empty": lambda a: not a.response.strip(),
    "special_token_leak": lambda a: any(t in a.response and t not in a.expected for t in a.control_tokens),
    "template_leak": leaks_template,
    "next_turn": starts_next_turn,
    "loop": lambda a: is_loop(a.response, cut_short=a.stop_reason == "length"),
    "repetitive": lambda a: is_repetitive(a.response),
    "unterminated": lambda a: a.stop_reason not in ENDED,
    "open_structure": has_open_structure,
    "prompt_echo": lambda a: echoes(a.instruction, a.response) and not echoes(a.instruction, a.expected),
    "constraint_fail": lambda a: a.expected_format is not None and not meets(a.response, a.expected_format),
}


def check_expected_format(expected: Any, where: str) -> None:
    """Raise InputError unless `expected` is None, `{"type": "json"}` or `{"type": "bullets", "n": count}`."""
    if expected is None:
        return
    kind, count = (expected.get("type"), expected.get("n")) if isinstance(expected, Mapping) else (None, None)
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


_STATISTICS: Mapping[str, Callable[..., Any]] = {
    "median": np.median,
    "geometric_mean": lambda ratios, axis: np.exp(np.log(ratios).mean(axis)),
    "ratio_of_sums": lambda answers, references, axis: answers.sum(axis) / references.sum(axis),
}


def metric_values(row: Row) -> dict[str, Any]:
    """A scored row's value for each metric, None where the row does not count."""
    ratio = row["length_ratio"]
    return {
        **row,
        **{name: row[key] for name, key in BINARY_METRICS.items()},
        "length_ratio_finished": None if row["stop_reason"] == "length" else ratio,
        "length_ratio_geometric": ratio or None,
        "length_ratio_corpus": None if ratio is None else (row["response_tokens"], row["reference_tokens"]),
        "length_ratio_outside": None if ratio is None else not 0.5 <= ratio <= 2,
    }


def summarise(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Every metric over scored rows. Headlines first; length ratios; then the chapter's own."""
    values = [metric_values(row) for row in rows]
    return {name: estimate(metric, [row[name] for row in values]) for name, metric in METRIC_TEXTS.items()}


def estimate(metric: MetricText, values: Sequence[Any], confidence: float = CONFIDENCE) -> Estimate:
    """The metric's statistic over the rows' values (`metric_values`), None excluded."""
    better = metric.higher_is_better
    if metric.statistic == "share":
        return proportion_of(values, higher_is_better=better, confidence=confidence)
    if metric.statistic == "mean":
        return mean_estimate(values, unit=metric.unit, higher_is_better=better, confidence=confidence)
    present = [value for value in values if value is not None]
    columns = np.atleast_2d(np.asarray(present, dtype=float).T)
    found = bootstrap_estimate(
        *columns, statistic=_STATISTICS[metric.statistic], unit=metric.unit, confidence=confidence
    )
    return replace(found, n_excluded=len(values) - len(present))


def summarise_flags(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of rows with each flag."""
    return {flag: proportion_of([flag in row["flags"] for row in rows], higher_is_better=False) for flag in FLAGS}
