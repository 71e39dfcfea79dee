"""Everything about a recipe that can be checked before a model is loaded."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.prepare import prepare
from sft_recipes.data.template_checks import TemplateCheck, check_template, require
from sft_recipes.models import load_tokenizer
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_files import launch_config
from sft_recipes.training.announce import TEXTS, unusual
from sft_recipes.training.arguments import check_settings, launched_processes, sft_config
from sft_recipes.training.measure import measure_steps
from sft_recipes.training.plan import Strategy, make_plan, read_strategy


@dataclass(frozen=True)
class RecipeCheck:
    """What `check` found; raising is left to the checks themselves, so a RecipeCheck is a recipe that may train."""

    recipe: str
    data: Mapping[str, Any]
    checks: Sequence[TemplateCheck]
    plan: Mapping[str, Any]
    notes: Sequence[str]

    def text(self) -> str:
        """The same for the terminal."""
        template = TEXTS.get_template("check.txt.jinja")
        return template.render(asdict(self), ledger=ledger_lines(self.data["sources"]))


def check_recipe(
    recipe: Recipe,
    launch: Path | str | None = None,
    processes: int | None = None,
    measure: int = 0,
    progress: bool = True,
) -> RecipeCheck:
    """Label all rows, run the template checks, and plan the steps. Raises what training would raise.

    `launch` (an accelerate config, or the name of one that ships) and `processes` plan for another launch than this
    process. `measure` trains that many steps for nothing but their time and memory.
    """
    strategy = read_strategy(launch_config(launch), processes) if launch else Strategy(processes=launched_processes())
    check_settings(recipe, strategy.processes, zero3=strategy.master_weights and strategy.weights > 1)
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.get("model_revision"))
    renderer = attach_chat_template(tokenizer, recipe.template)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe, renderer, Path(folder), progress)
        checks = check_template(renderer, Labeller(renderer, recipe.labels), data.eval_examples[:50])
        require(checks)
        config = sft_config(recipe, flatten=False, processes=strategy.processes)
        planned = make_plan(recipe, data, config, strategy)
        if measure:
            planned |= measure_steps(recipe, renderer, data, measure, planned["steps"])
    notes = unusual(recipe, config, planned["longest row"], planned["model context"])
    if planned.get("trained in experts") == 0:
        notes.append("no parameter of the experts is trained; lora_target_parameters names fused ones")
    return RecipeCheck(str(recipe.path or recipe.name), dict(data.summary), checks, planned, notes)
