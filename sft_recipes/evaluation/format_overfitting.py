"""Does the model know its task, or only its training template?

The same conversations are asked under the training template, the base's own chat template where that is another one,
and the neutral variants of `format_variants.yaml`, of the tuned model and of its base. For a score of 0 or 1,
`format_gap` is its mean under the template less its mean over the variants, and `format_gap_did` the tuned model's gap
less the base's: a base model does better with some format, too. `memorised_share` counts answers under the template
that share a run of 50 tokens with a trained answer, `memorised_share_13` a run of 13.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml

from sft_recipes.data.chat_templates import ChatRenderer, begins_with_bos
from sft_recipes.evaluation.evaluator import Evaluation
from sft_recipes.evaluation.metrics import BINARY_METRICS
from sft_recipes.evaluation.training_rows import RUNS
from sft_recipes.messages import Example
from sft_recipes.statistics import Estimate, mean_of_differences, proportion_of

_FILE = Path(__file__).parent / "format_variants.yaml"
VARIANTS: Mapping[str, str] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
TEMPLATE, NATIVE = "template", "native"
MOST_WORST = 5

# The scores that gaps are taken of, by what their name adds to `format_gap`.
_SCORES = {"": "completion_rate", "_exact_match": "exact_match", "_adherence": "format_adherence"}
_SHOWN = (*_SCORES.values(), "template_leak")
# What a gate may name, and its estimate from one value per prompt. All are better when lower.
FORMAT_METRICS: Mapping[str, Callable[..., Estimate]] = {
    **{
        f"format_gap{kind}{score}": mean_of_differences
        for kind in ("", "_did")
        for score in _SCORES
    },
    **dict.fromkeys(
        ("leak_rate_on_template", "leak_rate_off_template", "response_shift", *RUNS), proportion_of
    ),
}

Answers = Mapping[str, Evaluation]
Values = dict[str, list[float]]
Questions = dict[str, tuple[ChatRenderer, Sequence[Example]]]


def measure_formats(models: Mapping[str, Answers], copied: Values) -> tuple[dict[str, Any], Values]:
    """Plain data for `metrics.json`, and one value per prompt for each of `FORMAT_METRICS` that can be known.

    `models` holds the answers of `tuned` and, where there is one, `base` by format, the same rows in each. `copied`:
    the values of `training_rows.memorised`, where training rows are known.
    """
    tuned, values = models["tuned"], _values(models) | copied
    rows = tuned[TEMPLATE].rows
    formats = {
        name: {
            model: {key: {**one[name].metrics, **one[name].flags}[key].as_json() for key in _SHOWN}
            for model, one in models.items()
        }
        for name in tuned
    }
    losses = [
        sum(gaps)
        for gaps in zip(*(values[f"format_gap{suffix}"] for suffix in _SCORES), strict=True)
    ]
    worst = sorted(
        (index for index, loss in enumerate(losses) if loss > 0), key=lambda index: -losses[index]
    )
    content = {
        "n": len(rows),
        "formats": formats,
        "indicators": {
            name: FORMAT_METRICS[name](found).as_json() for name, found in values.items()
        },
        "format_spread": {score: _spread(tuned, score) for score in _SCORES.values()},
        "worst": [
            {key: rows[index][key] for key in ("source", "row", "prompt", "reference")}
            | {"answers": {name: one.rows[index]["response"] for name, one in tuned.items()}}
            for index in worst[:MOST_WORST]
        ],
    }
    return content, values


def _values(models: Mapping[str, Answers]) -> Values:
    tuned, found = models["tuned"], Values()
    for suffix, score in _SCORES.items():
        gaps = found[f"format_gap{suffix}"] = _gaps(tuned, score)
        if "base" in models:
            found[f"format_gap_did{suffix}"] = list(map(sub, gaps, _gaps(models["base"], score)))
    leaks = {
        name: ["template_leak" in row["flags"] for row in one.rows] for name, one in tuned.items()
    }
    found["leak_rate_on_template"] = list(map(float, leaks.pop(TEMPLATE)))
    found["leak_rate_off_template"] = [fmean(row) for row in zip(*leaks.values(), strict=True)]
    found["response_shift"] = [
        fmean(_distance(a, b) for b in c) for a, *c in _columns(tuned, "response")
    ]
    return found


def format_questions(
    renderer: ChatRenderer, examples: Sequence[Example], native: str | None = None
) -> Questions:
    """The conversations to ask again, under the template and in every other format.

    `native` is the base's own chat template. Conversations with tools, for which the variants have no place, and those
    that `native` refuses are left out. An answer ends at whatever ends it under the training template or its own.
    """
    bos = "{{- bos_token -}}" if begins_with_bos(renderer.tokenizer) else ""
    templates = {NATIVE: native} if native and native != renderer.template_text else {}
    renderers = {TEMPLATE: renderer}
    for name, text in (templates | {name: bos + text for name, text in VARIANTS.items()}).items():
        tokenizer = copy.deepcopy(renderer.tokenizer)
        tokenizer.chat_template = text
        renderers[name] = ChatRenderer(tokenizer, renderer.chat_template_kwargs)
        renderers[name].stop_ids = tuple(
            dict.fromkeys([*renderer.stop_ids, *renderers[name].stop_ids])
        )
    asked = [example for example in examples if _has_a_place(example, renderers.values())]
    return {name: (one, asked) for name, one in renderers.items()}


def _has_a_place(example: Example, renderers: Iterable[ChatRenderer]) -> bool:
    if example.tools or any(
        one["role"] == "tool" or one.get("tool_calls") for one in example.messages
    ):
        return False
    try:
        return all(
            one.render(example.messages[:-1], add_generation_prompt=True) for one in renderers
        )
    except jinja2.TemplateError:
        return False


def _columns(answers: Answers, key: str) -> list[tuple[Any, ...]]:
    """For each prompt the value under the template, then those under the variants."""
    return list(
        zip(
            *([row[key] for row in answers[name].rows] for name in (TEMPLATE, *VARIANTS)),
            strict=True,
        )
    )


def _gaps(answers: Answers, score: str) -> list[float]:
    return [first - fmean(others) for first, *others in _columns(answers, BINARY_METRICS[score])]


def _spread(answers: Answers, score: str) -> float | None:
    means = [one.metrics[score].value for one in answers.values()]
    return (
        max(found) - min(found) if (found := [mean for mean in means if mean is not None]) else None
    )


def _distance(one: str, other: str) -> float:
    """1 - Jaccard overlap of the words of two texts; two texts without words are alike."""
    first, second = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return 1 - len(first & second) / len(first | second) if first | second else 0.0
