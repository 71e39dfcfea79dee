"""What can be checked before a weight is loaded, and what a run will take of time, memory and disk.

All sizes are per device, for the processes planned for; `memory.py` says how memory is estimated.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig, pack_dataset

from sft_recipes import run_folder
from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.reuse import link_prepared
from sft_recipes.data.template_checks import check_template, require
from sft_recipes.devices import computes_on_cpu, has_accelerator
from sft_recipes.errors import InputError
from sft_recipes.models import check_vocabulary
from sft_recipes.recipe import Recipe, launch_config
from sft_recipes.training.announce import TEXTS, adapter_notes, unusual
from sft_recipes.training.arguments import (
    REFUSALS,
    batch_per_device,
    reason,
    sft_config,
)
from sft_recipes.training.construction import generation_notes, meta_model
from sft_recipes.training.context_parallel import check_context_parallel
from sft_recipes.training.evaluate_while_training import generation_metrics
from sft_recipes.training.experts import count_experts
from sft_recipes.training.fit import (
    free_bytes,
    memory_advice,
    smallest_change,
    time_advice,
    train_command,
)
from sft_recipes.training.launch_config import needs_gpus, read_launch_config, read_strategy
from sft_recipes.training.measure import measure_steps
from sft_recipes.training.memory import Batch, Memory, Strategy, estimate_memory
from sft_recipes.training.processes import launched_processes, processes_a_batch
from sft_recipes.training.record import earlier_stages
from sft_recipes.training.settings_checks import check_settings
from sft_recipes.training.step_time import MeanBatch, estimate_step_time
from sft_recipes.training.varlen_attention import supports_varlen

# bitsandbytes NF4: half a byte a weight and a float32 scale for 64 of them, or that scale in 8 bits
# again.
_NF4 = 0.5 + 4 / 64
_NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
# Batches looked at for the largest one. Of thousands it is hardly larger: their sums are close.
_SAMPLED_BATCHES = 64
# As `evaluate` has it (`report/evaluation_verdict.py`).
FEW_TO_JUDGE = 30
# Attention of transformers that is given a mask over the whole sequence.
_MASKED_ATTENTION = ("sdpa", "eager")


def check_recipe(
    recipe: Recipe,
    launch: Path | str | None = None,
    processes: int | None = None,
    measure: int = 0,
    progress: bool = True,
    allow_hub_kernels: bool = False,
) -> dict[str, Any]:
    """Label all rows, check the template, and plan the steps. Raises what training would raise.

    Rows that are prepared in the run's folder already are taken from there.

    `launch` (an accelerate config, or the name of one that ships) and `processes` plan for another
    launch than this process. `measure` trains that many steps for their time and memory only.
    Returns plain data: `recipe`, `data` as in data.json, `checks` of `looked_at` conversations,
    `plan` by readable names, `notes`, `advice` where memory or time is short, the `next` command.
    """
    strategy = _strategy(launch, processes)
    model = _model_of_shapes(recipe, strategy, launch is not None, allow_hub_kernels)
    labeller = open_labeller(recipe)
    check_vocabulary(model, labeller.renderer.tokenizer, recipe.place("model_name_or_path"))
    with tempfile.TemporaryDirectory() as folder:
        prepared = recipe.output_dir / run_folder.PREPARED
        link_prepared(recipe, labeller.renderer, prepared, Path(folder))
        data = prepare(recipe, labeller, Path(folder), progress)
        checks = check_template(labeller, data.check_examples)
        require(checks)
        # Prompts that the model has no room for are refused, as training would.
        generation_metrics(recipe, labeller, data, model)
        config = sft_config(recipe, processes=strategy.batches)
        planned = make_plan(recipe, data, config, strategy, model)
        if launch is None and strategy.processes == 1:
            planned |= _on_this_machine(recipe, data, config, model, planned["steps"])
        advice = _advice(recipe, data, config, planned)
        notes = _notes(recipe, config, planned, data.summary) + _launch_notes(launch)
        if measure:
            planned |= measure_steps(recipe, labeller, data, measure, planned["steps"], progress)
    return {
        "recipe": str(recipe.path or recipe.name),
        "data": {**data.summary, "earlier_stages": earlier_stages(recipe)},
        "checks": [asdict(check) for check in checks],
        "looked_at": len(data.check_examples),
        "plan": planned,
        "notes": notes + adapter_notes(recipe, labeller.renderer, model),
        "advice": advice,
        "next": train_command(recipe, launch, processes=processes),
    }


def _strategy(launch: Path | str | None, processes: int | None) -> Strategy:
    """How the launch planned for spreads the model; without one, as this process was launched."""
    if launch:
        return read_strategy(launch_config(launch), processes)
    return Strategy(processes=launched_processes(), context=processes_a_batch())


def _model_of_shapes(
    recipe: Recipe, strategy: Strategy, elsewhere: bool, allow_hub_kernels: bool
) -> Any:
    """The model without weights, once the recipe's settings and it can be launched so."""
    model = check_settings(
        recipe,
        strategy.batches,
        zero3=strategy.master_weights and strategy.stage == 3,
        elsewhere=elsewhere,
        allow_hub_kernels=allow_hub_kernels,
    )
    if model is None:
        model = meta_model(recipe)
    check_context_parallel(recipe, model, strategy.context)
    return model


