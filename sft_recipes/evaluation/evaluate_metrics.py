"""Our metrics in the shape of Hugging Face's `evaluate`.

`load(NAME).compute(predictions=..., references=...)`, with the names of `metrics.METRICS`, all but
the ones that need more than texts. Lengths are counted in words. Nothing is fetched. Needs the
extra `metrics`.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import evaluate
from datasets import Features, Value

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.metric import Metric
from sft_recipes.evaluation.metrics import METRICS

_NEED_MORE_THAN_TEXTS = ("tool_call_exact", "reference_beyond_budget")
NAMES = tuple(name for name in METRICS if name not in _NEED_MORE_THAN_TEXTS)
_LONG_ENOUGH = "five words have an opener"


class RecipeMetric(evaluate.Metric):
    """The metric that `config_name` names.

    `compute` returns value, n, n_excluded, interval, unit and direction, and under `rows` the
    values of the answers. It takes `references` where the metric needs them, and may be given
    `instructions` and `stop_reasons` (all `eos`).
    """

    @property
    def _metric(self) -> Metric:
        if self.config_name not in NAMES:
            what = "there is no such metric of texts"
            fix = suggest(self.config_name, NAMES)
            raise InputError(Problem("evaluate", self.config_name, what, fix))
        return METRICS[self.config_name]

    def _info(self) -> evaluate.MetricInfo:
        metric = self._metric
        columns = ["predictions"]
        if metric.measure(_answer(_LONG_ENOUGH, None, "a question")) is None:
            columns.append("references")
        return evaluate.MetricInfo(
            metric.definition,
            "",
            inputs_description=f"\n{metric.label}.",
            features=Features(dict.fromkeys(columns, Value("string"))),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | None = None,
        instructions: Sequence[str] | None = None,
        stop_reasons: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        n = len(predictions)
        answers = map(
            _answer,
            predictions,
            references or repeat(None, n),
            instructions or repeat("", n),
            stop_reasons or repeat("eos", n),
        )
        values = list(map(self._metric.measure, answers))
        content = self._metric.estimate(values).as_json()
        return {**content, "unit": content["unit"].replace("tokens", "words"), "rows": values}


def _answer(
    response: str, reference: str | None, instruction: str, stop_reason: str = "eos"
) -> Answer:
    """An answer whose lengths are counted in words."""
    return Answer(
        instruction,
        reference,
        response,
        stop_reason,
        response_tokens=len(response.split()),
        reference_tokens=len((reference or "").split()),
    )


def load(name: str) -> RecipeMetric:
    """The metric of that name; it keeps its texts in memory. Raises InputError if it is unknown."""
    return RecipeMetric(name, keep_in_memory=True)
