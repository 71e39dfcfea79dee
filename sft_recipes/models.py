"""Load models, make them and their tokenizers agree on special tokens, describe the LoRA on top."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft_recipes import run_folder
from sft_recipes.data.opening import check_folder, load_tokenizer, loading
from sft_recipes.devices import (
    SMALLEST_BF16_MODEL,
    accelerator_has_bf16,
    computes_on_cpu,
    cpu_has_bf16,
    cuda_has_bf16,
)
from sft_recipes.errors import InputError, Problem
from sft_recipes.model_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    apart,
    holds_model,
    holds_two_models,
    model_of,
)
from sft_recipes.plain_values import shown
from sft_recipes.recipe import Recipe
from sft_recipes.text_files import RESTORE, read_json

# Encoders for images, sound and video, and what projects them into the text model.
# No text row feeds them.
_ENCODER = re.compile(
    r"(vision|visual|image|audio|speech|video|multi_modal_projector|multimodal_projector)"
)

# What generation reads only when it samples, and only when it searches with beams.
_SAMPLING_ONLY = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAMS_ONLY = ("early_stopping", "length_penalty")


@dataclass(frozen=True)
class InferenceModel:
    """A model ready to generate, its tokenizer, and whether it is an adapter on a base."""

    model: PreTrainedModel
    tokenizer: Any
    kind: Literal["model", "adapter"]


def load_weights(name: str, dtype: Any, revision: str | None = None, **settings: Any) -> Any:
    """The model of a local folder or Hub name. Raises InputError if there is none to be had."""
    check_model(name)
    with loading(name, "model"):
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=dtype,
            # Left open, it is asked of whoever sits at the terminal.
            trust_remote_code=False,
            **settings,
        )


def load_model(recipe: Recipe) -> PreTrainedModel:
    """The recipe's base model in the chosen precision, quantized where the recipe says so.

    Weights are float32 for full fine-tuning (bf16 runs under autocast) and bfloat16 under LoRA
    where the device supports it, unless the recipe states `dtype`.
    """
    from trl import get_quantization_config

    config = _model_config(recipe)
    quantization = get_quantization_config(config)
    check_quantization(recipe)
    model = load_weights(
        recipe.model_name,
        config.dtype,
        config.model_revision,
        attn_implementation=config.attn_implementation,
        quantization_config=quantization,
        device_map=placement(recipe),
    )
    keep_4bit_layers_in_place(model)
    freeze_unfed_encoders(model)
    return model


def check_quantization(recipe: Recipe) -> None:
    """Raise InputError where the recipe quantizes and what does it is not installed."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.model.get(key) and importlib.util.find_spec("bitsandbytes") is None:
            fix = "pip install 'sft-recipes[qlora]'"
            raise InputError(Problem(recipe.place(key), key, "bitsandbytes is not installed", fix))


def _model_config(recipe: Recipe) -> Any:
    """TRL's `ModelConfig` of a recipe; LoRA adapts all linear layers unless it says which."""
    from trl import ModelConfig

    keys = {"lora_target_modules": ["all-linear"], **recipe.model}
    keys["dtype"] = model_dtype(recipe)
    return ModelConfig(**keys)


def model_dtype(recipe: Recipe) -> str:
    """The precision of the weights: as stated, else float32, or bfloat16 for a frozen base on a
    device that has it.
    """
    stated = recipe.model.get("dtype")
    if stated not in (None, "auto"):
        return str(stated)
    is_frozen = bool(recipe.model.get("use_peft"))
    if is_frozen and accelerator_has_bf16(recipe):
        return "bfloat16"
    return "float32"


def placement(recipe: Recipe) -> dict[str, torch.device] | None:
    """Where weights are loaded to at once, as transformers' `device_map`; None: to the CPU, or as a
    launcher decides.

    FSDP and DeepSpeed shard the weights, and put them where they belong themselves.
    """
    strategies = ("FSDP", "DEEPSPEED")
    is_sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in strategies)
    if is_sharded or computes_on_cpu(recipe) or not torch.cuda.is_available():
        return None
    return {"": PartialState().device}


