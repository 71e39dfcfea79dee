"""What one answer is worth, and what a list of answers is worth.

`score_row` gives the values of one row, `summarise` turns rows into the metrics of `report/metrics.yaml`. Rows are
plain dicts, so a saved `samples.jsonl` can be summarised again. No torch here.

Literal strings that the reference answer contains too are never held against an answer: a document that is meant to
have a heading "### Input:" does not leak the template.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.constraints import constraints, failed_share, is_json
from sft_recipes.report.evaluation_report import METRIC_TEXTS, MetricText
from sft_recipes.response_patterns import (
    find_next_turn,
    is_loop,
    is_repetitive,
    opener,
    pattern,
    repetition,
)
from sft_recipes.statistics import (
    CONFIDENCE,
    Estimate,
    bootstrap_estimate,
    mean_estimate,
    proportion_of,
)

# The metrics that are 0 or 1 in each row: their name over rows and in a row.
BINARY_METRICS = {
    "exact_match": "exact_match",
    "tool_call_exact": "tool_call_exact",
    "completion_rate": "complete",
    "format_adherence": "well_formed",
    "eos_rate": "eos",
}
# What is compared in pairs: those, and the scores between 0 and 1.
PAIRED_METRICS = (*BINARY_METRICS, "token_f1", "rouge_l", "format_adherence_graded")
ENDED = ("eos", "stop_string")
# Flags that mean an answer was not brought to its end; `unterminated` is judged from the stop reason.
INCOMPLETE = ("empty", "loop", "next_turn", "open_structure")

# These take 0.5 from the graded adherence (broken constraints that times their share), the other flags take 1.
HALF_WEIGHT = ("unterminated", "open_structure", "prompt_echo", "repetitive", "constraint_fail")

ECHO_WORDS = 6

_NO_MARKS = str.maketrans("", "", string.punctuation)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it is judged by.

    `instruction` is the last user message; `reference` and the token counts are None where there are none. What has no
    place in an answer: `control_tokens` anywhere, a line of `template_segments`, the template's own text, at the start
    of a line. `calls_match`: whether it makes the reference's tool calls, None where that has none.
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
    calls_match: bool | None = None

    @property
    def expected(self) -> str:
        """The reference, empty if there is none."""
        return self.reference or ""


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation folder's `samples.jsonl`. Raises InputError where one is no sample."""
    file, rows = folder / "samples.jsonl", []
    if not file.is_file():
        raise InputError(
            Problem(
                str(folder), "", "there is no samples.jsonl", "name a folder below `evaluations/`"
            )
        )
    # Not `splitlines`: answers may hold other line ends, which JSON leaves as they are.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
            is_sample = {"messages", "response"} <= rows[-1].keys()
        except (ValueError, AttributeError):
            is_sample = False
        if not is_sample:
            raise InputError(
                Problem(f"{file}:{number}", "", "is no sample of an evaluation", "evaluate again")
            )
    return rows


def score_row(answer: Answer) -> dict[str, Any]:
    """All values of one row; None where a value is not defined.

    `length_ratio` is in tokens, None without a reference; the `chapter_*` values count words as in the chapter.
    """
    flags = [name for name, is_raised in FLAGS.items() if is_raised(answer)]
    tokens, reference_tokens, budget = (
        answer.response_tokens,
        answer.reference_tokens,
        answer.max_new_tokens,
    )
    pair = answer.expected, answer.response
    compared = {
        "exact_match": answer.response.strip() == answer.expected.strip(),
        "token_f1": token_f1(*pair),
        "rouge_l": rouge_l(*pair),
        "chapter_length_ratio": chapter_length_ratio(*pair),
    }
    weights = dict.fromkeys(HALF_WEIGHT, 0.5)
    weights["constraint_fail"] *= failed_share(answer.response, answer.expected_format)
    repeats = [repetition(answer.response, n) for n in (2, 3, 4)]
    return {
        "reference": answer.reference,
        "response": answer.response,
        "stop_reason": answer.stop_reason,
        "flags": flags,
        **(compared if answer.reference is not None else dict.fromkeys(compared)),
        "tool_call_exact": answer.calls_match,
        "eos": answer.stop_reason == "eos",
        "complete": answer.stop_reason in ENDED and not set(INCOMPLETE) & set(flags),
        "well_formed": not flags,
        "format_adherence_graded": max(0.0, 1 - sum(weights.get(flag, 1.0) for flag in flags)),
        "response_tokens": tokens,
        "reference_tokens": reference_tokens,
        "length_ratio": tokens / reference_tokens
        if tokens is not None and reference_tokens
        else None,
        "rep_4": repeats[-1],
        "diversity": None
        if repeats[-1] is None
        else math.prod(1 - one for one in repeats if one is not None),
        "opener": opener(answer.response),
        "chapter_completion_rate": chapter_completion(answer.instruction, answer.response),
        "chapter_format_adherence": chapter_format(answer.response),
        # One token of the budget goes to the terminator.
        "reference_beyond_budget": None
        if budget is None or reference_tokens is None
        else reference_tokens >= budget,
    }


def token_f1(reference: str, response: str) -> float:
    """F1 of the words both texts share, each as often as it occurs in both; two texts without words are alike.

    As for SQuAD, lower case counts and neither ASCII punctuation nor English articles do.
    """
    texts = (text.lower().translate(_NO_MARKS) for text in (reference, response))
    first, second = (re.sub(r"\b(?:a|an|the)\b", " ", text).split() for text in texts)
    return _f1((Counter(first) & Counter(second)).total(), first, second)


