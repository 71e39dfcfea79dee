"""Every metric of an evaluation, one record each: this table is the only place that knows them.

A record says what a metric is called, what it measures, its value for one answer, between which
ends that lies, and how the values of prompts (`prompts.py`) become one number with its interval.
The evaluator, the report, the gate, the training callback and the model card read it from here or
from `metrics.json`, which carries the words along.

To add one, add a record to `METRICS`. Rows are plain dicts, so that a saved `samples.jsonl` can be
summarised again; a row without a metric's column has no value for it. No torch here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sft_recipes.evaluation.answer import FLAGS, Answer
from sft_recipes.evaluation.metric import (
    BUDGET,
    CHAPTER,
    LENGTH,
    REPETITION,
    Measure,
    Metric,
    evenness,
    mean,
    median,
    share,
)
from sft_recipes.evaluation.prompts import Row, values_of_prompts
from sft_recipes.evaluation.scores import (
    chapter_completion,
    chapter_format,
    chapter_length_ratio,
    rouge_l,
    token_f1,
)
from sft_recipes.response_patterns import opener, repetition
from sft_recipes.statistics import (
    CONFIDENCE,
    Estimate,
    proportion_of,
)


def against_reference(score: Callable[[str, str], Any]) -> Measure:
    """A measure of reference and response; an answer without a reference has no value."""

    def measure(answer: Answer) -> Any:
        if answer.reference is None:
            return None
        return score(answer.reference, answer.response)

    return measure


def is_exact(reference: str, response: str) -> bool:
    """Equal, outer white space aside."""
    return response.strip() == reference.strip()


def length_ratio(answer: Answer) -> float | None:
    """Tokens of the answer over tokens of the reference."""
    if answer.response_tokens is None or not answer.reference_tokens:
        return None
    return answer.response_tokens / answer.reference_tokens


def is_reference_too_long(answer: Answer) -> bool | None:
    """Whether the reference exceeds the token budget, of which the terminator takes one."""
    if answer.max_new_tokens is None or answer.reference_tokens is None:
        return None
    return answer.reference_tokens >= answer.max_new_tokens


_TABLE = (
    Metric(
        name="exact_match",
        label="Exact match",
        definition="Answers equal to the reference, outer whitespace aside.",
        measure=against_reference(is_exact),
        statistic=share,
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="token_f1",
        label="Token F1",
        definition="F1 of the words shared with the reference, by count; case, punctuation and "
        "English articles aside.",
        measure=against_reference(token_f1),
        statistic=share,
        unit="score 0 to 1",
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="rouge_l",
        label="ROUGE-L",
        definition="F1 of the longest subsequence of words shared with the reference, case aside.",
        measure=against_reference(rouge_l),
        statistic=share,
        unit="score 0 to 1",
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="tool_call_exact",
        label="Tool calls exact",
        definition="Answers that make the reference's tool calls, with the same names and "
        "arguments, and no others.",
        measure=lambda answer: answer.calls_match,
        statistic=share,
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="completion_rate",
        label="Completion rate",
        definition="Answers that end by themselves, are not empty, do not loop and leave nothing "
        "open.",
        measure=lambda answer: answer.is_complete,
        statistic=share,
        column="complete",
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="format_adherence",
        label="Format adherence",
        definition="Answers without any flag.",
        measure=lambda answer: not answer.flags,
        statistic=share,
        column="well_formed",
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="eos_rate",
        label="EOS rate",
        definition="Answers that end with a stop token within the token budget.",
        measure=lambda answer: answer.stop_reason == "eos",
        statistic=share,
        column="eos",
        higher_is_better=True,
        headline=True,
    ),
    Metric(
        name="length_ratio",
        label="Length ratio, median",
        definition="Tokens of the answer over tokens of the reference.",
        measure=length_ratio,
        statistic=median,
        unit="tokens / reference tokens",
        high=math.inf,
        group=LENGTH,
    ),
    Metric(
        name="rep_4",
        label="Repetition, rep-4",
        definition="Share of the 4-grams of words inside an answer that are repeats, mean.",
        measure=lambda answer: repetition(answer.response),
        statistic=share,
        unit="score 0 to 1",
        higher_is_better=False,
        group=REPETITION,
    ),
    Metric(
        name="opener_entropy",
        label="Evenness of openers",
        definition="Entropy of the first four words over that of n different ones: 0 all alike, "
        "1 all different; answers of four words or fewer excluded.",
        measure=lambda answer: opener(answer.response),
        statistic=evenness,
        column="opener",
        unit="entropy / ln n",
        # Texts have no mean; a model that decodes greedily begins all answers to a prompt alike.
        combine=itemgetter(0),
        group=REPETITION,
    ),
    Metric(
        name="chapter_length_ratio",
        label="Chapter: length ratio",
        definition="Mean ratio in words.",
        measure=against_reference(chapter_length_ratio),
        statistic=mean,
        unit="words / reference words",
        high=math.inf,
        group=CHAPTER,
    ),
    Metric(
        name="chapter_completion_rate",
        label="Chapter: completion rate",
        definition="Share of the instruction's words in the answer.",
        measure=lambda answer: chapter_completion(answer.instruction, answer.response),
        statistic=mean,
        unit="keyword share",
        higher_is_better=True,
        group=CHAPTER,
    ),
    Metric(
        name="chapter_format_adherence",
        label="Chapter: format adherence",
        definition="0 empty, 0.5 starts with ###, else 1.",
        measure=lambda answer: chapter_format(answer.response),
        statistic=mean,
        unit="score 0, 0.5, 1",
        higher_is_better=True,
        group=CHAPTER,
    ),
    Metric(
        name="reference_beyond_budget",
        label="References beyond budget",
        definition="References too long for max_new_tokens.",
        measure=is_reference_too_long,
        statistic=share,
        group=BUDGET,
    ),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
HEADLINES = [metric for metric in _TABLE if metric.headline]


def score_row(answer: Answer) -> dict[str, Any]:
    """All values of one row: what was answered, its flags, and each metric under its column.

    None where a value is not defined.
    """
    row: dict[str, Any] = {
        "reference": answer.reference,
        "response": answer.response,
        "stop_reason": answer.stop_reason,
        "flags": answer.flags,
        "response_tokens": answer.response_tokens,
        "reference_tokens": answer.reference_tokens,
    }
    for metric in METRICS.values():
        row[metric.key] = metric.measure(answer)
    return row


def summarise(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Every metric over the prompts of scored rows, in the order of the table."""
    return {name: metric.estimate(metric.of_prompts(rows)) for name, metric in METRICS.items()}


def summarise_flags(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The share of prompts whose answer has each flag."""
    return {name: flag_share(flagged_prompts(rows, name)) for name in FLAGS}


def flagged(rows: Sequence[Row], flag: str) -> list[bool]:
    """Whether each row has the flag."""
    return [flag in row["flags"] for row in rows]


def flagged_prompts(rows: Sequence[Row], flag: str) -> list[float]:
    """Of each prompt's rows the share that has the flag."""
    return values_of_prompts(rows, flagged(rows, flag))


def flag_share(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The share of prompts with a flag: lower is better."""
    return proportion_of(values, higher_is_better=False, confidence=confidence)
