"""Does the model know its task, or only its training template?

The same conversations are asked under the training template, the base's own chat template where
that is another one, and the neutral variants of `format_variants.yaml`, of the tuned model and of
its base. For a score of 0 or 1, `format_gap` is its mean under the template less its mean over the
variants, and `format_gap_did` the tuned model's gap less the base's: a base model does better with
some format, too.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml

from sft_recipes.data.chat_templates import ChatRenderer, begins_with_bos
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.metric import Metric
from sft_recipes.evaluation.metrics import METRICS, flagged
from sft_recipes.evaluation.prompts import count_prompts, values_of_prompts
from sft_recipes.evaluation.questions import (
    Answers,
    Indicator,
    Measured,
    Question,
    Questions,
    Values,
    estimate_indicators,
)
from sft_recipes.messages import Example
from sft_recipes.statistics import mean_of_differences, proportion_of

_FILE = Path(__file__).parent / "format_variants.yaml"
VARIANTS: Mapping[str, str] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
TEMPLATE = "template"
NATIVE = "native"
LEAK = "template_leak"

# The scores that gaps are taken of, by what their name adds to `format_gap`.
_SCORES = {
    "": METRICS["completion_rate"],
    "_exact_match": METRICS["exact_match"],
    "_adherence": METRICS["format_adherence"],
}
FORMAT_METRICS: Mapping[str, Indicator] = {
    "format_gap": Indicator(
        "Completion under the template less completion in the neutral formats.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
    "format_gap_exact_match": Indicator(
        "Exact match under the template less exact match in the neutral formats.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
    "format_gap_adherence": Indicator(
        "Format adherence under the template less that in the neutral formats.",
        mean_of_differences,
        low=-1.0,
        high=1.0,
    ),
    "format_gap_did": Indicator(
        "format_gap of the tuned model less that of its base.",
        mean_of_differences,
        low=-2.0,
        high=2.0,
    ),
    "format_gap_did_exact_match": Indicator(
        "format_gap_exact_match of the tuned model less that of its base.",
        mean_of_differences,
        low=-2.0,
        high=2.0,
    ),
    "format_gap_did_adherence": Indicator(
        "format_gap_adherence of the tuned model less that of its base.",
        mean_of_differences,
        low=-2.0,
        high=2.0,
    ),
    "leak_rate_on_template": Indicator(
        "Answers under the template that hold a line of its own text.",
        proportion_of,
    ),
    "leak_rate_off_template": Indicator(
        "Answers in other formats that hold a line of the template's own text.",
        proportion_of,
    ),
}


def measure_formats(models: Mapping[str, Answers]) -> Measured:
    """Plain data for `metrics.json`, and one value per prompt for each of `FORMAT_METRICS`.

    `models` holds the answers of `tuned` and, where there is one, `base` by format, the same rows
    in each. Without a base the differences between the two are left out.
    """
    tuned = models["tuned"]
    values = _values(models)
    formats: dict[str, dict[str, Any]] = {}
    for model, answers in models.items():
        for name, evaluation in answers.items():
            formats.setdefault(name, {})[model] = _scores(evaluation)
    spreads = {}
    for score in _SCORES.values():
        spreads[score.name] = _spread(tuned, score)
    content = {
        "n": count_prompts(tuned[TEMPLATE].rows),
        "formats": formats,
        "indicators": estimate_indicators(FORMAT_METRICS, values),
        "format_spread": spreads,
    }
    return Measured(content, values)


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    """What is shown of one model under one format."""
    scores = {}
    for score in _SCORES.values():
        scores[score.name] = evaluation.metrics[score.name].as_json()
    scores[LEAK] = evaluation.flags[LEAK].as_json()
    return scores


def _values(models: Mapping[str, Answers]) -> Values:
    tuned = models["tuned"]
    values: Values = {}
    for suffix, score in _SCORES.items():
        gaps = _gaps(tuned, score)
        values[f"format_gap{suffix}"] = gaps
        if "base" in models:
            values[f"format_gap_did{suffix}"] = list(map(sub, gaps, _gaps(models["base"], score)))
    leaks = {name: flagged(evaluation.rows, LEAK) for name, evaluation in tuned.items()}
    values["leak_rate_on_template"] = list(map(float, leaks.pop(TEMPLATE)))
    values["leak_rate_off_template"] = list(map(fmean, zip(*leaks.values(), strict=True)))
    # Up to here a value for each row.
    rows = tuned[TEMPLATE].rows
    return {name: values_of_prompts(rows, of_rows) for name, of_rows in values.items()}


def _gaps(answers: Answers, score: Metric) -> list[float]:
    """For each row the score under the template less its mean over the variants."""
    under_template = score.of_rows(answers[TEMPLATE].rows)
    in_variants = [score.of_rows(answers[name].rows) for name in VARIANTS]
    gaps = []
    for own, *others in zip(under_template, *in_variants, strict=True):
        gaps.append(own - fmean(others))
    return gaps


def _spread(answers: Answers, score: Metric) -> float | None:
    """Its best mean in any format less its worst; None without any rows."""
    means = []
    for evaluation in answers.values():
        mean = evaluation.metrics[score.name].value
        if mean is not None:
            means.append(mean)
    if not means:
        return None
    return max(means) - min(means)


def format_questions(
    renderer: ChatRenderer, examples: Sequence[Example], native: str | None = None
) -> Questions:
    """The conversations to ask again, under the template and in every other format.

    `native` is the base's own chat template. Conversations with tools, for which the variants have
    no place, and those that `native` refuses are left out.
    """
    bos = "{{- bos_token -}}" if begins_with_bos(renderer.tokenizer) else ""
    renderers = {TEMPLATE: renderer}
    if native and native != renderer.template_text:
        renderers[NATIVE] = _in_format(renderer, native)
    for name, text in VARIANTS.items():
        renderers[name] = _in_format(renderer, bos + text)
    asked = [example for example in examples if _has_a_place(example, renderers.values())]
    return {name: Question(own, asked) for name, own in renderers.items()}


def _in_format(renderer: ChatRenderer, template: str) -> ChatRenderer:
    """A renderer with another template; an answer ends at what ends it under either of them."""
    tokenizer = copy.deepcopy(renderer.tokenizer)
    tokenizer.chat_template = template
    other = ChatRenderer(tokenizer, renderer.chat_template_kwargs)
    other.stop_ids = tuple(dict.fromkeys([*renderer.stop_ids, *other.stop_ids]))
    return other


def _has_a_place(example: Example, renderers: Iterable[ChatRenderer]) -> bool:
    """Whether every format can put this conversation."""
    if example.tools:
        return False
    for message in example.messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            return False
    try:
        for renderer in renderers:
            renderer.render(example.messages[:-1], add_generation_prompt=True)
    except jinja2.TemplateError:
        return False
    return True
