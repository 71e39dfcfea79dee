"""Everything about a recipe that can be checked before a model is loaded."""

from __future__ import annotations

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
from sft_recipes.training.announce import beyond_context, outside_the_chapter
from sft_recipes.training.arguments import check_settings, launched_processes, sft_config
from sft_recipes.training.measure import measure_steps
from sft_recipes.training.plan import Strategy, make_plan, read_strategy


@dataclass(frozen=True)
class RecipeCheck:
    """What `check` found; raising is left to the checks themselves, so a RecipeCheck is a recipe that may train."""

    recipe: str
    summary: Mapping[str, Any]
    checks: Sequence[TemplateCheck]
    plan: Mapping[str, Any]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `check --json`."""
        checks = [asdict(check) for check in self.checks]
        return {"recipe": self.recipe, "data": self.summary, "checks": checks, "plan": self.plan, "notes": self.notes}

    def lines(self) -> list[str]:
        """The same for the terminal, with the next command last."""
        lines = [*ledger_lines(self.summary["sources"]), ""]
        lines += [f"{check.outcome:6} {check.name}: {check.detail}" for check in self.checks]
        lines += [f"note   {note}" for note in self.notes]
        return [
            *lines,
            "",
            *[f"{key:30} {_shown(key, value)}" for key, value in self.plan.items()],
            "",
            f"next: sft-recipes train {self.recipe}",
        ]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        total = [_shown(key, sum(value.values())), "="] if key.startswith("bytes") else []
        return " ".join([*total, ", ".join(f"{name} {_shown(key, part)}" for name, part in value.items())])
    if key.startswith("bytes"):
        return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def check_recipe(
    recipe: Recipe, launch: Path | None = None, processes: int | None = None, measure: int = 0, progress: bool = True
) -> RecipeCheck:
    """Label all rows, run the template checks, and plan the steps. Raises what training would raise.

    `launch` (an accelerate config) and `processes` plan for another launch than this process. `measure` trains that
    many steps for nothing but their time and memory.
    """
    strategy = read_strategy(launch, processes) if launch else Strategy(processes=launched_processes())
    check_settings(recipe, strategy.processes)
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
    notes = outside_the_chapter(recipe, config) + beyond_context(planned["longest row"], planned["model context"])
    if planned.get("trained in experts") == 0:
        notes.append("no parameter of the experts is trained; lora_target_parameters names fused ones")
    return RecipeCheck(str(recipe.path or recipe.name), dict(data.summary), checks, planned, notes)
