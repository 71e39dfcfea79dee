"""Which keys a recipe may hold, what each must look like, and what to use instead of those it may not.

The names and types of TRL's keys are read from the installed TRL, so there is no list here to go stale.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    EvaluationSettings,
    LabelSettings,
    Recipe,
    TemplateSettings,
    read_yaml,
    resolve_path,
)

# TRL's data keys, read by this project with the same meaning.
DATA_KEYS: Mapping[str, Any] = {
    "dataset_name": str,
    "dataset_config": str,
    "dataset_train_split": str,
    "dataset_test_split": str,
    "datasets": list,
}

# This project's own keys. `evaluation` and `gate` are the only nested blocks besides `datasets`.
OWN_KEYS: Mapping[str, Any] = {
    "format": str,
    "column_mapping": dict,
    "weight": float,
    "eval_split": float,
    "chat_template": str,
    "chat_template_kwargs": dict,
    "system_prompt": str,
    "train_on": typing.Literal["assistant", "last_assistant", "all"],
    "history": typing.Literal["expand", "mask"],
    "empty_think": typing.Literal["mask", "train"],
    "overlength": typing.Literal["drop", "truncate", "error"],
    "max_lost": float,
    "control_tokens": typing.Literal["neutralize", "drop", "error"],
    "on_bad_rows": typing.Literal["error", "skip"],
    "max_rejected": float,
    "allow_empty_output": bool,
    "global_batch_size": int,
    "max_rows": int,
    "evaluation": dict,
    "gate": dict,
}

# Old or foreign names for what a current key does.
RENAMED: Mapping[str, str] = {
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "warmup_ratio": "warmup_steps",
    "chat_template_path": "chat_template",
    "tokenizer_name_or_path": "model_name_or_path",
    "group_by_length": "train_sampling_strategy",
    "test_split_size": "eval_split",
    "lora_rank": "lora_r",
    "micro_batch_size": "per_device_train_batch_size",
    "dataset_mixer": "datasets",
    "dataset_mixture": "datasets",
}

# Keys this project does not take, each with what to do instead.
REFUSED: Mapping[str, str] = {
    "env": "set environment variables in the shell or the launcher",
    "hub_token": "run `hf auth login` or set HF_TOKEN in the environment; no token belongs in a file",
    "push_to_hub_token": "run `hf auth login` or set HF_TOKEN in the environment; no token belongs in a file",
    "token": "run `hf auth login` or set HF_TOKEN in the environment; no token belongs in a file",
    "trust_remote_code": "remove it; models that need their own code are not supported from a recipe",
    "overwrite_output_dir": "remove it; use a new output_dir for a new run",
    "resume_from_checkpoint": "remove it; running the same recipe again resumes",
    "dataset_kwargs": "remove it; rows are prepared by this project",
    "dataset_text_field": "use format: raw with column_mapping: {text: YOUR_COLUMN}",
    "dataset_num_proc": "remove it; preparation is batched over all cores",
    "dataset_streaming": "remove it; prepared data is read from disk, memory stays bounded",
    "assistant_only_loss": "use train_on: assistant (the default), last_assistant or all",
    "completion_only_loss": "use train_on: assistant (the default), last_assistant or all",
    "truncation_mode": "use overlength: drop, truncate or error; an answer is never cut",
    "eos_token": "remove it; EOS follows from the chat template",
    "pad_token": "remove it; PAD is chosen among the tokenizer's own tokens",
    "use_liger_kernel": "remove it; TRL deprecated it",
    "liger_kernel_config": "remove it; TRL deprecated it",
    "label_smoothing_factor": "remove it; TRL deprecated it",
    "enable_jit_checkpoint": "remove it; a preempted run is saved by this project",
    "model_init_kwargs": "use model_revision, dtype and attn_implementation",
    "remove_unused_columns": "remove it; only input_ids and labels reach the trainer",
    "logging_nan_inf_filter": "remove it; a loss that is not finite stops the run",
    "skip_prepare_dataset": "remove it; rows are prepared by this project",
    "fsdp": "launch with an accelerate config: sft-recipes train RECIPE --launch NAME",
    "fsdp_config": "launch with an accelerate config: sft-recipes train RECIPE --launch NAME",
    "deepspeed": "launch with an accelerate config: sft-recipes train RECIPE --launch NAME",
    "auto_find_batch_size": "remove it; a changed batch size is another run. Set per_device_train_batch_size",
    "ignore_data_skip": "remove it; a resumed run continues with the rows it has not seen",
    "prediction_loss_only": "remove it; evaluation generates text",
    "include_for_metrics": "remove it; use evaluation:",
    "batch_eval_metrics": "remove it; use evaluation:",
    "label_names": "remove it; the labels column is made by this project",
    "length_column_name": "remove it; lengths follow from input_ids",
    "do_train": "remove it; `sft-recipes train` trains",
    "do_eval": "use eval_strategy",
    "do_predict": "use `sft-recipes evaluate`",
    "local_rank": "remove it; the launcher sets it",
    "eval_do_concat_batches": "remove it; evaluation generates text",
    "eval_use_gather_object": "remove it; evaluation generates text",
    "eval_accumulation_steps": "remove it; no logits are kept",
    "hub_strategy": "remove it; a push happens once, after the run",
    "hub_always_push": "remove it; a push happens once, after the run",
    "trackio_space_id": "remove it; no Space is created by this project",
    "trackio_bucket_id": "remove it; no bucket is created by this project",
    "trackio_static_space_id": "remove it; no Space is created by this project",
    "lora_task_type": "remove it; recipes train causal language models",
}


@lru_cache(maxsize=1)
def trl_keys() -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and types of the installed TRL's `ModelConfig` and `SFTConfig` keys that recipes may set."""
    from trl import ModelConfig, SFTConfig  # seconds to import, and `--help` needs none of it

    taken = {*REFUSED, *RENAMED}
    model, training = (
        {name: kind for name, kind in typing.get_type_hints(config).items() if name in fields and name not in taken}
        for config in (ModelConfig, SFTConfig)
        for fields in [{field.name for field in dataclasses.fields(config)}]
    )
    return model, {name: kind for name, kind in training.items() if name not in model}


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply overrides, and check every key. Raises InputError listing all problems found."""
    path = Path(path)
    values, lines = read_yaml(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    for key, value in (overrides or {}).items():
        values[key] = value
        places[key] = "command line"
    return make_recipe(values, path, places)


def make_recipe(values: Mapping[str, Any], path: Path | None = None, places: Mapping[str, str] | None = None) -> Recipe:
    """Build a recipe from plain values; `places` says where each key was set, for error messages."""
    places = places or {}
    model_keys, training_keys = trl_keys()
    known = {**DATA_KEYS, **OWN_KEYS, **model_keys, **training_keys}
    problems = [
        problem
        for key, value in values.items()
        if (problem := _key_problem(key, value, known, places.get(key, str(path or "recipe"))))
    ]
    problems += _missing(values, str(path or "recipe"))
    if problems:
        raise InputError(problems)
    base = path.parent if path else None
    given = {key: value for key, value in values.items() if value is not None}
    model = {key: value for key, value in given.items() if key in model_keys}
    model["model_name_or_path"] = resolve_path(str(model["model_name_or_path"]), base)
    training = {key: value for key, value in given.items() if key in training_keys}
    training["output_dir"] = resolve_path(str(training["output_dir"]), base)
    name = f"{path.parent.name}/{path.stem}" if path else "recipe"
    return Recipe(
        name=name,
        path=path,
        values=dict(values),
        model=model,
        training=training,
        data=_data_settings(given, base, str(path or "recipe")),
        labels=_settings(LabelSettings, given, path, optional=("max_length",), values=values),
        template=_template_settings(given, base),
        evaluation=_evaluation_settings(given, base, str(path or "recipe")),
        global_batch_size=given.get("global_batch_size"),
        gate=given.get("gate"),
    )


def _missing(values: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [
        Problem(where, key, "is required", f"add `{key}: ...`")
        for key in ("model_name_or_path", "output_dir")
        if not values.get(key)
    ]
    if not values.get("dataset_name") and not values.get("datasets"):
        problems.append(Problem(where, "dataset_name", "no data set is named", "add dataset_name or datasets"))
    if values.get("dataset_name") and values.get("datasets"):
        problems.append(Problem(where, "datasets", "set together with dataset_name", "keep one of them"))
    return problems


def _key_problem(key: str, value: Any, known: Mapping[str, Any], where: str) -> Problem | None:
    if key in REFUSED:
        return Problem(where, key, "not taken by this project", REFUSED[key])
    if key in RENAMED and RENAMED[key] != key:
        return Problem(where, key, f"is now called {RENAMED[key]!r}", f"write `{RENAMED[key]}: ...`")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "remove it; every key is listed in the README"
        return Problem(where, key, "unknown key", hint)
    if key == "packing_strategy" and value == "wrapped":
        return Problem(where, key, "'wrapped' lets rows attend to one another", "use bfd")
    if value is None or fits_type(value, known[key]):
        return None
    return Problem(where, key, f"expected {_type_name(known[key])}, got {value!r}", "write it in that form")


def fits_type(value: Any, kind: Any) -> bool:
    """Whether a plain YAML value fits a type hint; an int fits a float, an enum takes its values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, None) or kind is types.NoneType:
        return kind is Any or value is None
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        enums = [one for one in arguments if isinstance(one, type) and issubclass(one, enum.Enum)]
        if enums and isinstance(value, str):
            return any(value in [member.value for member in one] for one in enums)
        return any(fits_type(value, one) for one in arguments)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits_type(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value in [member.value for member in kind]
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    enums = [one for one in typing.get_args(kind) if isinstance(one, type) and issubclass(one, enum.Enum)]
    if enums:
        return "one of " + ", ".join(str(member.value) for member in enums[0])
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _settings(
    kind: type,
    given: Mapping[str, Any],
    path: Path | None,
    optional: Sequence[str] = (),
    values: Mapping[str, Any] = {},
) -> Any:
    """A settings dataclass from the keys that name its fields. Keys in `optional` may be set to null on purpose."""
    names = {field.name for field in dataclasses.fields(kind)}
    chosen = {key: value for key, value in given.items() if key in names}
    chosen.update({key: None for key in optional if key in values and values[key] is None})
    return kind(**chosen)


def _data_settings(given: Mapping[str, Any], base: Path | None, where: str) -> DataSettings:
    if "datasets" in given:
        sources = [_source(entry, base, where) for entry in given["datasets"]]
        stray = [key for key in ("format", "column_mapping", "weight") if key in given]
        if stray:
            raise InputError(Problem(where, stray[0], "belongs to one data set", "write it inside `datasets:`"))
    else:
        sources = [_dataset_name_source(given, base)]
    fractions = [source.fraction is not None for source in sources]
    if any(fractions) and not all(fractions):
        raise InputError(Problem(where, "fraction", "set for some data sets only", "set it for all or for none"))
    if any(fractions) and any(source.weight != 1 for source in sources):
        raise InputError(Problem(where, "weight", "set together with fraction", "use one of them"))
    names = ("eval_split", "max_rows", "on_bad_rows", "max_rejected", "allow_empty_output")
    settings = {key: given[key] for key in names if key in given}
    seed = given.get("data_seed", given.get("seed", 42))
    return DataSettings(datasets=tuple(sources), test_split=given.get("dataset_test_split"), seed=seed, **settings)


def _dataset_name_source(given: Mapping[str, Any], base: Path | None) -> DatasetSource:
    return DatasetSource(
        path=resolve_path(str(given["dataset_name"]), base),
        name=given.get("dataset_config"),
        split=given.get("dataset_train_split", "train"),
        format=given.get("format"),
        column_mapping=given.get("column_mapping", {}),
        weight=float(given.get("weight", 1.0)),
    )


def _source(entry: Any, base: Path | None, where: str) -> DatasetSource:
    """One entry of `datasets:` (or `evaluation.data`): a path, or a mapping with TRL's and our per-set keys."""
    if isinstance(entry, str):
        entry = {"path": entry}
    names = {field.name: field.type for field in dataclasses.fields(DatasetSource)}
    if not isinstance(entry, dict) or "path" not in entry:
        raise InputError(Problem(where, "datasets", f"expected a mapping with `path`, got {entry!r}", "add path"))
    for key in entry:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"
            raise InputError(Problem(where, f"datasets.{key}", "unknown key", hint))
    chosen = {key: value for key, value in entry.items() if value is not None}
    hints = typing.get_type_hints(DatasetSource)
    for key, value in chosen.items():
        if not fits_type(value, hints[key]):
            what = f"expected {_type_name(hints[key])}, got {value!r}"
            raise InputError(Problem(where, f"datasets.{key}", what, "write it in that form"))
    chosen["path"] = resolve_path(chosen["path"], base)
    return DatasetSource(**chosen)


def _template_settings(given: Mapping[str, Any], base: Path | None) -> TemplateSettings:
    template = given.get("chat_template")
    return TemplateSettings(resolve_path(template, base) if template else None, given.get("chat_template_kwargs", {}))


def _evaluation_settings(given: Mapping[str, Any], base: Path | None, where: str) -> EvaluationSettings:
    block = dict(given.get("evaluation", {}))
    hints = typing.get_type_hints(EvaluationSettings)
    for key, value in block.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(hints)}"
            raise InputError(Problem(where, f"evaluation.{key}", "unknown key", hint))
        if key != "data" and not fits_type(value, hints[key]):
            what = f"expected {_type_name(hints[key])}, got {value!r}"
            raise InputError(Problem(where, f"evaluation.{key}", what, "write it in that form"))
    if block.get("data") is not None:
        block["data"] = _source(block["data"], base, where)
    return EvaluationSettings(**block)
