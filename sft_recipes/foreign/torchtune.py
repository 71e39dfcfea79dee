"""torchtune's keys that need code: builders of models and tokenizers, the checkpoint's folder, precision, launchers.

What each does was read in the source of the version that `torchtune.yaml` names.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft_recipes.foreign import torchtune_data
from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off
from sft_recipes.plain_values import is_file

# Words of a model's name that say it was tuned to chat; of Phi there is no other.
_CHAT_WORDS = {"instruct", "chat", "it", "phi"}
# The recipe that a config's own comment runs: `tune run --nproc_per_node 2 lora_finetune_distributed --config ...`.
_DISTRIBUTED = re.compile(r"\b(?:full|lora)_finetune_distributed\b")
_DISTRIBUTED_KEYS = ("custom_sharded_layers", "fsdp_cpu_offload", "fsdp_reshard_after_forward")
# Meta's own files stand in this folder of a model's folder.
_META_FOLDER = "original"


# -- the model ---------------------------------------------------------------------------------------


def _model(reading: Reading, setting: Setting) -> None:
    more = reading.table.more
    parts = str(setting.value).split(".")
    family = parts[2] if len(parts) > 2 else ""
    builder = parts[-1]
    if family in more["multimodal"]:
        reading.block(setting, "a model of images: this project trains text")
    elif parts[:2] != ["torchtune", "models"] or family not in more["families"]:
        reading.block(setting, "a model that is built by code of your own")
    elif "reward" in builder or "classifier" in builder:
        reading.block(setting, "a reward model: this project trains next-token cross-entropy")
    elif builder.startswith("qlora_"):
        ours = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True}
        say = "NF4 of bitsandbytes with nested scales stands in for torchao's NF4: the same scheme, not the same bits"
        reading.differs(setting, say, ours)
    elif builder.startswith("lora_"):
        reading.same(setting, {"use_peft": True})
    else:
        reading.same(setting, {})


def _builder(reading: Reading) -> str:
    return str(reading.value("model._component_")).rpartition(".")[2]


def _is_lora(reading: Reading) -> bool:
    return _builder(reading).startswith(("lora_", "qlora_"))


def _is_quantized(reading: Reading) -> bool:
    """Whether the base is in 4 bits. The adapter on such a base is bfloat16 in TRL, too."""
    return _builder(reading).startswith("qlora_") or bool(reading.value("model.quantize_base"))


def _lora_attention(reading: Reading, setting: Setting) -> None:
    """All layers that get an adapter, for those beside attention are named by two flags."""
    more = reading.table.more
    family = str(reading.value("model._component_")).split(".")[2:3]
    is_fused = bool(family) and family[0] in more["fused_families"]
    layers = more["fused_lora_layers" if is_fused else "lora_layers"]
    names: list[str] = []
    for theirs in setting.value:
        name = layers["attention"].get(theirs)
        if name is None:
            reading.block(setting, f"no layer of attention is called {theirs!r}")
            return
        if name not in names:
            names.append(name)
    if reading.value("model.apply_lora_to_mlp"):
        names += layers["mlp"]
    if reading.value("model.apply_lora_to_output"):
        names.append(layers["output"])
    ours = {"lora_target_modules": names}
    if is_fused:
        say = "query, key and value are one layer in transformers and share an adapter, gate and up as well"
        reading.differs(setting, say, ours)
    else:
        reading.same(setting, ours)


def _lora_flag(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif not reading.value("model.lora_attn_modules"):
        reading.block(setting, "set together with lora_attn_modules")
    else:
        reading.same(setting, {})


def _checkpoint_folder(reading: Reading, setting: Setting) -> None:
    """The model: the folder where it is there, else the name on the Hub that the folder's name says."""
    folder = _model_folder(setting.value)
    if is_file(folder / "config.json"):
        reading.same(setting, {"model_name_or_path": reading.local_path(str(folder))})
        return
    name = _hub_name(reading, folder.name)
    if name is not None:
        say = f"no model here, so {name} of the Hub; --model FOLDER names another"
        reading.differs(setting, say, {"model_name_or_path": name})
        return
    say = "a folder in the format of Hugging Face, with config.json"
    reading.differs(setting, say, {"model_name_or_path": reading.local_path(str(folder))})


def _model_folder(checkpoint: Any) -> Path:
    """The folder of a model, of which a checkpoint may be the part in Meta's format."""
    folder = Path(str(checkpoint))
    if folder.name == _META_FOLDER:
        return folder.parent
    return folder