def _on_this_machine(
    recipe: Recipe, data: PreparedData, config: SFTConfig, model: Any, steps: int
) -> dict[str, Any]:
    """What this machine needs for a step and for all, and its free memory, by the plan's names."""
    facts: dict[str, Any] = {"bytes free on this machine": free_bytes(config) or "not known"}
    batch = mean_batch(data.train, config, plan_layout(recipe, model))
    try:
        step = estimate_step_time(recipe, model, config, batch)
    except (InputError, *REFUSALS) as error:
        # Some models are not made with one layer, or not without their words.
        facts["time on this machine"] = f"not estimated ({reason(error)})"
        return facts
    facts["operations a step"] = round(step.operations)
    facts["operations a second here"] = round(step.operations_a_second)
    if step.bfloat16_gain > 1:
        facts["operations gain of bfloat16"] = round(step.bfloat16_gain, 2)
    facts["seconds a step, estimated"] = step.seconds
    facts["seconds for all steps, estimated"] = step.seconds * steps
    return facts


def _advice(
    recipe: Recipe, data: PreparedData, config: SFTConfig, plan: Mapping[str, Any]
) -> dict[str, str]:
    """What to do where memory or time is short: `memory`, `time`, each a command or a sentence."""
    advice: dict[str, str] = {}
    free = plan.get("bytes free on this machine")
    if isinstance(free, int) and plan["bytes at peak, estimated"] > free:

        def peak_of(changed: Recipe) -> int:
            model = meta_model(changed)
            changed_config = sft_config(changed)
            layout = plan_layout(changed, model)
            batch = largest_batch(data.train, plan["longest row"], changed_config, layout)
            width = quantized_width(changed)
            return estimate_memory(model, changed_config, batch, quantized=width).peak

        smaller = smallest_change(recipe, config, plan["parameters"], free, peak_of)
        advice["memory"] = memory_advice(recipe, smaller, free)
    elif "seconds a step, estimated" in plan:
        too_long = time_advice(recipe, plan["steps"], plan["seconds a step, estimated"])
        if too_long is not None:
            advice["time"] = too_long
    return advice


def _launch_notes(launch: Path | str | None) -> list[str]:
    if launch is None or has_accelerator():
        return []
    if not needs_gpus(read_launch_config(launch_config(launch)).value):
        return []
    return ["this launch is for GPUs and there is none here: a plan for another machine"]


