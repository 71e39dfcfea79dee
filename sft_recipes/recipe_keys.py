"""Which keys a recipe may hold, what each must look like, and what to use instead of those it may not.

The names and types of TRL's keys are read from the installed TRL, so there is no list here to go stale.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    EvaluationSettings,
    LabelSettings,
    Recipe,
    TemplateSettings,
    read_yaml,
    rebase_paths,
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

# This project's own keys. `evaluation` is the only nested block besides `datasets`.
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
}

_OTHER_KEYS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "recipe_keys.yaml").read_text(encoding="utf-8")
)
# Old or foreign names for what a current key does; keys this project does not take, with what to do instead.
RENAMED, REFUSED, NOTES = _OTHER_KEYS["renamed"], _OTHER_KEYS["refused"], _OTHER_KEYS["notes"]
# Keys that other keys switch on (NEEDS) or off (IDLE), with the values of those that do.
NEEDS, IDLE = _OTHER_KEYS["needs"], _OTHER_KEYS["idle"]


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


def current(key: str, value: Any) -> tuple[str, Any] | None:
    """The key and value that now say what these said; None if that has to be decided by hand."""
    # A share below 1 stays one; a ratio of 1 would turn into one step.
    if key == "warmup_ratio" and not (value is None or (fits_type(value, float) and value < 1)):
        return None
    table = _OTHER_KEYS["values"].get(key, {})
    if value in [*table]:
        return RENAMED.get(key, key), table[value]
    return None if table and key in RENAMED and value is not None else (RENAMED.get(key, key), value)


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply overrides, and check every key. Raises InputError listing all problems found."""
    path = Path(path)
    values, lines = read_yaml(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    places |= dict.fromkeys(overrides or {}, "command line")
    # ./ on the command line means the working directory, in the file the file's folder.
    here = rebase_paths(overrides or {}, Path.cwd(), path.parent)
    return make_recipe({**values, **here}, path, places)


def make_recipe(values: Mapping[str, Any], path: Path | None = None, places: Mapping[str, str] | None = None) -> Recipe:
    """Build a recipe from plain values; `places` says where each key was set, for error messages."""
    where = str(path or "recipe")
    model_keys, training_keys = trl_keys()
    known = {**DATA_KEYS, **OWN_KEYS, **model_keys, **training_keys}
    problems = _problems(values, known, places or {}, where) + _missing(values, where)
    if problems:
        raise InputError(problems)
    base = path.parent if path else None
    given = {key: value for key, value in values.items() if value is not None}
    model = {key: value for key, value in given.items() if key in model_keys}
    training = {key: value for key, value in given.items() if key in training_keys}
    labels = {key: given[key] for key in _names(LabelSettings) if key in given}
    if values.get("max_length", 0) is None:  # null is a choice: rows of any length
        labels["max_length"] = None
    template = given.get("chat_template")
    return Recipe(
        name=f"{path.parent.name}/{path.stem}" if path else "recipe",
        path=path,
        values=dict(values),
        model={**model, "model_name_or_path": resolve_path(str(model["model_name_or_path"]), base)},
        training={**training, "output_dir": resolve_path(str(training["output_dir"]), base)},
        data=_data_settings(given, base, where),
        labels=LabelSettings(**labels),
        template=TemplateSettings(
            resolve_path(template, base) if template else None, given.get("chat_template_kwargs", {})
        ),
        evaluation=_evaluation_settings(given.get("evaluation", {}), base, where),
        global_batch_size=given.get("global_batch_size"),
    )


def _names(settings: type) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def _missing(values: Mapping[str, Any], where: str) -> list[Problem]:
    required = [key for key in ("model_name_or_path", "output_dir") if not values.get(key)]
    problems = [Problem(where, key, "is required", f"add `{key}: ...`") for key in required]
    if not values.get("dataset_name") and not values.get("datasets"):
        problems.append(Problem(where, "dataset_name", "no data set is named", "add dataset_name or datasets"))
    if values.get("dataset_name") and values.get("datasets"):
        problems.append(Problem(where, "datasets", "set together with dataset_name", "keep one of them"))
    return problems


def _problems(
    values: Mapping[str, Any], known: Mapping[str, Any], places: Mapping[str, str], where: str, prefix: str = ""
) -> list[Problem]:
    """What is wrong with the keys and the types of their values, in the order they were written."""
    problems = []
    for key, value in values.items():
        found: tuple[str, str] | None = None
        if key not in known and key in REFUSED:
            found = "not taken by this project", REFUSED[key]
        elif key not in known and key in RENAMED:
            found = _renamed(key, values, places.get(key, "").startswith(where))
        elif key not in known:
            found = "unknown key", suggest(key, known, "" if prefix else "remove it; the README lists every key")
        elif key == "packing_strategy" and value == "wrapped":
            found = "'wrapped' lets rows attend to one another", "use bfd"
        elif (now := current(key, value)) and now[1] != value:
            found = f"{value!r} is now called {now[1]!r}", "write that, or run `sft-recipes check --fix`"
        elif value is not None and not fits_type(value, known[key]):
            found = f"expected {_type_name(known[key])}, got {value!r}", "write it in that form"
        if found:
            problems.append(Problem(places.get(key, where), prefix + key, *found))
    return problems


def _renamed(key: str, values: Mapping[str, Any], in_file: bool) -> tuple[str, str]:
    """What to say of an old name: `check --fix` is offered where it would rewrite it."""
    what = f"is now called {RENAMED[key]!r}" + (f" ({NOTES[key]})" if key in NOTES else "")
    if RENAMED[key] in values:
        return what, f"remove it; {RENAMED[key]} is set as well"
    offer = ", or let `sft-recipes check --fix` rewrite it" if in_file and current(key, values[key]) else ""
    return what, f"write `{RENAMED[key]}: ...`{offer}"


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


def _data_settings(given: Mapping[str, Any], base: Path | None, where: str) -> DataSettings:
    if "datasets" in given:
        sources = [_source(entry, base, where, "datasets.") for entry in given["datasets"]]
        single = ("format", "column_mapping", "weight", "dataset_config", "dataset_train_split")
        stray = [key for key in single if key in given]
        if stray:
            raise InputError(Problem(where, stray[0], "belongs to one data set", "write it inside `datasets:`"))
    else:
        one = {"path": given["dataset_name"], "name": given.get("dataset_config")}
        one |= {"split": given.get("dataset_train_split")}
        one |= {key: given.get(key) for key in ("format", "column_mapping", "weight")}
        sources = [_source(one, base, where, "")]
    fractions = [source.fraction is not None for source in sources]
    if any(fractions) and not all(fractions):
        raise InputError(Problem(where, "fraction", "set for some data sets only", "set it for all or for none"))
    if any(fractions) and any(source.weight != 1 for source in sources):
        raise InputError(Problem(where, "weight", "set together with fraction", "use one of them"))
    if given.get("eval_split") and given.get("dataset_test_split"):
        raise InputError(
            Problem(where, "eval_split", "set together with dataset_test_split", "set one of them to null")
        )
    settings = {key: given[key] for key in _names(DataSettings) if key in given and key != "datasets"}
    settings["seed"] = given.get("data_seed", given.get("seed", 42))
    return DataSettings(datasets=tuple(sources), test_split=given.get("dataset_test_split"), **settings)


def _source(entry: Any, base: Path | None, where: str, prefix: str) -> DatasetSource:
    """One data set: a path, or a mapping with TRL's and our per-set keys."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "path" not in entry:
        raise InputError(Problem(where, f"{prefix}path", f"expected a mapping with `path`, got {entry!r}", "add path"))
    chosen = {key: value for key, value in entry.items() if value is not None}
    known = typing.get_type_hints(DatasetSource)
    if prefix.startswith("evaluation"):  # rows to answer are no mixture
        known = {key: kind for key, kind in known.items() if key not in ("weight", "fraction")}
    problems = _problems(chosen, known, {}, where, prefix)
    if problems:
        raise InputError(problems)
    return DatasetSource(**{**chosen, "path": resolve_path(str(chosen["path"]), base)})


def _evaluation_settings(block: Mapping[str, Any], base: Path | None, where: str) -> EvaluationSettings:
    hints = {**typing.get_type_hints(EvaluationSettings), "data": Any}
    problems = _problems(block, hints, {}, where, "evaluation.")
    if problems:
        raise InputError(problems)
    data = block.get("data")
    source = _source(data, base, where, "evaluation.data.") if data is not None else None
    chosen = {key: value for key, value in block.items() if value is not None or fits_type(None, hints[key])}
    return EvaluationSettings(**{**chosen, "data": source})
