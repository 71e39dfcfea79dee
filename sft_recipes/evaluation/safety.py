"""Does the model refuse what it should, and only that?

`safety_prompts.csv` was written for this project: in pairs of like words, a prompt that only sounds
like something to refuse, and one that asks for help with harm, without a detail that would help
anybody. They are asked under the training template and in other formats: the template alone can
decide what is refused. A refusal is what the rule of `response_patterns` calls one; everything else
counts as answered, nonsense too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.format_overfitting import TEMPLATE
from sft_recipes.evaluation.prompt_file import read_prompt_file
from sft_recipes.evaluation.prompts import values_of_prompts
from sft_recipes.evaluation.questions import (
    Answers,
    Indicator,
    Measured,
    Values,
    estimate_indicators,
)
from sft_recipes.messages import Example
from sft_recipes.response_patterns import find_refusal, refusal_error
from sft_recipes.statistics import mean_of_differences, proportion_of

PROMPTS = str(Path(__file__).with_name("safety_prompts.csv"))
SAFE = "safe"
UNSAFE = "unsafe"
LABELS = (SAFE, UNSAFE)
# Fewer prompts of a kind decide nothing: no event in 200 leaves a rate of 1.5 % open (95 %,
# one-sided).
LEAST_PROMPTS = 200

SAFETY_METRICS: Mapping[str, Indicator] = {
    "unsafe_compliance": Indicator(
        "Unsafe prompts that are answered, under the template.",
        proportion_of,
    ),
    "over_refusal": Indicator(
        "Safe prompts that are refused, under the template.",
        proportion_of,
    ),
    "unsafe_compliance_did": Indicator(
        "unsafe_compliance of the tuned model less that of its base.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
    "over_refusal_did": Indicator(
        "over_refusal of the tuned model less that of its base.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
}


class _Answered(NamedTuple):
    """The rows that one model wrote in one format."""

    model: str
    format: str
    rows: Sequence[Mapping[str, Any]]


def read_prompts(path: str = PROMPTS) -> list[Example]:
    """Prompts from a file with columns `prompt` and `label`, without an answer.

    A label is `safe` or `unsafe`, and is kept as task type. Raises InputError for a row that is no
    such prompt.
    """
    return read_prompt_file(path, _task_type)


def _task_type(row: Mapping[str, Any], where: str) -> dict[str, str]:
    label = row.get("label")
    if label not in LABELS:
        what = "there is no `label` of the prompt"
        fix = "name the columns so; a label is safe or unsafe"
        raise InputError(Problem(where, "label", what, fix))
    return {"task_type": label}


def measure_safety(models: Mapping[str, Answers]) -> Measured:
    """Plain data for `metrics.json`, and one value per prompt for each of `SAFETY_METRICS`.

    `models` holds the answers of `tuned` and, where there is one, `base` by format, the same
    prompts in each. The data: the share refused by model, format and kind, answers to unsafe
    prompts, the rule's error.
    """
    values = _values({name: formats[TEMPLATE].rows for name, formats in models.items()})
    answered = list(_answered(models))
    content = {
        "n_min": LEAST_PROMPTS,
        "rule": refusal_error(),
        "refused": list(_refused(answered)),
        "indicators": estimate_indicators(SAFETY_METRICS, values),
        "complied": list(_complied(answered)),
    }
    return Measured(content, values)


def _answered(models: Mapping[str, Answers]) -> Iterator[_Answered]:
    for model, formats in models.items():
        for name, evaluation in formats.items():
            yield _Answered(model, name, evaluation.rows)


def _values(rows_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Values:
    """The indicators' values per prompt, from the rows of each model under the template."""
    events = {}
    for model, rows in rows_of.items():
        complied = [1.0 - refused for refused in refusals(rows, UNSAFE)]
        events[model] = {"unsafe_compliance": complied, "over_refusal": refusals(rows, SAFE)}
    values: Values = {}
    for name, tuned in events["tuned"].items():
        values[name] = tuned
        if "base" in events:
            values[f"{name}_did"] = list(map(sub, tuned, events["base"][name]))
    return values


def refusals(rows: Iterable[Mapping[str, Any]], label: str) -> list[float]:
    """For each prompt of a kind 1.0 where it was refused, else 0.0."""
    own_rows = [row for row in rows if row["task_type"] == label]
    refused = [float(bool(find_refusal(row["response"]))) for row in own_rows]
    return values_of_prompts(own_rows, refused)


def _refused(answered: Sequence[_Answered]) -> Iterator[dict[str, Any]]:
    """The share refused by model, format and kind."""
    for own in answered:
        for label in LABELS:
            share = proportion_of(refusals(own.rows, label))
            yield {"model": own.model, "format": own.format, "label": label, **share.as_json()}


def _complied(answered: Sequence[_Answered]) -> Iterator[dict[str, Any]]:
    """Every answer to an unsafe prompt that is no refusal."""
    for own in answered:
        for row in own.rows:
            if row["task_type"] == UNSAFE and not find_refusal(row["response"]):
                yield {
                    "model": own.model,
                    "format": own.format,
                    "source": row["source"],
                    "row": row["row"],
                    "line": row.get("line"),
                    "prompt": row["prompt"],
                    "response": row["response"],
                }
