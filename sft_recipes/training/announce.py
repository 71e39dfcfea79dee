"""What a run says before it starts and after it ends, in plain words; the words are in the `.jinja` files here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.recipe import Recipe

TEXTS = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
)
TEXTS.filters["repr"] = repr


def banner(
    recipe: Recipe,
    renderer: ChatRenderer,
    data: PreparedData,
    trainer: Any,
    checks: Sequence[TemplateCheck],
) -> str:
    """The start banner, the ledger of the data included."""
    config, rows = trainer.model.config.get_text_config(), data.summary["train"]
    notes = unusual(
        recipe, trainer.args, rows["longest"], getattr(config, "max_position_embeddings", None)
    )
    values = {
        "recipe": recipe,
        "renderer": renderer,
        "trainer": trainer,
        "args": trainer.args,
        "config": config,
    }
    values |= {"rows": rows, "eval": data.summary["eval"], "checks": checks, "notes": notes}
    text = TEXTS.get_template("banner.txt.jinja").render(
        values, ledger=ledger_lines(data.summary["sources"])
    )
    return text.rstrip()


def unusual(recipe: Recipe, args: Any, longest: int, context: Any) -> list[str]:
    """What lies outside the chapter's ranges or the model's `context` (None or text: not known), in words."""
    values = {
        "lora": bool(recipe.model.get("use_peft")),
        "args": args,
        "longest": longest,
        "context": context,
    }
    return TEXTS.get_template("unusual.txt.jinja").render(values).splitlines()


def next_steps(recipe: Recipe, trainer: Any) -> str:
    """What to do with a finished run."""
    values = {
        "folder": recipe.output_dir,
        "base": recipe.model_name,
        "seconds": trainer.generation_seconds,
    }
    return TEXTS.get_template("next_steps.txt.jinja").render(values)
