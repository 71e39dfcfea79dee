"""TRL's keys, the handbook's and open-r1's: most are ours, and go on as they are.

What is not taken here, and what an old name is called now, is read from `recipe_keys.yaml`, as `check --fix` does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft_recipes.foreign import launch_files, remote_code
from sft_recipes.foreign.reading import Group, Reading, Setting
from sft_recipes.foreign.tables import is_off, read_table
from sft_recipes.recipe_checks import REFUSED, REMOVE, RENAMED, current
from sft_recipes.recipe_keys import DATA_KEYS, trl_keys
from sft_recipes.recipe_mixtures import (
    MIXER_KEYS,
    SEEN,
    from_mixer,
    from_mixture,
    is_test_split,
    trained_test_splits,
)

Rule = Callable[[Reading, Setting], None]
_TOKENS = ("hub_token", "push_to_hub_token", "token")
_EVALUATES = ("steps", "epoch")


def rules() -> Mapping[str, Rule]:
    """All keys that the table does not rule on."""
    keys = trl_keys()
    made: dict[str, Rule] = dict.fromkeys((*DATA_KEYS, *keys.model, *keys.training), _current)
    made |= dict.fromkeys(RENAMED, _current)
    made |= dict.fromkeys(REFUSED, _refused)
    made |= _RULES
    for key in read_table("trl").rules:
        made.pop(key, None)
    return made


def _current(reading: Reading, setting: Setting) -> None:
    """A key of TRL of today, or the old name of one."""
    new = current(setting.key, setting.value)
    if new is None:
        reading.block(setting, f"write it as `{RENAMED[setting.key]}: ...`, by hand")
    else:
        reading.same(setting, {new.key: new.value})


def _refused(reading: Reading, setting: Setting) -> None:
    """A key that recipes do not hold: without effect here where it may simply be removed."""
    advice = REFUSED[setting.key]
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif advice.startswith(REMOVE) or advice.startswith("set "):
        reading.no_effect(setting, advice.removeprefix(REMOVE))
    else:
        reading.block(setting, advice)


# -- data --------------------------------------------------------------------------------------------


def _mixture(reading: Reading, setting: Setting) -> None:
    ours = from_mixture(setting.value)
    if ours is None:
        reading.block(setting, "not of the form that the handbook and open-r1 document")
        return
    weighted = any("weight" in source for source in ours["datasets"])
    if weighted or "eval_split" in ours:
        say = (
            "the same shares by other seeded draws; held-out rows share no prompt with trained ones"
        )
        reading.differs(setting, say, ours)
    else:
        reading.same(setting, ours)
    _look_at_splits(reading, setting, ours["datasets"])
    if any(source.get("weight", 1) > 1 for source in ours["datasets"]):
        reading.find(setting, "a weight above 1 asks for more rows than a set has: they stop there")


def _mixer(reading: Reading, setting: Setting) -> None:
    """Three keys of older handbooks that say one thing; the first of them stands for all."""
    if reading.setting("dataset_mixture"):
        reading.no_effect(setting, "dataset_mixture is read")
        return
    first = next(key for key in MIXER_KEYS if reading.setting(key))
    if setting.key != first:
        reading.same(setting, {})
        return
    ours = from_mixer(reading.tree)
    if ours is None:
        reading.block(
            setting, "dataset_mixer, dataset_splits and dataset_configs do not fit one another"
        )
    elif "datasets" not in ours:
        reading.same(setting, ours)
    else:
        say = "seeded draws of the same shares; there the first rows, with an empty system turn in front"
        reading.differs(setting, say, ours)
        _look_at_splits(reading, setting, ours["datasets"])


def _data_sets(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"datasets": setting.value})
    if isinstance(setting.value, list):
        _look_at_splits(reading, setting, setting.value)


def _look_at_splits(reading: Reading, setting: Setting, sources: list[Any]) -> None:
    names = trained_test_splits(sources)
    if names:
        what = f"{', '.join(names)}: {SEEN}"
        reading.find(setting, what)


def _train_split(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"dataset_train_split": setting.value})
    if is_test_split(str(setting.value)):
        reading.find(setting, SEEN)


def _text_column(reading: Reading, setting: Setting) -> None:
    ours = {"format": "raw", "column_mapping": {"text": setting.value}}
    reading.same(setting, ours)


def _prompt_column(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"column_mapping": {"instruction": setting.value}})


def _empty_system(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    else:
        reading.differs(setting, "no empty system turn is put in front of rows: system_prompt")


# -- what is trained ---------------------------------------------------------------------------------


def _assistant_only(reading: Reading, setting: Setting) -> None:
    """TRL trains every token of a conversation unless told otherwise."""
    if reading.value("completion_only_loss") is not None:
        reading.no_effect(setting, "completion_only_loss says it")
    elif setting.value:
        reading.same(setting, {"train_on": "assistant"})
    else:
        say = "in TRL every token of rows of messages is trained: train_on: all"
        reading.differs(setting, say, {"train_on": "assistant"})
        what = "prompts are trained where rows are messages: assistant_only_loss is not set"
        reading.find(reading.setting(setting.key), what)


def _chat_template(reading: Reading, setting: Setting) -> None:
    reading.same(setting, {"chat_template": reading.jinja_file(str(setting.value))})


def _template_path(reading: Reading, setting: Setting) -> None:
    path = str(setting.value)
    if path.endswith(".jinja"):
        reading.same(setting, {"chat_template": reading.local_path(path)})
    else:
        why = f"the template of another model: save it as a file, --chat_template FILE.jinja, instead of {path}"
        reading.block(setting, why)


def _reentrant(reading: Reading, setting: Setting) -> None:
    ours = {"activation_checkpointing_kwargs": {"use_reentrant": setting.value}}
    reading.same(setting, ours)


def _target_modules(reading: Reading, setting: Setting) -> None:
    names = setting.value
    if isinstance(names, str):
        names = [names]
    reading.same(setting, {"lora_target_modules": names})


# -- the run -----------------------------------------------------------------------------------------


def _do_eval(reading: Reading, setting: Setting) -> None:
    strategy = reading.value("eval_strategy") or reading.value("evaluation_strategy")
    if is_off(setting.value) or strategy:
        reading.no_effect(setting, "eval_strategy says it")
    else:
        reading.differs(setting, "not evaluated at the end: eval_strategy")


def _token(reading: Reading, setting: Setting) -> None:
    reading.no_effect(setting, "`hf auth login` or HF_TOKEN in the environment")
    if setting.value:
        reading.find(setting, "a token stands in the file: whoever reads it can use it")


def _push(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    output = Path(str(reading.value("output_dir") or "model"))
    name = reading.value("hub_model_id") or output.name
    say = "pushed once, when the run is finished, to a private repository"
    reading.differs(setting, say, {"push_to_hub": True, "hub_model_id": name})


def _hub_model(reading: Reading, setting: Setting) -> None:
    if reading.value("push_to_hub"):
        reading.same(setting, {"hub_model_id": setting.value})
    else:
        reading.no_effect(setting, "nothing is pushed")


def _old_hub_model(reading: Reading, setting: Setting) -> None:
    if reading.value("push_to_hub") and not reading.value("hub_model_id"):
        reading.differs(setting, "hub_model_id is what it is called now", {})
        reading.put("hub_model_id", setting.value, setting)
    else:
        reading.no_effect(setting, "nothing is pushed to it")


def _fsdp(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    reading.launch = "fsdp2_qlora" if reading.value("load_in_4bit") else "fsdp2"
    say = f"`train --launch {reading.launch}`: FSDP2 with float32 weights, sharded by layer"
    reading.differs(setting, say)


_RULES: Mapping[str, Rule] = {
    "dataset_mixture": _mixture,
    **dict.fromkeys(MIXER_KEYS, _mixer),
    "datasets": _data_sets,
    "text_column": _text_column,
    "dataset_prompt_column": _prompt_column,
    "auto_insert_empty_system_msg": _empty_system,
    "assistant_only_loss": _assistant_only,
    "chat_template": _chat_template,
    "chat_template_path": _template_path,
    "gradient_checkpointing_use_reentrant": _reentrant,
    "lora_target_modules": _target_modules,
    "dataset_train_split": _train_split,
    "do_eval": _do_eval,
    "trust_remote_code": remote_code.take,
    **dict.fromkeys(_TOKENS, _token),
    "push_to_hub": _push,
    "hub_model_id": _hub_model,
    "push_to_hub_model_id": _old_hub_model,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp,
    "deepspeed": launch_files.use_deepspeed,
}


# -- the whole ---------------------------------------------------------------------------------------


def finish(reading: Reading) -> None:
    """What takes more than one key: layers of LoRA, the split that is evaluated, names that TRL no longer knows."""
    recipe = reading.recipe
    if recipe.get("use_peft") and "lora_target_modules" not in recipe:
        say = "all linear layers; peft chooses by the model, for most only q_proj and v_proj"
        reading.put_default("lora_target_modules", ["all-linear"], say)
    if "max_length" not in recipe:
        more = reading.table.more
        reading.put_default("max_length", more["default_max_length"], more["cut"])
    has_rows = "eval_split" in recipe or "dataset_test_split" in recipe
    if recipe.get("eval_strategy") in _EVALUATES and not has_rows:
        _give_eval_rows(reading)
    if reading.value("completion_only_loss") is False:
        reading.find(reading.setting("completion_only_loss"), "prompts are trained")
    if reading.value("packing_strategy") == "wrapped":
        what = "packed rows see one another: nothing keeps them apart"
        reading.find(reading.setting("packing_strategy"), what)
    _look_at_names(reading)


def _give_eval_rows(reading: Reading) -> None:
    """TRL evaluates the split `test` of one set; a mixture has none unless a part of it is held out."""
    if "dataset_name" in reading.recipe:
        reading.put_default("dataset_test_split", "test", "")
        return
    origin = reading.origins["eval_strategy"]
    reading.find(origin, "evaluation is asked for, and the mixture holds no rows out")
    why = "no rows are held out, so none are evaluated: eval_split"
    reading.withdraw("eval_strategy", why, Group.DIFFERENT)


def _look_at_names(reading: Reading) -> None:
    """Keys that the TRL of the table stops on, in one line."""
    known = _known_to_trl() | set(reading.table.more["of_their_own"])
    gone = [key for key in reading.tree if key not in known]
    if gone:
        what = f"{reading.table.label} stops on what it does not know: {', '.join(gone)}"
        reading.find(reading.setting(gone[0]), what)


def _known_to_trl() -> set[str]:
    """The keys that `trl sft` reads."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    names = {"env"}
    for config in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig):
        names |= {field.name for field in dataclasses.fields(config)}
    return names
