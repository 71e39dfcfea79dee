"""What a model card says, as records, and its two parts that programs read.

Metadata is YAML, so it is written by the YAML library; code is Python, so texts in it are literals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, NamedTuple

import yaml

from sft_recipes.release.stages import Stage
from sft_recipes.report.number_texts import sentence, spaced

_DIGITS = 6  # of a metric


class Line(NamedTuple):
    """One line of a table of two columns; a value of None is "not recorded"."""

    label: str
    value: Any


@dataclass(frozen=True)
class Score:
    """One metric of an evaluation. `estimate` and `difference` to the base are in words; None where there is none."""

    metric: str
    label: str
    definition: str | None
    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None
    estimate: str
    difference: str | None


@dataclass(frozen=True)
class ScoredEvaluation:
    """One evaluation of the run: its data, how it was asked, what came out, what the gate said."""

    name: str
    data: str
    answers: int
    warnings: Sequence[str]
    decoding: str
    max_new_tokens: int | str
    base: str | None
    scores: Sequence[Score]
    gate: Mapping[str, Any] | None

    def label(self, metric: str) -> str:
        """What a metric or flag that a bound names is called in the tables."""
        for score in self.scores:
            if score.metric == metric:
                return score.label
        return sentence(spaced(metric))


@dataclass(frozen=True)
class Card:
    """What a card says, block by block. `data` is the run's `data.json`, empty if there is none."""

    name: str
    library: str
    base: str
    base_on_hub: bool
    relation: str  # to the base, in the Hub's words
    origin: str  # the same in ours
    revision: str | None
    quantized_bits: int | None
    is_adapter: bool
    is_merged: bool
    datasets_on_hub: Sequence[str]
    sft_recipes: str
    trl: str
    system_prompt: str | None
    template_arguments: Mapping[str, Any]
    data: Mapping[str, Any]
    stages: Sequence[Stage]
    trained: Sequence[Line]
    hyperparameters: Sequence[Line]
    unset_keys: Sequence[str]
    evaluations: Sequence[ScoredEvaluation]
    has_gate: bool
    samples: Sequence[Mapping[str, str]]
    export: Sequence[Line]
    older_transformers: str | None
    versions: Sequence[Line]
    recipe: str


def metadata(card: Card) -> str:
    """The front matter, as https://huggingface.co/docs/hub/model-cards has it."""
    content: dict[str, Any] = {
        "library_name": card.library,
        "pipeline_tag": "text-generation",
        "tags": ["sft", "sft-recipes"],
    }
    if card.base_on_hub:
        content["base_model"] = card.base
        content["base_model_relation"] = card.relation
    if card.datasets_on_hub:
        content["datasets"] = list(card.datasets_on_hub)
    if card.evaluations:
        results = [_result(evaluation) for evaluation in card.evaluations]
        content["model-index"] = [{"name": card.name, "results": results}]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _result(evaluation: ScoredEvaluation) -> dict[str, Any]:
    metrics = []
    for score in evaluation.scores:
        if score.value is None:
            continue
        interval = [_rounded(score.ci_low), _rounded(score.ci_high)]
        metrics.append(
            {
                "type": score.metric,
                "name": score.label,
                "value": _rounded(score.value),
                "args": {"n": score.n, "interval_95": interval},
            }
        )
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": evaluation.name, "name": evaluation.data},
        "metrics": metrics,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def usage(card: Card) -> str:
    """Python that loads the model and asks it once."""
    model_class = "AutoModelForCausalLM"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if card.is_adapter:
        model_class = "AutoPeftModelForCausalLM"
        imports = f"from peft import {model_class}\nfrom transformers import AutoTokenizer"
    name = _literal(card.name)
    chat = ['{"role": "user", "content": "..."}']
    if card.system_prompt:
        chat.insert(0, f'{{"role": "system", "content": {_literal(card.system_prompt)}}}')
    arguments = ["chat", "add_generation_prompt=True", 'return_tensors="pt"']
    if card.template_arguments:
        arguments.append(_keywords(card.template_arguments))
    # A line each: the Hub shows about 80 characters of code beside one another.
    shown_arguments = "".join(f"    {argument},\n" for argument in arguments)
    return f"""{imports}

model = {model_class}.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
chat = [{", ".join(chat)}]
inputs = tokenizer.apply_chat_template(
{shown_arguments})
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0]))
"""


def _literal(text: str) -> str:
    """A text as Python has it: what JSON escapes, Python reads alike."""
    return json.dumps(text, ensure_ascii=False)


def _keywords(arguments: Mapping[str, Any]) -> str:
    """Arguments of a call by name, in a form that fits names which are no identifiers, too."""
    if all(name.isidentifier() and not iskeyword(name) for name in arguments):
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"**{dict(arguments)!r}"
