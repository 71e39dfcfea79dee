"""What a run says before it starts and after it ends, in plain words; the words are in the `.jinja` files here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.prepare import PreparedData
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.recipe import Recipe

# The chapter's ranges; LoRA takes about ten times the rate of full fine-tuning (TRL docs, peft_integration;
# "LoRA Without Regret", Thinking Machines 2025).
FULL_LEARNING_RATES = (1e-5, 5e-5)
LORA_LEARNING_RATES = (1e-4, 5e-4)
EPOCHS = (1, 3)

TEXTS = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
TEXTS.filters["repr"] = repr


def banner(
    recipe: Recipe, renderer: ChatRenderer, data: PreparedData, trainer: Any, checks: Sequence[TemplateCheck]
) -> str:
    """The start banner, the ledger of the data included."""
    args, config = trainer.args, trainer.model.config.get_text_config()
    parameters = list(trainer.model.parameters())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = round(-(-len(trainer.train_dataset) // batch) * args.num_train_epochs)
    rows, eval_counts = data.summary["train"], data.summary["eval"]
    values = {
        **{"recipe": recipe, "renderer": renderer, "trainer": trainer, "args": args, "checks": checks, "rows": rows},
        "lora": recipe.model.get("use_peft"),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "eval_rows": eval_counts["rows"] if eval_counts else 0,
        "batch": batch,
        "steps": args.max_steps if args.max_steps > 0 else epochs,
        "attention": getattr(config, "_attn_implementation", "not recorded"),
        "ledger": ledger_lines(data.summary["sources"]),
        "notes": unusual(recipe, args, rows["longest"], getattr(config, "max_position_embeddings", None)),
    }
    return TEXTS.get_template("banner.txt.jinja").render(values).rstrip()


def unusual(recipe: Recipe, args: Any, longest: int, context: Any) -> list[str]:
    """What lies outside the chapter's ranges or the model's `context` (None or text: not known), in words."""
    lora = bool(recipe.model.get("use_peft"))
    (low, high), kind = (LORA_LEARNING_RATES, "LoRA") if lora else (FULL_LEARNING_RATES, "full fine-tuning")
    rate, epochs = args.learning_rate, args.num_train_epochs
    context = context if isinstance(context, int) else longest
    rate_note = f"learning_rate {rate:g} is outside the usual {low:g} to {high:g} for {kind}"
    epochs_note = f"num_train_epochs {epochs:g} is outside the usual {EPOCHS[0]} to {EPOCHS[1]}"
    length_note = f"the longest row has {longest:,} tokens, the model's context is {context:,}: lower max_length"
    by_length = args.train_sampling_strategy == "group_by_length"
    notes = (
        (not low <= rate <= high, rate_note),
        (args.max_steps <= 0 and not EPOCHS[0] <= epochs <= EPOCHS[1], epochs_note),
        (by_length, "train_sampling_strategy group_by_length: a resumed run does not repeat bit for bit"),
        (not args.max_grad_norm, "max_grad_norm is 0: gradients are not clipped"),
        (longest > context, length_note),
    )
    return [note for applies, note in notes if applies]


def next_steps(recipe: Recipe, trainer: Any) -> str:
    """What to do with a finished run."""
    values = {"folder": recipe.output_dir, "base": recipe.model_name, "seconds": trainer.generation_seconds}
    return TEXTS.get_template("next_steps.txt.jinja").render(values)
