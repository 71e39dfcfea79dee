"""What can be checked before a weight is loaded, and what a run will take: steps, tokens, parameters, memory, disk.

Weights, gradients and optimizer states are counted exactly on a model without memory (torch's meta device);
activations are an estimate with its formula printed. All sizes are per device, for the processes planned for.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import pack_dataset

from sft_recipes.data.ledger import ledger_lines
from sft_recipes.data.opening import not_loadable, open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.template_checks import check_template, require
from sft_recipes.models import freeze_unfed_encoders, lora_config, model_dtype
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_files import launch_config
from sft_recipes.training.announce import TEXTS, unusual
from sft_recipes.training.arguments import launched_processes, sft_config
from sft_recipes.training.measure import measure_steps
from sft_recipes.training.settings_checks import check_settings

# What a stage of ZeRO splits over the processes, and every later one (Rajbhandari et al. 2020).
_FIRST_STAGE = {"weights": 3, "gradients": 2, "optimizer": 1}
# bitsandbytes NF4: half a byte a weight and a float32 scale per 64 weights, or that scale in 8 bits again.
_NF4, _NF4_NESTED = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)


def check_recipe(
    recipe: Recipe,
    launch: Path | str | None = None,
    processes: int | None = None,
    measure: int = 0,
    progress: bool = True,
    allow_hub_kernels: bool = False,
) -> dict[str, Any]:
    """Label all rows, run the template checks, and plan the steps. Raises what training would raise.

    `launch` (an accelerate config, or the name of one that ships) and `processes` plan for another launch than this
    process. `measure` trains that many steps for nothing but their time and memory. Returns plain data: `recipe`,
    `data` as in data.json, `checks`, `plan` by readable names, `notes`.
    """
    strategy = (
        read_strategy(launch_config(launch), processes)
        if launch
        else Strategy(processes=launched_processes())
    )
    check_settings(
        recipe,
        strategy.processes,
        zero3=strategy.master_weights and strategy.stage == 3,
        elsewhere=launch is not None,
        allow_hub_kernels=allow_hub_kernels,
    )
    labeller = open_labeller(recipe)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe, labeller, Path(folder), progress)
        checks = check_template(labeller, data.check_examples)
        require(checks)
        config = sft_config(recipe, processes=strategy.processes)
        planned = make_plan(recipe, data, config, strategy)
        if measure:
            planned |= measure_steps(recipe, labeller, data, measure, planned["steps"])
    notes = unusual(recipe, config, planned["longest row"], planned["model context"])
    if planned.get("trained in experts") == 0:
        notes.append(
            "no parameter of the experts is trained; lora_target_parameters names fused ones"
        )
    found = {
        "data": data.summary,
        "checks": [asdict(check) for check in checks],
        "plan": planned,
        "notes": notes,
    }
    return {"recipe": str(recipe.path or recipe.name), **found}


def check_text(result: Mapping[str, Any]) -> str:
    """What `check_recipe` returned, for the terminal."""
    return TEXTS.get_template("check.txt.jinja").render(
        result, ledger=ledger_lines(result["data"]["sources"])
    )


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a launch spreads a model, by the `stage` of ZeRO that splits as much (0: nothing is split).

    `master_weights`: DeepSpeed keeps 16-bit weights and gradients, and float32 weights beside the optimizer's states.
    `offloaded`: what lies in the host's memory instead.
    """

    name: str = "one process"
    processes: int = 1
    stage: int = 0
    master_weights: bool = False
    offloaded: tuple[str, ...] = ()


