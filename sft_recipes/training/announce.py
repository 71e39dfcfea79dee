"""What a run says before it starts and after it ends, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def banner(
    recipe: Recipe, renderer: ChatRenderer, data: PreparedData, trainer: Any, checks: Sequence[TemplateCheck]
) -> list[str]:
    """The lines of the start banner, the ledger of the data included."""
    args = trainer.args
    model = trainer.model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps <= 0:
        steps = round(-(-len(trainer.train_dataset) // batch) * args.num_train_epochs)
    rows = data.summary["train"]
    tokenizer = renderer.tokenizer
    text_config = model.config.get_text_config()
    kind = "LoRA" if recipe.model.get("use_peft") else "full fine-tuning"
    kind = "QLoRA (4-bit base)" if recipe.model.get("load_in_4bit") else kind
    loss = "at trained positions only" if trainer.trained_positions_only else "TRL's fused head"
    eval_rows = data.summary["eval"]["rows"] if data.summary["eval"] else 0
    lines = [
        f"model       {recipe.model_name}, {kind}: {trainable:,} of {total:,} parameters trained",
        f"template    {recipe.template.chat_template or ('own' if not _is_instruction(renderer) else 'instruction')}, "
        f"EOS {tokenizer.eos_token!r}, PAD {tokenizer.pad_token!r}, generation stops at {list(renderer.stop_ids)}",
        f"labels      train_on: {recipe.labels.train_on}; {rows['trained_tokens']:,} of {rows['tokens']:,} tokens "
        f"trained in {rows['rows']:,} rows; {eval_rows:,} rows held out",
        f"batch       {batch} rows a step ({args.per_device_train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulation x {args.world_size} processes)",
        f"steps       {steps:,} of {batch} {'packs' if args.packing else 'rows'}"
        + (f", {args.num_train_epochs:g} epochs" if args.max_steps <= 0 else ""),
        f"optimizer   {_value(args.optim)}, learning rate {args.learning_rate:g}, {_value(args.lr_scheduler_type)}, "
        f"warmup {args.warmup_steps:g}, clipping {args.max_grad_norm:g}",
        f"precision   weights {str(model.dtype).removeprefix('torch.')}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'no'} autocast, attention "
        f"{getattr(text_config, '_attn_implementation', 'not recorded')}, device {args.device}",
        f"batching    {_batching(trainer)}; loss {loss}",
        f"checks      {'; '.join(f'{check.name} {check.outcome}' for check in checks)}",
        f"run folder  {recipe.output_dir}",
    ]
    lines += ["data", *[f"  {line}" for line in ledger_lines(data.summary["sources"])]]
    lines += [f"note: {check.name}: {check.detail}" for check in checks if check.outcome == "note"]
    notes = outside_the_chapter(recipe, args) + beyond_context(
        rows["longest"], getattr(text_config, "max_position_embeddings", None)
    )
    return lines + [f"note: {text}" for text in notes]


def beyond_context(longest: int, context: Any) -> list[str]:
    """A note if the longest row has more tokens than the model's context (None or text: not known)."""
    if not isinstance(context, int) or longest <= context:
        return []
    return [f"the longest row has {longest:,} tokens, the model's context is {context:,}: lower max_length"]


def outside_the_chapter(recipe: Recipe, args: Any) -> list[str]:
    """Which hyperparameters lie outside the chapter's ranges, in words."""
    lora = bool(recipe.model.get("use_peft"))
    low, high = LORA_LEARNING_RATES if lora else FULL_LEARNING_RATES
    notes: list[str] = []
    if not low <= args.learning_rate <= high:
        kind = "LoRA" if lora else "full fine-tuning"
        notes.append(f"learning_rate {args.learning_rate:g} is outside the usual {low:g} to {high:g} for {kind}")
    if args.max_steps <= 0 and not EPOCHS[0] <= args.num_train_epochs <= EPOCHS[1]:
        notes.append(f"num_train_epochs {args.num_train_epochs:g} is outside the usual {EPOCHS[0]} to {EPOCHS[1]}")
    if args.train_sampling_strategy == "group_by_length":
        notes.append("train_sampling_strategy group_by_length: a resumed run does not repeat bit for bit")
    if not args.max_grad_norm:
        notes.append("max_grad_norm is 0: gradients are not clipped")
    return notes


def _is_instruction(renderer: ChatRenderer) -> bool:
    return "### Instruction:" in renderer.template_text


def _batching(trainer: Any) -> str:
    if trainer.args.packing:
        return f"packed to {trainer.args.max_length} tokens ({trainer.args.packing_strategy}), rows kept apart"
    return "flattened without padding, rows kept apart" if trainer.padding_free else "padded"


def _value(option: Any) -> str:
    return str(getattr(option, "value", option))


def next_steps(recipe: Recipe, trainer: Any) -> None:
    """Print what to do with a finished run."""
    folder = recipe.output_dir
    print(f"\ndone: {folder}")
    if trainer.generation_seconds:
        times, seconds = len(trainer.generation_seconds), sum(trainer.generation_seconds)
        print(f"  generated evaluation answers {times} times in {seconds:.1f} s (evaluation.max_share limits it)")
    print(f"  sft-recipes evaluate {folder} --base {recipe.model_name}     answers, metrics, report")
    print(f"  sft-recipes inspect {folder / 'recipe.yaml'}     the rows as they were trained")
