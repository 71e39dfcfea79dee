"""An exported folder for transformers 4.57: what that version reads, beside what version 5 writes.

Version 5 says in one field, `rope_parameters`, what 4.57 reads from several, and 4.57 takes its
defaults in silence where those are missing. Version 5 reads the older fields, too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.text_files import RESTORE, read_json

CHECK = "transformers 4.57"
# Which models and ropes 4.57 was seen to compute as version 5 does.
_SEEN: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
# Fields that 4.57 calls otherwise in these models.
_OLDER_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
# Models whose sliding layers have a theta of their own there, or that of the others; in both no
# scaling reaches them.
_OWN_LOCAL_THETA = ("gemma3_text", "gemma3n_text")
_SHARED_LOCAL_THETA = ("olmo3",)
# What a tokenizer's class decides where its configuration does not.
_CLASS_DECIDES = ("model_input_names", "padding_side", "truncation_side")


class _NotInOlder(Exception):
    """4.57 has no words for this."""


def write_for_older(folder: Path) -> TemplateCheck:
    """Add to a saved folder what 4.57 reads. The check says whether that version loads the model,
    and if not, why it needs version 5.
    """
    _edit(folder / "tokenizer_config.json", _older_tokenizer(folder))
    path = folder / "config.json"
    config = read_json(path, RESTORE)
    try:
        _require_seen(config, folder)
        for part in _parts(config):
            part.update(_older_fields(part))
    except _NotInOlder as reason:
        return TemplateCheck(CHECK, "note", f"needs transformers 5: {reason}")
    _edit(path, config)
    return TemplateCheck(CHECK, "ok", "reads the folder, too")


def _edit(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _older_tokenizer(folder: Path) -> dict[str, Any]:
    """The configuration of a saved tokenizer in words of both versions."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, RESTORE)
    if not (folder / "tokenizer.json").is_file():
        return config
    tokenizer = load_tokenizer(str(folder))
    for name in _CLASS_DECIDES:
        config.setdefault(name, getattr(tokenizer, name))
    # The class that takes tokenizer.json as it stands. 4.57 has no TokenizersBackend, and others
    # put rules of their own on top.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _require_seen(config: Mapping[str, Any], folder: Path) -> None:
    """Raise _NotInOlder for a model that 4.57 does not have, or computes otherwise."""
    model_type = config.get("model_type")
    if model_type not in _SEEN["model_types"]:
        raise _NotInOlder(f"4.57 was not seen to compute a {model_type} model alike")
    if not (folder / "tokenizer.json").is_file():
        raise _NotInOlder("the tokenizer has no tokenizer.json")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's configuration, and those of the models inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            yield from _parts(value)


def _older_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What 4.57 reads and version 5 does not write, under the names that 4.57 has for it."""
    model_type = config.get("model_type", "")
    fields: dict[str, Any] = {}
    if config.get("rope_parameters"):
        fields = _rope_fields(model_type, config["rope_parameters"])
    names = _OLDER_NAMES.get(model_type, {})
    for name, older_name in names.items():
        if name in fields:
            fields[older_name] = fields.pop(name)
        elif name in config:
            fields[older_name] = config[name]
    return fields


def _rope_fields(model_type: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like. Raises _NotInOlder for what they cannot say."""
    by_layer: Mapping[str, Any] = parameters
    if not all(isinstance(value, dict) for value in parameters.values()):
        by_layer = {"full_attention": parameters}
    full = by_layer.get("full_attention")
    if full is None or not by_layer.keys() <= {"full_attention", "sliding_attention"}:
        raise _NotInOlder(f"4.57 has no rope for {', '.join(by_layer)}")
    if full["rope_type"] not in _SEEN["rope_types"]:
        raise _NotInOlder(f"4.57 has no rope of type {full['rope_type']}")
    fields = _scaled(model_type, full)
    sliding = by_layer.get("sliding_attention", full)
    theta = sliding["rope_theta"]
    is_plain = sliding == {"rope_type": "default", "rope_theta": theta}
    if model_type in _OWN_LOCAL_THETA:
        fields["rope_local_base_freq"] = theta
    elif model_type in _SHARED_LOCAL_THETA:
        is_plain = is_plain and theta == full["rope_theta"]
    else:
        is_plain = sliding == full
    if not is_plain:
        raise _NotInOlder("4.57 has no such rope for its sliding layers")
    return fields


def _scaled(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields for one rope."""
    scaling = dict(rope)
    fields = {"rope_theta": scaling.pop("rope_theta")}
    if "partial_rotary_factor" in scaling:
        fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if scaling["rope_type"] == "longrope" and model_type == "phi3":
        # It takes three keys there and refuses any other.
        length = "original_max_position_embeddings"
        fields[length] = scaling.pop(length)
        scaling["type"] = scaling.pop("rope_type")
    if scaling != {"rope_type": "default"}:
        fields["rope_scaling"] = scaling
    return fields