def read_strategy(config: Path, processes: int | None) -> Strategy:
    """The strategy of an accelerate config, read as `accelerate launch` reads it."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    count = processes or int(content.get("num_processes") or 1)
    name, kind = f"{config.stem} on {count} processes", content.get("distributed_type")
    if kind == "FSDP":
        return Strategy(
            name,
            count,
            3 if content.get("fsdp_config", {}).get("fsdp_reshard_after_forward", True) else 2,
        )
    if kind != "DEEPSPEED":
        return Strategy(name, count)
    deepspeed: Mapping[str, Any] = content["deepspeed_config"]
    keys = {"weights": "offload_param_device", "optimizer": "offload_optimizer_device"}
    offloaded = tuple(part for part, key in keys.items() if deepspeed.get(key, "none") != "none")
    return Strategy(
        name, count, int(deepspeed["zero_stage"]), master_weights=True, offloaded=offloaded
    )


def make_plan(
    recipe: Recipe, data: PreparedData, config: Any, strategy: Strategy
) -> dict[str, Any]:
    """The plan as plain values by readable names; `config` is the run's SFTConfig."""
    batch = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * strategy.processes
    )
    counts = data.summary["train"]
    sequences, content = counts["rows"], {}
    if config.packing:
        packed = pack_dataset(data.train, config.max_length, config.packing_strategy)
        sequences = len(packed)
        content = {"share of each pack filled": counts["tokens"] / (sequences * config.max_length)}
    per_epoch = -(-sequences // batch)
    steps = config.max_steps if config.max_steps > 0 else round(per_epoch * config.num_train_epochs)
    return {
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "trained tokens": counts["trained_tokens"],
        "longest row": counts["longest"],
        "rows a step": batch,
        "tokens a step": round(counts["tokens"] / max(per_epoch, 1)),
        "steps": steps,
        **content,
        **_sizes(recipe, config, counts["longest"], strategy),
    }


def meta_model(recipe: Recipe) -> Any:
    """The recipe's model with its adapter, shapes only. Raises InputError if its config cannot be read."""
    try:
        revision = recipe.model.get("model_revision", "main")
        config = AutoConfig.from_pretrained(
            recipe.model_name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise not_loadable(recipe.model_name, "config", error) from error
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        freeze_unfed_encoders(model)
        lora = lora_config(recipe, model)
        if lora is not None:
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model


def _sizes(recipe: Recipe, config: Any, longest: int, strategy: Strategy) -> dict[str, Any]:
    model = meta_model(recipe)
    text = model.config.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = {
        name: sizes[name] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    by_layer: Counter[str] = Counter()
    for name, size in trained.items():
        by_layer[
            next((part for part in reversed(name.split(".")) if part.endswith("proj")), "other")
        ] += size
    # Of a mixture: `all-linear` may pass fused experts by.
    experts = [trained.get(name, 0) for name in sizes if ".experts." in name]
    count = by_layer.total()
    width = getattr(torch, model_dtype(recipe)).itemsize
    quantized = _quantized_width(recipe)
    trained_width = 2 if quantized else 4 if recipe.model.get("use_peft") else width
    master = strategy.master_weights and (config.bf16 or config.fp16)
    width, trained_width = (2, 2) if master else (width, trained_width)
    # Quantization covers the weights of the linear layers, except the output head.
    linear = (name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    widths = {f"{name}.weight": quantized or width for name in linear if "lm_head" not in name}
    frozen = sum(
        size * widths.get(name, width) for name, size in sizes.items() if name not in trained
    )
    optimizer = config.optim.value
    states = 2 if "8bit" in optimizer else 2 * trained_width if "adam" in optimizer else 0
    states = 12 if master and "adam" in optimizer else states
    activations, formula = _activations(config, text, longest)
    parts = {
        "weights": frozen + count * trained_width,
        "gradients": count * trained_width,
        "optimizer": count * states,
    }
    split = [name for name in parts if strategy.stage >= _FIRST_STAGE[name]]
    parts |= {name: parts[name] / strategy.processes for name in split}
    elsewhere = {name: round(parts.pop(name)) for name in strategy.offloaded}
    return {
        "model context": getattr(text, "max_position_embeddings", "not recorded"),
        "parameters": sum(sizes.values()),
        "trained parameters": count,
        "trained by layer": dict(by_layer.most_common()),
        **({"trained in experts": sum(experts)} if experts else {}),
        "strategy": strategy.name,
        "bytes a device": {
            name: round(amount) for name, amount in {**parts, "activations": activations}.items()
        },
        **({"bytes in host memory": elsewhere} if elsewhere else {}),
        "activations": f"an estimate: {formula}",
        "bytes a checkpoint": count * (trained_width + states),
    }


def _quantized_width(recipe: Recipe) -> float | None:
    """Bytes of a quantized weight, or None where nothing is quantized."""
    four_bit = _NF4_NESTED if recipe.model.get("use_bnb_nested_quant") else _NF4
    return (
        1.0
        if recipe.model.get("load_in_8bit")
        else four_bit
        if recipe.model.get("load_in_4bit")
        else None
    )


def _activations(config: Any, text: Any, longest: int) -> tuple[float, str]:
    """(bytes, formula): Korthikanti et al. 2022, without the attention matrix that sdpa does not keep."""
    tokens = (config.max_length if config.packing else longest) * config.per_device_train_batch_size
    wide = 1 if config.bf16 or config.fp16 else 2
    layer = 34 * tokens * text.hidden_size * wide
    if not config.activation_checkpointing:
        return (
            layer * text.num_hidden_layers,
            f"34 x {tokens:,.0f} tokens x hidden x layers x {wide}",
        )
    kept = 2 * wide * tokens * text.hidden_size * text.num_hidden_layers
    return (
        kept + layer,
        f"({2 * wide} x layers + 34 x {wide}) x {tokens:,.0f} tokens x hidden, checkpointing on",
    )