def rouge_l(reference: str, response: str) -> float:
    r"""F1 of the longest common subsequence of words (`\w+`, case aside); two texts without words are alike."""
    first, second = (re.findall(r"\w+", text.casefold()) for text in (reference, response))
    return _f1(LCSseq.similarity(first, second), first, second)


def _f1(shared: int, first: Sequence[str], second: Sequence[str]) -> float:
    return 2 * shared / (len(first) + len(second)) if first or second else 1.0


def leaks_template(answer: Answer) -> bool:
    """Whether a line of the answer starts with a line of the template's own text."""
    markers = {
        line.strip() for segment in answer.template_segments for line in segment.splitlines()
    }
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
    if constraints(answer.expected_format).get("json"):
        return not is_json(text)
    return re.match(r'\{\s*"|\[\s*[{"]', text) is not None and not is_json(
        text, prose_may_follow=True
    )


def echoes(instruction: str, text: str) -> bool:
    """Whether the text starts with the whole instruction of at least 6 words."""
    return len(instruction.split()) >= ECHO_WORDS and text.strip().startswith(instruction.strip())


# Whether an answer earns the flag; an answer without any is well formed.
FLAGS: Mapping[str, Callable[[Answer], bool]] = {
    "empty": lambda a: not a.response.strip(),
    "special_token_leak": lambda a: any(
        t in a.response and t not in a.expected for t in a.control_tokens
    ),
    "template_leak": leaks_template,
    "next_turn": starts_next_turn,
    "loop": lambda a: is_loop(a.response, cut_short=a.stop_reason == "length"),
    "repetitive": lambda a: is_repetitive(a.response),
    "unterminated": lambda a: a.stop_reason not in ENDED,
    "open_structure": has_open_structure,
    "prompt_echo": lambda a: (
        echoes(a.instruction, a.response) and not echoes(a.instruction, a.expected)
    ),
    "constraint_fail": lambda a: failed_share(a.response, a.expected_format) > 0,
}


def chapter_length_ratio(reference: str, response: str) -> float:
    """The chapter's `length_ratio`: words of the answer over words of the reference, at least 1."""
    return len(response.split()) / max(len(reference.split()), 1)


def chapter_completion(instruction: str, response: str) -> float | None:
    """The chapter's `_assess_completion`: share of the instruction's words found in the answer, None without words."""
    keywords = instruction.lower().split()
    return (
        sum(keyword in response.lower() for keyword in keywords) / len(keywords)
        if keywords
        else None
    )


def chapter_format(response: str) -> float:
    """The chapter's `_assess_format`: 0 empty, .5 starts with `### `, else 1."""
    stripped = response.strip()
    return 0.0 if not stripped else 0.5 if stripped.startswith("### ") else 1.0


def _of_counts(measure: Callable[[Any], float]) -> Callable[..., Any]:
    """A statistic along an axis from one of how often each code 0, 1, 2 ... occurs."""
    return lambda codes, axis: np.apply_along_axis(
        lambda one: measure(np.bincount(one.astype(int))), axis, codes
    )


def _evenness(counts: Any) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log(shares)).sum()) / math.log(max(counts.sum(), 2)))


_STATISTICS: Mapping[str, Callable[..., Any]] = {
    "median": np.median,
    "geometric_mean": lambda ratios, axis: np.exp(np.log(ratios).mean(axis)),
    "ratio_of_sums": lambda answers, references, axis: answers.sum(axis) / references.sum(axis),
    "top_share": _of_counts(lambda counts: counts.max() / counts.sum()),
    "evenness": _of_counts(_evenness),
}
OF_COUNTS = ("top_share", "evenness")


def metric_values(row: Row) -> dict[str, Any]:
    """A scored row's value for each metric, None where the row does not count."""
    ratio = row["length_ratio"]
    return {
        **row,
        **{name: row.get(key) for name, key in BINARY_METRICS.items()},
        "length_ratio_finished": None if row["stop_reason"] == "length" else ratio,
        "length_ratio_geometric": ratio or None,
        "length_ratio_corpus": None
        if ratio is None
        else (row["response_tokens"], row["reference_tokens"]),
        "length_ratio_outside": None if ratio is None else not 0.5 <= ratio <= 2,
        **dict.fromkeys(("opener_top1", "opener_entropy"), row.get("opener")),
    }


def summarise(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Every metric over scored rows. Headlines first; length ratios; then the chapter's own."""
    values = [metric_values(row) for row in rows]
    return {
        name: estimate(metric, [row.get(name) for row in values])
        for name, metric in METRIC_TEXTS.items()
    }


def estimate(metric: MetricText, values: Sequence[Any], confidence: float = CONFIDENCE) -> Estimate:
    """The metric's statistic over the rows' values (`metric_values`), None excluded."""
    if metric.statistic == "share":
        found = proportion_of(values, confidence=confidence)
    elif metric.statistic == "mean":
        found = mean_estimate(values, unit=metric.unit, confidence=confidence)
    else:
        present = [value for value in values if value is not None]
        of_counts, statistic = metric.statistic in OF_COUNTS, _STATISTICS[metric.statistic]
        columns = (
            np.unique(present, return_inverse=True)[1]
            if of_counts
            else np.asarray(present, dtype=float).T
        )
        settings: dict[str, Any] = {
            "unit": metric.unit,
            "centred": of_counts,
            "confidence": confidence,
        }
        found = bootstrap_estimate(*np.atleast_2d(columns), statistic=statistic, **settings)
    excluded = len(values) - found.n
    return replace(
        found, n_excluded=excluded, unit=metric.unit, higher_is_better=metric.higher_is_better
    )


def summarise_flags(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of rows with each flag."""
    return {
        flag: proportion_of([flag in row["flags"] for row in rows], higher_is_better=False)
        for flag in FLAGS
    }