def _hub_name(reading: Reading, folder: str) -> str | None:
    """The name on the Hub of a model's folder: as the config's own comment downloads it, else by how it begins."""
    text = reading.path.read_text(encoding="utf-8")
    downloaded = re.search(rf"tune download (\S+/{re.escape(folder)})\s", text)
    if downloaded is not None:
        return downloaded[1]
    for beginning, organization in reading.table.more["organizations"].items():
        if folder.startswith(beginning):
            return f"{organization}/{folder}"
    return None


def _dtype(reading: Reading, setting: Setting) -> None:
    """torchtune knows no mixed precision: weights, gradients and the optimizer are of this type."""
    if setting.value == "fp32":
        reading.same(setting, {"dtype": "float32", "bf16": False})
    elif setting.value != "bf16":
        reading.block(setting, f"weights in {setting.value}: bf16 and fp32 are taken")
    elif _is_lora(reading) and not _is_quantized(reading):
        say = "the base is bfloat16 as there; the adapter's weights are float32 here"
        reading.differs(setting, say, {"dtype": "bfloat16"})
    else:
        reading.same(setting, {"dtype": "bfloat16"})


# -- the tokenizer -----------------------------------------------------------------------------------


def _tokenizer(reading: Reading, setting: Setting) -> None:
    """The text that rows are written in, which torchtune's tokenizers make themselves."""
    name = str(setting.value).rpartition(".")[2]
    known = reading.table.more["tokenizers"].get(name)
    if known is None:
        reading.block(setting, f"{setting.value!r} writes a text that is not known here")
        return
    writes = known["writes"]
    if reading.value("tokenizer.prompt_template"):
        reading.same(setting, {})
    elif _has_alpaca(reading):
        _alpaca_text(reading, setting, name, writes)
    elif writes is None:
        say = "the model's own chat template, or `instruction` where it has none; there the turns stand bare"
        reading.differs(setting, say)
        reading.find(
            setting,
            f"`{name}` writes nothing between prompt and answer: neither marks where it ends",
        )
    elif _is_tuned(reading):
        say = f"the model's own chat template; there {writes}, without a system turn of its own"
        reading.differs(setting, say)
    else:
        say = f"the model's own chat template, or `instruction` where it has none; there {writes}"
        reading.differs(setting, say)
    if known["end"] is None:
        what = f"`{name}` writes no <|im_end|> behind an answer: the end of a turn is never trained"
        reading.find(setting, what)


def _has_alpaca(reading: Reading) -> bool:
    return any(builder.get("alpaca") for builder in torchtune_data.builders(reading))


def _alpaca_text(reading: Reading, setting: Setting, name: str, writes: str | None) -> None:
    if writes is None:
        reading.same(setting, {"chat_template": "alpaca"})
        return
    what = f"the Alpaca prompt stands inside {writes}: the model is asked in two formats at once"
    reading.find(setting, what)
    if _is_tuned(reading):
        say = f"the model's own chat template, without the Alpaca prompt that stands inside {writes} there"
        reading.differs(setting, say)
    else:
        say = f"rows stand in the Alpaca prompt alone; there it stands inside {writes}"
        reading.differs(setting, say, {"chat_template": "alpaca"})


def _is_tuned(reading: Reading) -> bool:
    """Whether the model's name says that it was tuned to chat."""
    folder = _model_folder(reading.value("checkpointer.checkpoint_dir"))
    words = re.split(r"[-_.]", folder.name.lower())
    return not _CHAT_WORDS.isdisjoint(words)


def _prompt_template(reading: Reading, setting: Setting) -> None:
    """Texts around a turn, by role: a chat template where the tokenizer writes nothing else."""
    more = reading.table.more
    texts = setting.value
    if isinstance(texts, str):
        if texts.endswith(("Llama2ChatTemplate", "MistralChatTemplate")):
            reading.differs(setting, "the chat template of the model's own tokenizer")
            return
        texts = more["prompt_templates"].get(texts)
    if not isinstance(texts, Mapping):
        reading.block(
            setting, "code of your own: write it as a chat template, --chat_template FILE.jinja"
        )
        return
    name = str(reading.value("tokenizer._component_")).rpartition(".")[2]
    if name not in more["bare_tokenizers"]:
        why = f"texts inside the turns of `{name}`: write them as a chat template, --chat_template FILE.jinja"
        reading.block(setting, why)
        return
    file = reading.write_file("chat_template.jinja", _jinja(texts))
    reading.same(setting, {"chat_template": file})


