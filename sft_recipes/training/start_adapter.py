"""The adapter that a run goes on from (`adapter_name_or_path`): its settings, whether it fits, its weights.

It is made as the adapter of any run is, with its own `adapter_config.json` in the place of the recipe's `lora_` keys,
and then filled with what it learned. What launches, quantization and checkpoints do to adapters holds for it as well.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file

from sft_recipes import run_folder
from sft_recipes.data.opening import loading
from sft_recipes.errors import InputError, Problem
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.models import lora_config
from sft_recipes.path_contents import fingerprint, read_contents
from sft_recipes.recipe import Recipe
from sft_recipes.release.finished_run import ADAPTER
from sft_recipes.release.local_paths import is_hub_name
from sft_recipes.training.arguments import REFUSALS, reason

KEY = "adapter_name_or_path"
_MODEL = "model_name_or_path"
_PICKLED = "adapter_model.bin"
# What scales that which an adapter learned, by the recipe's keys: another value makes another adapter of it.
_SCALES = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# Tensors that are not zero before any training. While all others are, the adapter does nothing.
_NEVER_ZERO = re.compile(r"lora_(embedding_)?A|lora_magnitude")


def peft_config(recipe: Recipe, model: Any) -> LoraConfig | None:
    """The LoRA that the model gets: that of the adapter to go on from, or the recipe's; None for full fine-tuning.

    Raises InputError for an adapter that cannot be gone on from, or that the recipe contradicts.
    """
    if recipe.adapter_name is None:
        return lora_config(recipe, model)
    folder = _folder(recipe)
    with loading(recipe.adapter_name, "adapter", KEY):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        what = f"{recipe.adapter_name} is no LoRA but {type(config).__name__}"
        raise InputError(_problem(recipe, what, "name a LoRA adapter"))
    contradictions = list(_contradictions(recipe, config))
    if contradictions:
        raise InputError(contradictions)
    config.inference_mode = False
    config.task_type = "CAUSAL_LM"
    # Dropout is how a stage is trained, not what the adapter is.
    config.lora_dropout = recipe.model.get("lora_dropout", config.lora_dropout)
    return config


def _contradictions(recipe: Recipe, config: LoraConfig) -> Iterator[Problem]:
    for key, name in _SCALES.items():
        stated = recipe.model.get(key)
        learned = getattr(config, name)
        if stated is not None and stated != learned:
            what = f"the adapter in {recipe.adapter_name} was trained with {json.dumps(learned)}"
            fix = f"write {key}: {json.dumps(learned)}, or remove the key"
            yield Problem(recipe.place(key), key, what, fix)


def _problem(recipe: Recipe, what: str, fix: str) -> Problem:
    return Problem(recipe.place(KEY), KEY, what, fix)


def _folder(recipe: Recipe) -> Path:
    """The folder of the adapter; of one on the Hub configuration and weights are downloaded.

    Raises InputError for a folder that holds no adapter in safetensors.
    """
    name = str(recipe.adapter_name)
    folder = Path(name)
    if not folder.is_dir():
        run_folder.require_there(name)
        with loading(name, "adapter", KEY):
            folder = Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER]))
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER).is_file():
        return folder
    what = f"{name} holds no adapter ({ADAPTER_CONFIG} and {ADAPTER})"
    fix = "name the folder of a LoRA run, of one of its checkpoints, or of an adapter"
    if (folder / _PICKLED).is_file():
        what = f"the weights in {name} are pickled ({_PICKLED}), which can hold code"
        fix = (
            'write them anew: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{folder / _PICKLED}', weights_only=True), '{folder / ADAPTER}')\""
        )
    elif (folder / "config.json").is_file():
        what = f"{name} holds a whole model, no adapter"
        fix = f"write {_MODEL}: {name}, and remove {KEY}"
    elif run_folder.is_run_folder(folder):
        fix = "let the run finish first, or name one of its checkpoints"
    raise InputError(_problem(recipe, what, fix))


def start_problem(recipe: Recipe, model: Any) -> Problem | None:
    """Why the adapter cannot be gone on from on this model, of shapes alone and with an adapter like it."""
    name = recipe.adapter_name
    weights = _weights(recipe)
    learned = [tensor for key, tensor in weights.items() if not _NEVER_ZERO.search(key)]
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        what = f"the adapter in {name} holds NaN or infinite numbers"
        return _problem(recipe, what, "name an earlier checkpoint, or train it again")
    if not any(bool(tensor.any()) for tensor in learned):
        what = f"the adapter in {name} changes nothing: it holds no trained number"
        return _problem(recipe, what, "name one that was trained, or remove the key")
    other = _other_base(recipe) or _fill(model, weights)
    if other:
        what = f"the adapter in {name} does not belong to {recipe.model_name}: {other}"
        return _problem(recipe, what, f"name its base in {_MODEL}, or another adapter")
    return None


def _other_base(recipe: Recipe) -> str:
    """What says that the adapter was trained on another base than the recipe's; nothing where that is not known.

    Names on the Hub are compared as names, folders by what they hold. Of one of each only shapes tell.
    """
    folder = _folder(recipe)
    trained_on = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    base = Path(recipe.model_name)
    if not base.is_dir():
        is_other = is_hub_name(trained_on) and trained_on != recipe.model_name
        return f"it was trained on {trained_on}" if is_other else ""
    known = None
    run = run_folder.run_of(folder)
    if run is not None:
        known = read_contents(run).get(_MODEL)
    elif Path(trained_on).is_dir():
        known = fingerprint(Path(trained_on))
    if known is None or known == fingerprint(base):
        return ""
    return f"it was trained on {trained_on}, whose weights or config are others"


def _weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    with loading(str(recipe.adapter_name), "adapter", KEY):
        return load_file(_folder(recipe) / ADAPTER)


def _fill(model: Any, weights: Mapping[str, torch.Tensor]) -> str:
    """Give the model's adapter its weights; what does not fit, in words, or nothing."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        # torch warns that a model of shapes alone takes no numbers.
        warnings.simplefilter("ignore")
        try:
            result: Any = set_peft_model_state_dict(model, dict(weights))
        except REFUSALS as error:
            return reason(error)
    if result.unexpected_keys:
        return f"the model has no {result.unexpected_keys[0]}"
    missing = sorted(trained.intersection(result.missing_keys))
    return f"{ADAPTER} has no {missing[0]}" if missing else ""


def load_start(recipe: Recipe, model: Any) -> None:
    """Fill the adapter that the model was given with the weights of the one that the run goes on from, if it does."""
    if recipe.adapter_name is None:
        return
    what = _fill(model, _weights(recipe))
    if what:
        raise InputError(_problem(recipe, what, "name another adapter"))


def start_notes(recipe: Recipe, template: str) -> Iterator[str]:
    """What a person should know of the adapter before the run, which renders with this chat template."""
    if recipe.adapter_name is None:
        return
    own = _folder(recipe) / "chat_template.jinja"
    if own.is_file() and own.read_text(encoding="utf-8").strip() != template.strip():
        yield (
            f"the adapter in {recipe.adapter_name} was trained with another chat template; "
            f"to keep it, write chat_template: {own}"
        )
