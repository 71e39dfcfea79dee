"""Load models, make them and their tokenizers agree on the special tokens, and describe the LoRA that is put on top."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_recipes import run_folder
from sft_recipes.data.opening import check_folder, load_tokenizer, not_loadable
from sft_recipes.devices import accelerator_has_bf16, computes_on_cpu, cuda_has_bf16
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import Recipe

# Encoders for images, sound and video, and what projects them into the text model; no text row feeds them.
_ENCODER = re.compile(
    r"(vision|visual|image|audio|speech|video|multi_modal_projector|multimodal_projector)"
)


@dataclass(frozen=True)
class InferenceModel:
    """A model ready to generate, its tokenizer, and whether it is an adapter on a base."""

    model: PreTrainedModel
    tokenizer: Any
    kind: str  # "model", "adapter"


def load_weights(name: str, dtype: Any, revision: str | None = None, **settings: Any) -> Any:
    """The model of a local folder or Hub name. Raises InputError if there is none to be had."""
    _check_name(name)
    # Left open, whether to trust remote code is asked of whoever sits at the terminal.
    arguments = {
        "revision": revision or "main",
        "dtype": dtype,
        "trust_remote_code": False,
        **settings,
    }
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise not_loadable(name, "model", error) from error


def load_model(recipe: Recipe) -> PreTrainedModel:
    """The recipe's base model in the chosen precision, quantized where the recipe says so.

    Weights are float32 for full fine-tuning (bf16 runs under autocast) and bfloat16 under LoRA where the device
    supports it, unless the recipe states `dtype`.
    """
    from trl import ModelConfig, get_quantization_config

    config = ModelConfig(**{**recipe.model, "dtype": model_dtype(recipe)})
    quantization = get_quantization_config(config)
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install 'sft-recipes[qlora]'"
        raise InputError(Problem("recipe", "load_in_4bit", "bitsandbytes is not installed", fix))
    settings = {
        "attn_implementation": config.attn_implementation,
        "quantization_config": quantization,
        "device_map": placement(recipe),
    }
    model = load_weights(recipe.model_name, config.dtype, config.model_revision, **settings)
    keep_4bit_layers_in_place(model)
    freeze_unfed_encoders(model)
    return model


def model_dtype(recipe: Recipe) -> str:
    """The precision of the weights: as stated, else float32, or bfloat16 for a frozen base on a device that has it."""
    stated = recipe.model.get("dtype")
    if stated not in (None, "auto"):
        return str(stated)
    frozen_base = bool(recipe.model.get("use_peft"))
    return "bfloat16" if frozen_base and accelerator_has_bf16(recipe) else "float32"


def placement(recipe: Recipe) -> dict[str, torch.device] | None:
    """Where weights are loaded to at once, as transformers' `device_map`; None: to the CPU, or as a launcher decides.

    FSDP and DeepSpeed shard the weights, and put them where they belong themselves.
    """
    sharded = any(
        os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")
    )
    if sharded or computes_on_cpu(recipe) or not torch.cuda.is_available():
        return None
    return {"": PartialState().device}


def keep_4bit_layers_in_place(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    Measured with 0.50.2: a forward without gradients repacks the weights in place, and training after it is silently
    wrong. Leaving that path off is exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - bitsandbytes' own attribute


def unfed_encoders(model: torch.nn.Module) -> list[str]:
    """Names of the outermost modules that only images, sound or video would pass through."""
    found: list[str] = []
    for name, _ in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if _ENCODER.search(last) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def freeze_unfed_encoders(model: torch.nn.Module) -> None:
    """Text rows give encoders no gradient; under DDP a trainable tensor without one stops the run."""
    for name in unfed_encoders(model):
        model.get_submodule(name).requires_grad_(False)


def lora_config(recipe: Recipe, model: PreTrainedModel) -> Any | None:
    """peft's `LoraConfig` from the recipe's `lora_*` keys, or None. Targets all linear layers unless stated.

    Encoders that text does not feed are left out: with `all-linear` peft would adapt them, too.
    """
    if not recipe.model.get("use_peft"):
        return None
    from trl import ModelConfig, get_peft_config

    config = ModelConfig(
        **{"lora_target_modules": ["all-linear"], **recipe.model, "dtype": model_dtype(recipe)}
    )
    lora: Any = get_peft_config(config)
    # TRL makes a list of one a string, which peft reads as a pattern of full names: a module's own name matches none.
    if isinstance(lora.target_modules, str) and lora.target_modules.isidentifier():
        lora.target_modules = [lora.target_modules]
    if encoders := unfed_encoders(model):
        lora.exclude_modules = "|".join(rf"(.*\.)?{re.escape(name)}\..*" for name in encoders)
    return lora


def agree_on_special_tokens(
    model: PreTrainedModel, tokenizer: Any, stop_ids: Sequence[int]
) -> None:
    """Write EOS, PAD and every end of turn into config and generation_config, as the tokenizer has them."""
    text_config = model.config.get_text_config()
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        text_config.bos_token_id = tokenizer.bos_token_id
    generation = model.generation_config
    if generation is None:
        raise InputError(
            Problem("recipe", "model_name_or_path", "the model cannot generate", "use a causal LM")
        )
    generation.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id


def check_vocabulary(
    model: PreTrainedModel, tokenizer: Any, where: str = "recipe", field: str = "model_name_or_path"
) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for; `where` and `field` say what named the model."""
    weight: Any = model.get_input_embeddings().weight
    # Under ZeRO-3 a partitioned weight shows no rows; the full shape stands beside it.
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} ids, the embedding {rows} rows"
        raise InputError(
            Problem(where, field, what, "use a model and a tokenizer that belong together")
        )


def load_for_inference(name: str) -> InferenceModel:
    """Load a model folder, a run folder, an adapter folder or a Hub name for generation, in evaluation mode.

    An adapter is put on the base that its `adapter_config.json` names.
    """
    _check_name(name)
    dtype = torch.bfloat16 if cuda_has_bf16() else torch.float32
    device = PartialState(cpu=not torch.cuda.is_available()).device
    tokenizer = load_tokenizer(name)
    adapter = (Path(name) / "adapter_config.json").is_file()
    try:
        # Not left to transformers, which also loads adapters: it lost DoRA's magnitudes with a warning (5.23).
        base_name = PeftConfig.from_pretrained(name).base_model_name_or_path if adapter else name
        model: Any = AutoModelForCausalLM.from_pretrained(
            base_name,
            dtype=dtype,
            trust_remote_code=False,
            device_map={"": device} if device.type == "cuda" else None,
        )
        if adapter:
            model = PeftModel.from_pretrained(model, name)
    except (OSError, ValueError) as error:
        raise not_loadable(name, "model", error) from error
    return InferenceModel(model.to(device).eval(), tokenizer, "adapter" if adapter else "model")


def _check_name(name: str) -> None:
    check_folder(name)
    path = Path(name)
    if path.is_dir() and not any(
        (path / file).is_file() for file in ("config.json", "adapter_config.json")
    ):
        unfinished = run_folder.is_run_folder(path)
        fix = (
            "let the run finish first"
            if unfinished
            else "name a folder with config.json or adapter_config.json"
        )
        raise InputError(Problem(name, "model_name_or_path", "the folder holds no model", fix))
