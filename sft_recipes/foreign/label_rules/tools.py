"""The label rules of every tool that has some, by the tool's name."""

from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.foreign.label_rules.axolotl import AxolotlRules
from sft_recipes.foreign.label_rules.llamafactory import LlamaFactoryRules
from sft_recipes.foreign.label_rules.rows import LabelRules
from sft_recipes.foreign.label_rules.torchtune import TorchtuneRules
from sft_recipes.foreign.label_rules.trl import TrlRules

_RULES: Mapping[str, Callable[[Mapping[str, Any], int], LabelRules]] = {
    "axolotl": AxolotlRules.from_config,
    "llamafactory": LlamaFactoryRules.from_config,
    "torchtune": TorchtuneRules.from_config,
    "trl": TrlRules.from_config,
}


def label_rules(tool: str, config: Mapping[str, Any], number: int = 0) -> LabelRules:
    """The rules of a tool's config, as its YAML file holds it, for its data set `number`.

    What the tool reads elsewhere may stand beside its keys: of LLaMA-Factory's `dataset_info.json`
    the `formatting`; for TRL, which looks at the columns, the `format` of the rows in this
    project's words, and `turns: true` where prompt and completion are lists of messages.
    """
    return _RULES[tool](config, number)