def _jinja(texts: Mapping[str, Any]) -> str:
    """The template that puts these texts around the turns, BOS in front of each round and EOS behind each answer."""
    lines = ["{%- for message in messages %}"]
    lines += [
        "{%- if loop.first or messages[loop.index0 - 1].role == 'assistant' %}{{- bos_token }}{%- endif %}"
    ]
    for role, (before, after) in texts.items():
        content = f"{json.dumps(before)} + message.content + {json.dumps(after)}"
        lines += [f"{{%- if message.role == '{role}' %}}{{{{- {content} }}}}{{%- endif %}}"]
    named = json.dumps(list(texts))
    lines += [f"{{%- if message.role not in {named} %}}{{{{- message.content }}}}{{%- endif %}}"]
    lines += ["{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}"]
    lines += ["{%- endfor %}"]
    return "\n".join(lines) + "\n"


def _max_seq_len(reading: Reading, setting: Setting) -> None:
    say = "longer rows are dropped and counted; there they are cut: overlength"
    reading.differs(setting, say, {"max_length": setting.value})
    what = "longer rows are cut: an answer ends in the middle of a sentence"
    if str(reading.value("tokenizer._component_")).endswith(
        ("llama2_tokenizer", "mistral_tokenizer", "gemma_tokenizer")
    ):
        # `truncate` writes EOS over the last token, and the mask of these tokenizers trains it.
        what += ", and its last token becomes EOS: a stop there is trained"
    reading.find(setting, what)


# -- steps -------------------------------------------------------------------------------------------


def _batch_size(reading: Reading, setting: Setting) -> None:
    say = "the last rows of an epoch that fill no batch are trained here, left out there"
    reading.differs(setting, say, {"per_device_train_batch_size": setting.value})


def _epochs(reading: Reading, setting: Setting) -> None:
    # `save_checkpoint` is called at the end of each epoch, and nowhere else.
    reading.same(setting, {"num_train_epochs": setting.value, "save_strategy": "epoch"})


def _steps_of_epoch(reading: Reading, setting: Setting) -> None:
    epochs = reading.value("epochs")
    if not isinstance(epochs, int) or not isinstance(setting.value, int):
        reading.block(setting, "a number of steps, and of epochs, is needed")
        return
    steps = setting.value * epochs
    if epochs == 1:
        reading.same(setting, {"max_steps": steps})
    else:
        say = f"the run ends after {steps} steps, without beginning the rows anew every {setting.value}"
        reading.differs(setting, say, {"max_steps": steps})


def _betas(reading: Reading, setting: Setting) -> None:
    if isinstance(setting.value, list) and len(setting.value) == 2:
        first, second = setting.value
        reading.same(setting, {"adam_beta1": first, "adam_beta2": second})
    else:
        reading.block(setting, "two numbers are needed")


def _cpu_offload(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    else:
        say = "`train --launch fsdp2` keeps the weights on the GPUs; `--launch zero3_offload` moves them to the CPU"
        reading.differs(setting, say)


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    "model._component_": _model,
    "model.lora_attn_modules": _lora_attention,
    "model.apply_lora_to_mlp": _lora_flag,
    "model.apply_lora_to_output": _lora_flag,
    "checkpointer.checkpoint_dir": _checkpoint_folder,
    "dtype": _dtype,
    "tokenizer._component_": _tokenizer,
    "tokenizer.prompt_template": _prompt_template,
    "tokenizer.max_seq_len": _max_seq_len,
    "dataset": torchtune_data.read_data_sets,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "max_steps_per_epoch": _steps_of_epoch,
    "optimizer.betas": _betas,
    "fsdp_cpu_offload": _cpu_offload,
}


# -- the whole ---------------------------------------------------------------------------------------


def finish(reading: Reading) -> None:
    """What takes more than one key: rows of any length, LoRA's defaults, the launcher."""
    recipe = reading.recipe
    if reading.value("tokenizer.max_seq_len") is None:
        reading.put_default("max_length", None, "rows of any length are trained")
    if recipe.get("use_peft"):
        for key, value in reading.table.more["lora_defaults"].items():
            if key not in recipe:
                reading.put_default(key, value, "")
    if _is_lora(reading) and reading.value("optimizer_in_bwd"):
        reading.find(reading.setting("optimizer_in_bwd"), "recipes of LoRA never read it")
    _choose_launch(reading)
    if "dataset_name" not in recipe and "datasets" not in recipe and not reading.blocked:
        setting = reading.setting("model") or next(iter(reading.settings.values()))
        reading.block(setting, "no `dataset` is named")


def _choose_launch(reading: Reading) -> None:
    """FSDP where a key of it is set, or where the config's own comment runs a distributed recipe."""
    has_key = any(reading.setting(key) for key in _DISTRIBUTED_KEYS)
    if has_key or _DISTRIBUTED.search(reading.path.read_text(encoding="utf-8")):
        reading.launch = "fsdp2_qlora" if reading.recipe.get("load_in_4bit") else "fsdp2"