def keep_4bit_layers_in_place(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    Measured with 0.50.2: a forward without gradients repacks the weights in place, and training
    after it is silently wrong. Leaving that path off is exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # B010: the attribute is bitsandbytes' own, which torch's modules do not declare.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def unfed_encoders(model: torch.nn.Module) -> list[str]:
    """Names of the outermost modules that only images, sound or video would pass through."""
    encoders: list[str] = []
    for name, _ in model.named_modules():
        own_name = name.rsplit(".", 1)[-1]
        is_inner = any(name.startswith(f"{encoder}.") for encoder in encoders)
        if _ENCODER.search(own_name) and not is_inner:
            encoders.append(name)
    return encoders


def freeze_unfed_encoders(model: torch.nn.Module) -> None:
    """Text rows give encoders no gradient; under DDP a trainable tensor without one is fatal."""
    for name in unfed_encoders(model):
        model.get_submodule(name).requires_grad_(False)


def lora_config(recipe: Recipe, model: PreTrainedModel) -> Any | None:
    """peft's `LoraConfig` from the recipe's `lora_*` keys, or None where there is no LoRA.

    Encoders that text does not feed are left out: with `all-linear` peft would adapt them, too.
    """
    if not recipe.model.get("use_peft"):
        return None
    from trl import get_peft_config

    lora: Any = get_peft_config(_model_config(recipe))
    # TRL makes a list of one a string, which peft reads as a pattern of full names: a module's own
    # name matches none.
    if isinstance(lora.target_modules, str) and lora.target_modules.isidentifier():
        lora.target_modules = [lora.target_modules]
    if encoders := unfed_encoders(model):
        lora.exclude_modules = "|".join(rf"(.*\.)?{re.escape(name)}\..*" for name in encoders)
    return lora


def agree_on_special_tokens(
    model: PreTrainedModel, tokenizer: Any, stop_ids: Sequence[int]
) -> None:
    """Write EOS, PAD and every end of turn into config and generation_config, as the tokenizer has
    them. Raises InputError for a model that cannot generate.
    """
    text_config = model.config.get_text_config()
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        text_config.bos_token_id = tokenizer.bos_token_id
    generation = model.generation_config
    if generation is None:
        what = "the model cannot generate"
        raise InputError(Problem("recipe", "model_name_or_path", what, "use a causal LM"))
    generation.eos_token_id = generation_eos(stop_ids)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    for note in clean_generation_config(generation, str(model.config.name_or_path)):
        if PartialState().is_main_process:
            print(note, flush=True)


def clean_generation_config(generation: GenerationConfig, name: str) -> list[str]:
    """Leave out of a generation_config what has no effect and cannot be saved; returns what that
    is, a line each.

    Published models have `temperature` beside `do_sample: false`. transformers loads that with a
    warning, ignores the value when it generates, and refuses to save it once anything else was
    changed, as EOS and PAD are here. Without the value the model generates the same. Raises
    InputError for a config that cannot be saved even so.
    """
    dead: list[str] = []
    if generation.do_sample is not True:
        dead += _SAMPLING_ONLY
    if generation.num_beams in (None, 1):
        dead += _BEAMS_ONLY
    notes: list[str] = []
    if _unsavable(generation):
        for key in dead:
            value = getattr(generation, key, None)
            if value is not None:
                setattr(generation, key, None)
                notes.append(
                    f"generation_config of {name}: {key} {value} has no effect without "
                    f"{'sampling' if key in _SAMPLING_ONLY else 'beams'} and is left out"
                )
    problem = _unsavable(generation)
    if problem:
        fix = "correct its generation_config.json, or remove the file"
        what = f"its generation_config cannot be saved ({problem})"
        raise InputError(Problem(shown(name), "model_name_or_path", what, fix))
    return notes


def _unsavable(generation: GenerationConfig) -> str:
    """Why transformers would refuse to save it; empty if it would not."""
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        return shown(" ".join(str(error).split()))
    return ""


def generation_eos(stop_ids: Sequence[int]) -> int | list[int]:
    """What generation_config holds as EOS: all ids that end a turn, or the only one."""
    if len(stop_ids) == 1:
        return stop_ids[0]
    return list(stop_ids)


def check_vocabulary(
    model: PreTrainedModel, tokenizer: Any, where: str = "recipe", field: str = "model_name_or_path"
) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for; `where` and `field` say what
    named the model.
    """
    weight: Any = model.get_input_embeddings().weight
    # Under ZeRO-3 a partitioned weight shows no rows; the full shape stands beside it.
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} ids, the embedding {rows} rows"
        fix = "use a model and a tokenizer that belong together"
        raise InputError(Problem(where, field, what, fix))


def load_for_inference(
    name: str, dtype: str | None = None, field: str = "model_name_or_path"
) -> InferenceModel:
    """Load a model folder, a run folder, an adapter folder or a Hub name for generation.

    An adapter is put on the base that its `adapter_config.json` names. `dtype` is that of the
    weights; None takes bfloat16 where the device computes it faster, else float32. On a CPU an
    adapter is then merged first, in float32: that is what an export serves. `field`: what named it,
    for errors.
    """
    check_model(name)
    stated = None if dtype is None else getattr(torch, dtype)
    default = torch.bfloat16 if cuda_has_bf16() else torch.float32
    device = PartialState(cpu=not torch.cuda.is_available()).device
    tokenizer = load_tokenizer(name)
    is_adapter = (Path(name) / ADAPTER_CONFIG).is_file()
    # Not left to transformers, which also loads adapters: it lost DoRA's magnitudes with a warning
    # (5.23).
    base_name = base_of_adapter(Path(name)) if is_adapter else name
    with loading(name, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            base_name,
            dtype=stated or default,
            trust_remote_code=False,
            device_map={"": device} if device.type == "cuda" else None,
        )
        kind: Literal["model", "adapter"] = "model"
        if is_adapter:
            match_embeddings(model, Path(name))
            model = PeftModel.from_pretrained(model, name)
            kind = "adapter"
    check_vocabulary(model, tokenizer, name, field)
    if stated is None and device.type == "cpu" and _is_faster_in_bfloat16(model):
        model = _merged_in_bfloat16(model)
    return InferenceModel(model.to(device).eval(), tokenizer, kind)


def _is_faster_in_bfloat16(model: Any) -> bool:
    return cpu_has_bf16() and model.num_parameters() >= SMALLEST_BF16_MODEL


def _merged_in_bfloat16(model: Any) -> Any:
    """The model with bfloat16 parameters, an adapter of its weights merged before.

    Buffers stay: positions are computed from some of them, and need their precision. Adapters that
    are no change of weights, such as a trained prompt, have nothing to merge and stay beside them.
    """
    if isinstance(model, PeftModel) and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def base_of_adapter(folder: Path) -> str:
    """What an adapter calls its base. Raises InputError for one that names none, or no folder."""
    path = folder / ADAPTER_CONFIG
    key = "base_model_name_or_path"
    base = read_json(path, RESTORE).get(key)
    if not isinstance(base, str) or not base:
        what = "the adapter does not name its base"
        fix = "write the name or the folder of the model that it was trained on there"
        raise InputError(Problem(str(path), key, what, fix))
    check_folder(base, f"put it there, or write where it is into {path} ({key})")
    return base


def match_embeddings(model: Any, folder: Path) -> None:
    """Make a base as large as the embeddings that came with the adapter of a folder.

    Raises InputError for a file of weights that cannot be read.
    """
    rows = _rows_of_adapter(folder)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _rows_of_adapter(folder: Path) -> int | None:
    """The rows of a whole embedding among the tensors of an adapter: tokens may have been added."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with loading(str(folder), "adapter"), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name.endswith(("embed_tokens.weight", "lm_head.weight", "base_layer.weight")):
                return int(file.get_slice(name).get_shape()[0])
    return None


def check_model(name: str) -> None:
    """Raise InputError for a folder that holds no model, or two."""
    check_folder(name)
    path = Path(name)
    if not path.is_dir():
        return
    if holds_two_models(path):
        what = "a whole model and an adapter lie in one folder, and which is meant is not clear"
        raise InputError(Problem(name, "model_name_or_path", what, apart(path)))
    model = model_of(path)
    if holds_model(path) and model == path:
        return
    fix = f"name a folder with {CONFIG} or {ADAPTER_CONFIG}"
    if run_folder.is_run_folder(path):
        fix = "let the run finish first"
    elif model != path:
        fix = f"name its newest checkpoint, {model}"
    raise InputError(Problem(name, "model_name_or_path", "the folder holds no model", fix))
