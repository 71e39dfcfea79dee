"""axolotl's keys that need code: adapters, how often to evaluate and save, templates, launchers, plugins.

What each does was read in the source of the version that `axolotl.yaml` names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.foreign import axolotl_data, axolotl_schedule, launch_files, remote_code
from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off


def _base_model(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"model_name_or_path": reading.local_path(str(setting.value))})


def _lora_model_dir(reading: Reading, setting: Setting) -> None:
    ours = {"adapter_name_or_path": reading.local_path(str(setting.value))}
    reading.same(setting, ours)


def _output_dir(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"output_dir": reading.local_path(str(setting.value))})


def _adapter(reading: Reading, setting: Setting) -> None:
    if setting.value not in ("lora", "qlora"):
        reading.block(setting, f"{setting.value!r} is no LoRA")
        return
    ours = {"use_peft": True}
    if not reading.value("lora_target_modules") and not reading.value("lora_target_linear"):
        reading.find(
            setting, "neither lora_target_linear nor lora_target_modules: no layer is named"
        )
    reading.same(setting, ours)


def _load_in_4bit(reading: Reading, setting: Setting) -> None:
    if not setting.value:
        reading.no_effect(setting, "switched off")
    elif not reading.value("adapter"):
        reading.block(
            setting, "a quantized model is only trained through LoRA; axolotl refuses it as well"
        )
    else:
        # axolotl quantizes its quantization constants, too, unless it is told not to.
        nested = reading.value("bnb_config_kwargs.bnb_4bit_use_double_quant")
        reading.same(setting, {"load_in_4bit": True, "use_bnb_nested_quant": nested is not False})


def _bnb_config(reading: Reading, setting: Setting) -> None:
    for leaf in list(reading.below(setting.key)):
        name = leaf.key.rpartition(".")[2]
        if name in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage"):
            reading.same(leaf, {name: leaf.value})
        elif name == "bnb_4bit_use_double_quant":
            reading.same(leaf, {})
        else:
            reading.block(leaf, "a setting of quantization that a recipe has not")


def _train_on_inputs(reading: Reading, setting: Setting) -> None:
    if not setting.value:
        reading.same(setting, {"train_on": "assistant"})
        return
    reading.find(setting, "prompts are trained: the model also learns to write questions")
    kinds = {str(entry.get("type")) for entry in reading.value("datasets") or []}
    if "chat_template" in kinds:
        say = (
            "every token is trained, the headers of turns as well; axolotl trains contents and ends"
        )
        reading.differs(setting, say, {"train_on": "all"})
    else:
        reading.same(setting, {"train_on": "all"})


def _load_in_8bit(reading: Reading, setting: Setting) -> None:
    if not setting.value:
        reading.no_effect(setting, "switched off")
    elif reading.value("adapter") != "lora":
        reading.block(
            setting, "a quantized model is only trained through LoRA; axolotl refuses it as well"
        )
    else:
        reading.same(setting, {"load_in_8bit": True})


def _lora_target_linear(reading: Reading, setting: Setting) -> None:
    if not setting.value:
        reading.no_effect(setting, "switched off")
    elif reading.value("lora_target_modules"):
        reading.no_effect(setting, "all linear layers hold those of lora_target_modules")
    else:
        reading.same(setting, {"lora_target_modules": ["all-linear"]})


def _lora_target_modules(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "none are named")
    elif reading.value("lora_target_linear"):
        reading.same(setting, {"lora_target_modules": ["all-linear"]})
    elif isinstance(setting.value, str):
        reading.same(setting, {"lora_target_modules": [setting.value]})
    else:
        reading.same(setting, {"lora_target_modules": setting.value})


def _bf16(reading: Reading, setting: Setting) -> None:
    full = not reading.value("adapter")
    say = ""
    ours: dict[str, Any] = {}
    if setting.value is True or setting.value == "full":
        ours["bf16"] = True
    elif setting.value == "auto" and reading.value("fp16"):
        reading.no_effect(setting, "fp16 is set")
        return
    elif setting.value == "auto":
        say = "bfloat16 where the machine has it, which is what is detected without a key"
    elif setting.value is False and not reading.value("fp16"):
        ours = {"bf16": False, "dtype": "float32"}
    if setting.value and full and not _keeps_float32(reading):
        # `resolve_dtype` loads the weights themselves in bfloat16 and hands them to the optimizer.
        ours["dtype"] = "bfloat16"
    if ours:
        reading.same(setting, ours)
    else:
        reading.no_effect(setting, say or "switched off")


def _keeps_float32(reading: Reading) -> bool:
    """Whether the optimizer has float32 weights all the same: ZeRO keeps them, accelerate makes them for FSDP1."""
    if reading.value("deepspeed"):
        return True
    version = reading.value("fsdp_version") or reading.value("fsdp_config.fsdp_version") or 1
    return bool(reading.value("fsdp") or reading.value("fsdp_config")) and str(version) != "2"


def _bfloat16(reading: Reading, setting: Setting) -> None:
    if setting.value:
        reading.same(setting, {"dtype": "bfloat16"})
    else:
        reading.no_effect(setting, "switched off")


def _batch_size(reading: Reading, setting: Setting) -> None:
    steps = int(setting.value) // int(reading.value("micro_batch_size"))
    reading.same(setting, {"gradient_accumulation_steps": max(steps, 1)})


def _optim_args(reading: Reading, setting: Setting) -> None:
    arguments = setting.value
    if isinstance(arguments, Mapping):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    reading.same(setting, {"optim_args": arguments})


def _adam_eps(reading: Reading, setting: Setting) -> None:
    reading.no_effect(setting, "axolotl never reads it")
    reading.find(setting, "axolotl has no such key: did you mean 'adam_epsilon'?")


# -- data ------------------------------------------------------------------------------------------------


def _val_set_size(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "no rows are held out")
    else:
        ours = {"eval_split": setting.value}
        say = "eval_split: another seeded draw, rows with one prompt stay together"
        reading.differs(setting, say, ours)


def _test_datasets(reading: Reading, setting: Setting) -> None:
    trained = reading.value("datasets") or []
    held_out = setting.value[0] if isinstance(setting.value, list) and setting.value else {}
    one_of_each = len(trained) == 1 and len(setting.value) == 1
    if one_of_each and trained[0].get("path") == held_out.get("path") and held_out.get("split"):
        reading.same(setting, {"dataset_test_split": held_out["split"]})
        if held_out["split"] == trained[0].get("split", "train"):
            reading.find(setting, "the rows that are evaluated are those that are trained")
        return
    path = held_out.get("path", "FILE")
    say = f"not evaluated during training; afterwards: sft-recipes evaluate RUN --data {path}"
    reading.differs(setting, say)
    reading.evaluates_elsewhere = True


# -- templates and tokens ----------------------------------------------------------------------------


def _chat_template(reading: Reading, setting: Setting) -> None:
    kinds = {str(entry.get("type")) for entry in reading.value("datasets") or []}
    types = reading.table.more["types"]
    if kinds <= types.keys() and not kinds & {"chat_template", "sharegpt"}:
        reading.no_effect(setting, f"rows of type {', '.join(sorted(kinds))} are not written in it")
        reading.find(
            setting,
            "the template is set and no rows are written in it: trained on one text, served by another",
        )
        return
    axolotl_data.take_template(reading, setting, str(setting.value))


def _chat_template_jinja(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"chat_template": reading.jinja_file(str(setting.value))})


def _special_tokens(reading: Reading, setting: Setting) -> None:
    for leaf in list(reading.below(setting.key)):
        name = leaf.key.rpartition(".")[2]
        if leaf.value is None:
            reading.no_effect(leaf, "null: not set")
        elif name == "pad_token":
            reading.no_effect(
                leaf, "PAD is one of the tokenizer's own tokens other than EOS, and never trained"
            )
        elif name == "eos_token":
            reading.differs(
                leaf, "EOS follows from the chat template and the tokenizer; no token is added"
            )
        elif name in ("bos_token", "unk_token"):
            reading.differs(leaf, "the tokenizer's own is kept; no token is added")
        else:
            reading.block(leaf, "the vocabulary never grows")


# -- the rest ------------------------------------------------------------------------------------------


def _plugins(reading: Reading, setting: Setting) -> None:
    known = reading.table.more["plugins"]
    for leaf in list(reading.below(setting.key)):
        parts = str(leaf.value).split(".")
        name = parts[2] if len(parts) > 2 else str(leaf.value)
        if name in known["harmless"]:
            reading.no_effect(leaf, "a faster way to the same numbers, or a tracker")
        elif name in known["refused"]:
            reading.block(leaf, known["refused"][name])
        else:
            reading.block(leaf, "code that is not axolotl's own")


def _wandb_project(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value) or reading.value("use_wandb") is False:
        reading.no_effect(setting, "switched off")
    else:
        say = f"reported to wandb; set WANDB_PROJECT={setting.value} in the environment"
        reading.differs(setting, say, {"report_to": ["wandb"]})


def _tracker(name: str) -> Callable[[Reading, Setting], None]:
    def rule(reading: Reading, setting: Setting) -> None:
        if is_off(setting.value):
            reading.no_effect(setting, "switched off")
        else:
            reading.same(setting, {"report_to": [name]})

    return rule


def _hub_model_id(reading: Reading, setting: Setting) -> None:
    say = "pushed once, when the run is finished, to a private repository"
    reading.differs(setting, say, {"hub_model_id": setting.value, "push_to_hub": True})


def _deepspeed(reading: Reading, setting: Setting) -> None:
    launch_files.use_deepspeed(reading, setting, quantized=bool(reading.value("load_in_4bit")))


def _fsdp(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    reading.launch = "fsdp2_qlora" if reading.value("load_in_4bit") else "fsdp2"
    say = f"`train --launch {reading.launch}`: FSDP2, every layer sharded over all processes"
    offloads = any(
        leaf.key.endswith("offload_params") and leaf.value for leaf in reading.settings.values()
    )
    if offloads:
        say += (
            "; nothing moves to the CPU unless a copy of that file says `fsdp_offload_params: true`"
        )
    reading.differs(setting, say)


def _dp_shard_size(reading: Reading, setting: Setting) -> None:
    if setting.value in (None, 1):
        reading.no_effect(setting, "one process holds the model")
    else:
        _fsdp(reading, setting)


def _lone_size(reading: Reading, setting: Setting) -> None:
    if setting.value in (None, 0, 1):
        reading.no_effect(setting, "switched off")
    else:
        why = "a layer, the experts and replicas of shards are not split over GPUs here"
        if setting.key.startswith("context"):
            why = "without this key, and without packing, `train --launch fsdp2_cp` splits sequences (never run)"
        reading.block(setting, why)


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    **axolotl_schedule.RULES,
    "base_model": _base_model,
    "output_dir": _output_dir,
    "lora_model_dir": _lora_model_dir,
    "adapter": _adapter,
    "load_in_4bit": _load_in_4bit,
    "load_in_8bit": _load_in_8bit,
    "lora_target_linear": _lora_target_linear,
    "lora_target_modules": _lora_target_modules,
    "bnb_config_kwargs": _bnb_config,
    "train_on_inputs": _train_on_inputs,
    "bf16": _bf16,
    "bfloat16": _bfloat16,
    "batch_size": _batch_size,
    "adam_eps": _adam_eps,
    "optim_args": _optim_args,
    "val_set_size": _val_set_size,
    "datasets": axolotl_data.read_data_sets,
    "test_datasets": _test_datasets,
    "chat_template": _chat_template,
    "chat_template_jinja": _chat_template_jinja,
    "special_tokens": _special_tokens,
    "trust_remote_code": remote_code.take,
    "plugins": _plugins,
    "wandb_project": _wandb_project,
    "use_wandb": _tracker("wandb"),
    "use_mlflow": _tracker("mlflow"),
    "use_comet": _tracker("comet_ml"),
    "use_trackio": _tracker("trackio"),
    "use_tensorboard": _tracker("tensorboard"),
    "hub_model_id": _hub_model_id,
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp,
    "dp_shard_size": _dp_shard_size,
    "dp_replicate_size": _lone_size,
    "context_parallel_size": _lone_size,
    "tensor_parallel_size": _lone_size,
    "expert_parallel_size": _lone_size,
}
