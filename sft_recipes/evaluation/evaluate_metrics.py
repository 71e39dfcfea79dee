"""Our metrics in the shape of Hugging Face's `evaluate`: `load(NAME).compute(predictions=..., references=...)`.

The names are those of `report/metrics.yaml`, all but the ones that need more than texts. Lengths are counted in words.
Nothing is fetched. Needs the extra `metrics`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import evaluate
from datasets import Features, Value

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation.metrics import Answer, estimate, metric_values, score_row
from sft_recipes.report.evaluation_report import METRIC_TEXTS

NAMES = tuple(
    name for name in METRIC_TEXTS if name not in ("tool_call_exact", "reference_beyond_budget")
)


class RecipeMetric(evaluate.Metric):
    """The metric that `config_name` names.

    `compute` returns value, n, n_excluded, interval, unit and direction, and under `rows` the values of the answers. It
    takes `references` where the metric needs them, and may be given `instructions` and `stop_reasons` (all `eos`).
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in NAMES:
            fix = suggest(self.config_name, NAMES)
            raise InputError(
                Problem("evaluate", self.config_name, "there is no such metric of texts", fix)
            )
        text = METRIC_TEXTS[self.config_name]
        needs_references = _value(self.config_name, "a b c d e", None, "a") is None
        columns = ["predictions", *(["references"] if needs_references else [])]
        features = Features(dict.fromkeys(columns, Value("string")))
        return evaluate.MetricInfo(
            text.definition, "", inputs_description=f"\n{text.label}.", features=features
        )

    def _compute(self, predictions: Sequence[str], **columns: Sequence[str]) -> dict[str, Any]:
        defaults: dict[str, Any] = {"references": None, "instructions": "", "stop_reasons": "eos"}
        others = [
            columns.get(name) or [default] * len(predictions) for name, default in defaults.items()
        ]
        values = [_value(self.config_name, *row) for row in zip(predictions, *others, strict=True)]
        found = estimate(METRIC_TEXTS[self.config_name], values).as_json()
        return {**found, "unit": found["unit"].replace("tokens", "words"), "rows": values}


def _value(
    name: str, response: str, reference: str | None, instruction: str, stop_reason: str = "eos"
) -> Any:
    answer = Answer(instruction, reference, response, stop_reason)
    own, wanted = (len(text.split()) for text in (response, answer.expected))
    return metric_values(score_row(replace(answer, response_tokens=own, reference_tokens=wanted)))[
        name
    ]


def load(name: str) -> RecipeMetric:
    """The metric of that name; it keeps its texts in memory. Raises InputError if it is unknown."""
    return RecipeMetric(name, keep_in_memory=True)