def _notes(
    recipe: Recipe, config: SFTConfig, planned: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[str]:
    """What a person should know before the run, a line each."""
    longest = planned["longest row"]
    notes = unusual(recipe, config, longest, planned["model context"], planned["parameters"])
    notes += generation_notes(recipe)
    held_out = (summary.get("eval") or {}).get("rows", 0)
    if 0 < held_out < FEW_TO_JUDGE:
        notes.append(
            f"{held_out} rows held out are few to judge a model by: eval_split sets how many"
        )
    every = config.eval_steps
    if config.eval_strategy == "steps" and every and every > planned["steps"]:
        notes.append(
            f"eval_steps {every:,} is more than the run's {planned['steps']:,} steps: nothing is evaluated"
        )
    return notes


def check_text(result: Mapping[str, Any]) -> str:
    """What `check_recipe` returned, for the terminal."""
    ledger = ledger_lines(result["data"])
    return TEXTS.get_template("check.txt.jinja").render(result, ledger=ledger)


def make_plan(
    recipe: Recipe, data: PreparedData, config: SFTConfig, strategy: Strategy, model: Any
) -> dict[str, Any]:
    """The plan as plain values by readable names; `config` and the meta `model` are the run's."""
    counts = data.summary["train"]
    rows_a_step = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * strategy.batches
    )
    plan: dict[str, Any] = {
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "trained tokens": counts["trained_tokens"],
        "longest row": counts["longest"],
        "rows a step": rows_a_step,
    }
    sequences = counts["rows"]
    pack_length = config.max_length if config.packing else None
    if pack_length:
        sequences = len(pack_dataset(data.train, pack_length, config.packing_strategy))
    per_epoch = -(-sequences // rows_a_step)
    plan["tokens a step"] = round(counts["tokens"] / max(per_epoch, 1))
    plan["steps"] = round(per_epoch * config.num_train_epochs)
    if config.max_steps > 0:
        plan["steps"] = config.max_steps
    if pack_length:
        plan["share of each pack filled"] = counts["tokens"] / (sequences * pack_length)
    plan |= _parameters(model)
    plan["strategy"] = strategy.name
    batch = largest_batch(data.train, counts["longest"], config, plan_layout(recipe, model))
    if strategy.context > 1:
        plan["processes that share a batch"] = strategy.context
        batch = batch.cut(strategy.context)
    memory = estimate_memory(model, config, batch, strategy, quantized_width(recipe))
    plan |= _memory(memory, batch)
    plan["bytes a checkpoint"] = memory.checkpoint
    return plan


def quantized_width(recipe: Recipe) -> float | None:
    """Bytes of a quantized weight, or None where nothing is quantized."""
    if recipe.model.get("load_in_8bit"):
        return 1.0
    if not recipe.model.get("load_in_4bit"):
        return None
    return _NF4_NESTED if recipe.model.get("use_bnb_nested_quant") else _NF4


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows share a batch.

    `flattened`: one after another in one sequence, without padding. `masked`: attention is given a
    mask over it.
    """

    flattened: bool
    masked: bool


def plan_layout(recipe: Recipe, model: Any) -> Layout:
    """What `choose_batching` will choose, as far as that is known without running the model."""
    training = recipe.training
    stated = recipe.model.get("attn_implementation")
    on_cpu = computes_on_cpu(recipe)
    needs_mask = bool(supports_varlen(model, "cpu" if on_cpu else "cuda"))
    if stated:
        needs_mask = stated in _MASKED_ATTENTION
    if training.get("packing") or training.get("padding_free"):
        return Layout(flattened=True, masked=needs_mask)
    alone = batch_per_device(recipe) == 1
    padded = training.get("padding_free") is False or stated or alone
    if on_cpu and not padded and not needs_mask:
        return Layout(flattened=True, masked=False)
    return Layout(flattened=False, masked=stated is None or needs_mask)


def largest_batch(rows: Dataset, longest: int, config: SFTConfig, layout: Layout) -> Batch:
    """The largest micro-batch of `rows` (input_ids, labels); `longest`: tokens of the longest row.

    Padded it is known; else it is the largest of a fixed sample of shuffled batches.
    """
    size = min(config.per_device_train_batch_size, len(rows))
    sample = _sample(rows, size)
    lengths = sample.lengths
    trained = sample.trained
    batch_starts = np.arange(0, len(lengths), size)
    trained_tokens = int(np.add.reduceat(trained, batch_starts).max())
    if not layout.flattened:
        padded = Batch(size * longest, trained_tokens)
        # A row alone needs no padding, and attention is causal by itself.
        if layout.masked and size > 1:
            return replace(padded, mask_elements=size * longest**2)
        return padded
    tokens = int(np.add.reduceat(lengths, batch_starts, dtype=np.int64).max())
    if config.packing:
        tokens = config.per_device_train_batch_size * int(config.max_length or 0)
        trained_tokens = round(tokens * int(trained.sum()) / int(lengths.sum()))
    if layout.masked:
        return Batch(tokens, trained_tokens, tokens**2)
    return Batch(tokens, trained_tokens)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Tokens and trained tokens of rows in the order in which they fill batches."""

    lengths: np.ndarray
    trained: np.ndarray


def _sample(rows: Dataset, size: int) -> _Sample:
    """A fixed sample of shuffled rows, enough for `_SAMPLED_BATCHES` batches of `size`."""
    order = np.random.default_rng(0).permutation(len(rows))[: _SAMPLED_BATCHES * size]
    sample = rows.select(order).with_format("arrow")[:]
    lengths = np.asarray(sample.column("input_ids").combine_chunks().value_lengths())
    labels = np.asarray(sample.column("labels").combine_chunks().flatten())
    row_starts = np.cumsum(lengths) - lengths
    trained = np.add.reduceat(labels != IGNORE_INDEX, row_starts, dtype=np.int64)
    return _Sample(lengths, trained)


def mean_batch(rows: Dataset, config: SFTConfig, layout: Layout) -> MeanBatch:
    """The micro-batch of `rows` as most of them are, of the same fixed sample."""
    size = min(config.per_device_train_batch_size, len(rows))
    sample = _sample(rows, size)
    length = round(float(sample.lengths.mean()))
    tokens = size * length
    if config.packing:
        tokens = config.per_device_train_batch_size * int(config.max_length or 0)
    elif not layout.flattened:
        # Each batch is padded to its own longest row.
        batch_starts = np.arange(0, len(sample.lengths), size)
        length = round(float(np.maximum.reduceat(sample.lengths, batch_starts).mean()))
        tokens = size * length
    trained_tokens = size * float(sample.trained.mean())
    if config.packing:
        trained_tokens = tokens * float(sample.trained.sum() / sample.lengths.sum())
    return MeanBatch(tokens, length, round(trained_tokens))


def _parameters(model: Any) -> dict[str, Any]:
    """The model's context, and how many parameters are there and are trained, by layer."""
    parameters = dict(model.named_parameters())
    trained_by_layer: Counter[str] = Counter()
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            projections = [part for part in name.split(".") if part.endswith("proj")]
            layer = projections[-1] if projections else "other"
            trained_by_layer[layer] += parameter.numel()
    facts: dict[str, Any] = {
        "model context": getattr(
            model.config.get_text_config(), "max_position_embeddings", "not recorded"
        ),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained parameters": trained_by_layer.total(),
        "trained by layer": dict(trained_by_layer.most_common()),
    }
    experts = count_experts(model)
    if experts:
        facts["experts"] = str(experts)
    return facts


def _memory(memory: Memory, batch: Batch) -> dict[str, Any]:
    """The estimate by the plan's names."""
    sizes: dict[str, Any] = {
        "bytes a device": memory.by_name(),
        "bytes at peak, estimated": memory.peak,
    }
    if memory.offloaded:
        sizes["bytes in host memory"] = memory.in_host_memory()
    sizes["activations"] = (
        f"an estimate for {batch.tokens:,} tokens a batch, {batch.trained_tokens:,} of them trained"
    )
    return sizes
