"""LLaMA-Factory's keys that need code: adapters, precision, optimizers, launchers, secrets.

What each does was read in the source of the version that `llamafactory.yaml` names.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.foreign import launch_files, llamafactory_data, llamafactory_templates, remote_code
from sft_recipes.foreign.llamafactory_data import names_in
from sft_recipes.foreign.llamafactory_templates import does_not_start, family_of
from sft_recipes.foreign.reading import Group, Reading, Setting
from sft_recipes.foreign.tables import is_off, value_text

_ALL_LINEAR = ["all-linear"]
# Words in a model's name that say how its weights are quantized.
_QUANTIZED = re.compile(r"awq|gptq|aqlm|hqq|eetq|-fp8|bnb-4bit", re.IGNORECASE)
_FLASH_ATTENTION = ("fa2", "fa3")


def _model(reading: Reading, setting: Setting) -> None:
    ours = {"model_name_or_path": reading.local_path(str(setting.value))}
    if _QUANTIZED.search(str(setting.value)):
        say = "its weights are quantized already: what reads them has to be installed; not tried by this project"
        reading.differs(setting, say, ours)
    else:
        reading.same(setting, ours)


def _output_dir(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"output_dir": reading.local_path(str(setting.value))})


def _trust_remote_code(reading: Reading, setting: Setting) -> None:
    remote_code.take(reading, setting, is_native=family_of(reading) is not None)


# -- what is trained ---------------------------------------------------------------------------------


def _finetuning_type(reading: Reading, setting: Setting) -> None:
    if setting.value == "lora":
        rank = reading.value("lora_rank") or 8
        ours = {
            "use_peft": True,
            "lora_r": rank,
            "lora_alpha": reading.value("lora_alpha") or 2 * rank,
            "lora_dropout": reading.value("lora_dropout") or 0.0,
        }
        reading.same(setting, ours)
    elif setting.value == "full":
        reading.no_effect(setting, "all weights are trained, as by default")
    elif setting.value == "freeze":
        reading.block(setting, "training a part of the layers is not done here; LoRA is")
    else:
        reading.block(setting, f"{setting.value!r} is not done here; lora and full are")


def _lora_target(reading: Reading, setting: Setting) -> None:
    modules = names_in(setting.value)
    if modules == ["all"]:
        modules = _ALL_LINEAR
    reading.same(setting, {"lora_target_modules": modules})


def _additional_target(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"lora_modules_to_save": names_in(setting.value)})


def _quantization_bit(reading: Reading, setting: Setting) -> None:
    if setting.value == 4:
        nested = reading.value("double_quantization") is not False
        reading.same(setting, {"load_in_4bit": True, "use_bnb_nested_quant": nested})
    elif setting.value == 8:
        reading.same(setting, {"load_in_8bit": True})
    else:
        reading.block(setting, "bitsandbytes quantizes to 4 or 8 bits")


def _double_quantization(reading: Reading, setting: Setting) -> None:
    if reading.value("quantization_bit") == 4:
        reading.same(setting, {"use_bnb_nested_quant": setting.value})
    else:
        reading.no_effect(setting, "read with `quantization_bit: 4`")


def _pure_bf16(reading: Reading, setting: Setting) -> None:
    if setting.value:
        # `init_adapter` then casts nothing to float32.
        reading.same(setting, {"dtype": "bfloat16"})
    else:
        reading.no_effect(setting, "switched off")


def _train_on_prompt(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "answers alone are trained, as by default")
        return
    reading.same(setting, {"train_on": "all"})
    reading.find(setting, "prompts are trained: the model also learns to write questions")


def _packing(reading: Reading, setting: Setting) -> None:
    if reading.value("neat_packing"):
        reading.no_effect(setting, "neat_packing packs")
        return
    if is_off(setting.value):
        reading.no_effect(setting, "rows are not packed, as by default")
        return
    say = "packs are filled by best fit over all rows and keep rows apart; steps an epoch differ"
    reading.differs(setting, say, {"packing": True})
    # One mask for the whole pack; FlashAttention goes by the positions where a batch is one pack.
    flash = reading.value("flash_attn") in _FLASH_ATTENTION
    lone = reading.value("per_device_train_batch_size") == 1
    if not (flash and lone):
        what = "the rows of a pack see one another; `neat_packing: true` would keep them apart"
        reading.find(setting, what)


# -- steps -------------------------------------------------------------------------------------------


def _warmup_ratio(reading: Reading, setting: Setting) -> None:
    if reading.value("warmup_steps"):
        reading.no_effect(setting, "warmup_steps goes before it")
    elif setting.value < 1:
        reading.same(setting, {"warmup_steps": setting.value})
    else:
        reading.block(setting, "the rate would rise until the end")


def _lr_scheduler_type(reading: Reading, setting: Setting) -> None:
    if setting.value == "warmup_stable_decay" and not reading.value("lr_scheduler_kwargs"):
        why = "say how many steps decay: lr_scheduler_kwargs {num_decay_steps: N}; LLaMA-Factory takes two thirds"
        reading.block(setting, why)
    else:
        reading.same(setting, {"lr_scheduler_type": setting.value})


def _optim(reading: Reading, setting: Setting) -> None:
    if reading.value("use_galore") or reading.value("use_apollo"):
        reading.no_effect(setting, "named together with use_galore or use_apollo")
    else:
        reading.same(setting, {"optim": setting.value})


def _use_galore(reading: Reading, setting: Setting) -> None:
    arguments = {
        "rank": reading.value("galore_rank") or 16,
        "update_proj_gap": reading.value("galore_update_interval") or 200,
        "scale": reading.value("galore_scale") or 2.0,
        "proj_type": reading.value("galore_proj_type") or "std",
    }
    wanted = str(reading.value("optim"))
    optimizer = "galore_adamw"
    if "8bit" in wanted:
        optimizer = "galore_adamw_8bit"
    elif wanted == "adafactor":
        optimizer = "galore_adafactor"
    _low_rank(reading, setting, "galore", optimizer, arguments)


def _use_apollo(reading: Reading, setting: Setting) -> None:
    arguments = {
        "rank": reading.value("apollo_rank") or 16,
        "proj": reading.value("apollo_proj") or "random",
        "scale_type": reading.value("apollo_scale_type") or "channel",
        "update_proj_gap": reading.value("apollo_update_interval") or 200,
        "scale": reading.value("apollo_scale") or 32.0,
        "proj_type": reading.value("apollo_proj_type") or "std",
    }
    _low_rank(reading, setting, "apollo", "apollo_adamw", arguments)


def _low_rank(
    reading: Reading, setting: Setting, kind: str, optimizer: str, arguments: Mapping[str, Any]
) -> None:
    """An optimizer that projects gradients, as transformers has it."""
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    if reading.value("finetuning_type") == "lora":
        reading.block(setting, "gradients are projected in full fine-tuning only")
        return
    if reading.value(f"{kind}_layerwise"):
        optimizer += "_layerwise"
        if (reading.value("gradient_accumulation_steps") or 1) != 1:
            does_not_start(reading, setting, f"{kind}_layerwise with gradient accumulation")
    target = names_in(reading.value(f"{kind}_target") or "all")
    if target == ["all"]:
        target = _ALL_LINEAR
    ours = {
        "optim": optimizer,
        "optim_target_modules": target,
        "optim_args": ",".join(f"{name}={value}" for name, value in arguments.items()),
    }
    say = f"transformers' {optimizer} with the same numbers; weight decay reaches norms and biases, too"
    reading.differs(setting, say, ours)


def _evaluation_strategy(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"eval_strategy": setting.value})
    does_not_start(reading, setting, "`evaluation_strategy`, which is called `eval_strategy`")


# -- launchers and secrets ---------------------------------------------------------------------------


def _deepspeed(reading: Reading, setting: Setting) -> None:
    launch_files.use_deepspeed(reading, setting, bool(reading.value("quantization_bit")))


def _fsdp(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    reading.launch = "fsdp2"
    if reading.value("quantization_bit"):
        reading.launch = "fsdp2_qlora"
    say = f"`train --launch {reading.launch}`: FSDP2, sharded by layer"
    reading.differs(setting, say)


def _push_to_hub(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif reading.value("hub_model_id"):
        say = "pushed once, when the run is finished, to a private repository"
        reading.differs(setting, say, {"push_to_hub": True})
    else:
        reading.differs(setting, "pushed afterwards: `sft-recipes push RUN`")


def _hub_model_id(reading: Reading, setting: Setting) -> None:
    if reading.value("push_to_hub"):
        reading.same(setting, {"hub_model_id": setting.value})
    else:
        reading.no_effect(setting, "without push_to_hub nothing is pushed")


def _secret(reading: Reading, setting: Setting) -> None:
    reading.no_effect(setting, "not copied: `hf auth login` or the environment holds it")
    if not is_off(setting.value):
        reading.find(setting, "a secret stands in the file: whoever reads it has it")


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    "model_name_or_path": _model,
    "output_dir": _output_dir,
    "trust_remote_code": _trust_remote_code,
    "finetuning_type": _finetuning_type,
    "lora_target": _lora_target,
    "additional_target": _additional_target,
    "quantization_bit": _quantization_bit,
    "double_quantization": _double_quantization,
    "pure_bf16": _pure_bf16,
    "train_on_prompt": _train_on_prompt,
    "packing": _packing,
    "warmup_ratio": _warmup_ratio,
    "lr_scheduler_type": _lr_scheduler_type,
    "optim": _optim,
    "use_galore": _use_galore,
    "use_apollo": _use_apollo,
    "evaluation_strategy": _evaluation_strategy,
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp,
    "push_to_hub": _push_to_hub,
    "hub_model_id": _hub_model_id,
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token"), _secret),
    **dict.fromkeys(("swanlab_api_key", "swanlab_lark_secret"), _secret),
    **llamafactory_data.RULES,
    **llamafactory_templates.RULES,
}


def finish(reading: Reading) -> None:
    """What takes more than one key: no template, no training, evaluation without rows, what LLaMA-Factory refuses."""
    if reading.value("template") is None:
        say = "the tokenizer's own template; without one a run is refused, where LLaMA-Factory trains bare text"
        reading.put_default("chat_template", "tokenizer", say)
    if reading.value("do_train") is None:
        reading.find(None, "do_train is not set: LLaMA-Factory trains nothing")
    _settle_evaluation(reading)
    for clash in reading.table.more["ends_with"]:
        keys = clash["set"]
        is_on = not any(is_off(reading.value(key)) for key in keys)
        for key, values in clash.get("where", {}).items():
            texts = [value_text(value) for value in values]
            is_on = is_on and value_text(reading.value(key)) in texts
        if is_on:
            does_not_start(reading, reading.setting(keys[-1]), clash["what"])


def _settle_evaluation(reading: Reading) -> None:
    """Evaluations that no rows are there for, and rows that no evaluation is there for."""
    recipe = reading.recipe
    evaluates = recipe.get("eval_strategy", "no") != "no"
    held_out = "eval_split" in recipe or "dataset_test_split" in recipe
    if evaluates and not held_out:
        origin = reading.origins["eval_strategy"]
        if reading.value("eval_dataset"):
            why = "no rows are held out of the trained ones: evaluate when the run is finished"
            reading.withdraw("eval_strategy", why, Group.DIFFERENT)
        else:
            reading.withdraw("eval_strategy", "no rows are held out")
            does_not_start(reading, origin, "evaluations without rows (val_size, eval_dataset)")
    elif held_out and not evaluates and not reading.value("do_eval"):
        what = "rows are held out and nothing says when to evaluate them"
        reading.find(reading.setting("val_size"), what)
