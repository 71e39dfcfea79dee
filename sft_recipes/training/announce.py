"""What a run says before it starts and after it ends, in plain words; the words are in the `.jinja` files here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers.trainer_pt_utils import get_model_param_count

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.recipe import Recipe
from sft_recipes.training.experts import count_experts
from sft_recipes.training.processes import processes_a_batch
from sft_recipes.training.rates import SMALL_MODEL, UsualRange, usual_rates
from sft_recipes.training.record import earlier_stages
from sft_recipes.training.start_adapter import start_notes


def duration(seconds: float) -> str:
    """A time in the unit that a person would say it in."""
    if seconds < 10:
        return f"{seconds:.2g} seconds"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"


def stages_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """The runs that this one goes on from, the first one first, with what each was trained on."""
    text = ""
    for stage in stages:
        text += stage["run"]
        if stage.get("steps"):
            text += f" ({stage['rows']:,} rows, {stage['steps']:,} steps)"
        text += " -> "
    return f"{text}this run"


TEXTS = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
)
TEXTS.filters["repr"] = repr
TEXTS.filters["duration"] = duration
TEXTS.filters["stages"] = stages_text


# The chapter's.
EPOCHS = UsualRange(1, 3)


def banner(
    recipe: Recipe,
    renderer: ChatRenderer,
    data: PreparedData,
    trainer: Any,
    checks: Sequence[TemplateCheck],
) -> str:
    """The start banner, the ledger of the data included."""
    config = trainer.model.config.get_text_config()
    rows = data.summary["train"]
    context = getattr(config, "max_position_embeddings", None)
    args = trainer.args
    # Under ZeRO-3 a parameter's own size is that of a share.
    parameters = get_model_param_count(trainer.model)
    notes = unusual(recipe, args, rows["longest"], context, parameters)
    notes += adapter_notes(recipe, renderer, trainer.model)
    values = {
        "recipe": recipe,
        "renderer": renderer,
        "trainer": trainer,
        "args": args,
        "config": config,
        "rows": rows,
        "eval": data.summary["eval"],
        "checks": checks,
        "notes": notes,
        "experts": count_experts(trainer.model),
        "stages": earlier_stages(recipe),
        "method": training_method(recipe),
        "template": template_name(recipe, renderer),
        "steps": planned_steps(args, len(trainer.train_dataset)),
        "batch": rows_a_step(args),
        "processes_a_batch": processes_a_batch(),
        "autocast": autocast_name(args),
    }
    ledger = ledger_lines(data.summary)
    return TEXTS.get_template("banner.txt.jinja").render(values, ledger=ledger).rstrip()


def training_method(recipe: Recipe) -> str:
    """QLoRA, LoRA or full fine-tuning, in words."""
    if recipe.model.get("load_in_4bit"):
        return "QLoRA (4-bit base)"
    return "LoRA" if recipe.model.get("use_peft") else "full fine-tuning"


def template_name(recipe: Recipe, renderer: ChatRenderer) -> str:
    """The template as the recipe names it; without a name, whose it is."""
    if recipe.template.chat_template:
        return recipe.template.chat_template
    return "instruction" if "### Instruction:" in renderer.template_text else "own"


def rows_a_step(args: Any) -> int:
    """Rows (or packs) of an optimizer step over all processes."""
    per_device: int = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return per_device * int(args.world_size) // processes_a_batch()


def planned_steps(args: Any, rows: int) -> int:
    """Optimizer steps of the whole run over so many rows (or packs)."""
    if args.max_steps > 0:
        return int(args.max_steps)
    an_epoch = -(-rows // rows_a_step(args))
    return round(an_epoch * args.num_train_epochs)


def autocast_name(args: Any) -> str:
    """The precision of autocast, or no."""
    if args.bf16:
        return "bf16"
    return "fp16" if args.fp16 else "no"


def unusual(recipe: Recipe, args: Any, longest: int, context: Any, parameters: int) -> list[str]:
    """What lies outside the usual ranges or the model's `context` (None or text: not known), in words."""
    uses_lora = bool(recipe.model.get("use_peft"))
    method = "LoRA" if uses_lora else "full fine-tuning"
    usual_rate = usual_rates(uses_lora, parameters)
    notes = []
    if not usual_rate.holds(args.learning_rate):
        usual = f"outside the usual {usual_rate.low:g} to {usual_rate.high:g} for {method}"
        if parameters < SMALL_MODEL:
            usual += " of a model this small"
        notes.append(f"learning_rate {args.learning_rate:g} is {usual}")
    if args.max_steps <= 0 and not EPOCHS.holds(args.num_train_epochs):
        usual = f"outside the usual {EPOCHS.low:g} to {EPOCHS.high:g}"
        notes.append(f"num_train_epochs {args.num_train_epochs:g} is {usual}")
    if args.train_sampling_strategy == "group_by_length":
        notes.append(
            "train_sampling_strategy group_by_length: a resumed run does not repeat bit for bit"
        )
    if not args.max_grad_norm:
        notes.append("max_grad_norm is 0: gradients are not clipped")
    if isinstance(context, int) and longest > context:
        notes.append(
            f"the longest row has {longest:,} tokens, the model's context is {context:,}: lower max_length"
        )
    return notes


def adapter_notes(recipe: Recipe, renderer: ChatRenderer, model: Any) -> list[str]:
    """What a person should know of the adapter that a run goes on from, and of one that passes experts by."""
    notes = list(start_notes(recipe, renderer.template_text))
    experts = count_experts(model)
    if experts:
        notes += experts.notes()
    return notes


def next_steps(recipe: Recipe, trainer: Any) -> str:
    """What to do with a finished run."""
    values: Mapping[str, Any] = {
        "folder": recipe.output_dir,
        "base": recipe.model_name,
        "times_generated": len(trainer.generation_seconds),
        "seconds": sum(trainer.generation_seconds),
    }
    return TEXTS.get_template("next_steps.txt.jinja").render(values)
