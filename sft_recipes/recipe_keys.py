"""Which keys a recipe may hold, what each must look like, and what to use instead of those it may not.

The names and types of TRL's keys are read from the installed TRL, so there is no list here to go stale.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sft_recipes import recipe
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    EvaluationSettings,
    LabelSettings,
    Recipe,
    TemplateSettings,
)

_UNIONS = (typing.Union, types.UnionType)
_OTHER_KEYS: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
# TRL's data keys, read by this project with the same meaning.
DATA_KEYS: Mapping[str, Any] = {**dict.fromkeys(_OTHER_KEYS["dataset_keys"], str), "datasets": list}
# This project's own keys: the fields of the settings less those that TRL's keys fill, and the rest.
OWN_KEYS: Mapping[str, Any] = {
    **{
        key: kind
        for settings in (DatasetSource, DataSettings, LabelSettings, TemplateSettings)
        for key, kind in typing.get_type_hints(settings).items()
        if key not in _OTHER_KEYS["not_keys"]
    },
    **{"global_batch_size": int, "evaluation": dict, "gate": list},
    # TRL's names for a push, which is ours: TRL's goes public and takes the whole output_dir.
    **{"push_to_hub": bool, "hub_model_id": str},
}
# Old or foreign names for what a current key does; keys this project does not take, with what to do instead.
RENAMED, REFUSED, NOTES = _OTHER_KEYS["renamed"], _OTHER_KEYS["refused"], _OTHER_KEYS["notes"]
REFUSED_VALUES = _OTHER_KEYS["refused_values"]
# Keys that other keys switch on (NEEDS) or off (IDLE), with the values of those that do.
NEEDS, IDLE = _OTHER_KEYS["needs"], _OTHER_KEYS["idle"]


@lru_cache(maxsize=1)
def trl_keys() -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and types of the installed TRL's `ModelConfig` and `SFTConfig` keys that recipes may set."""
    from trl import ModelConfig, SFTConfig  # seconds to import, and `--help` needs none of it

    taken = {*REFUSED, *RENAMED, *OWN_KEYS}
    model, training = (
        {
            name: kind
            for name, kind in typing.get_type_hints(config).items()
            if name in fields and name not in taken
        }
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
    return (
        None if table and key in RENAMED and value is not None else (RENAMED.get(key, key), value)
    )


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply overrides, and check every key. Raises InputError listing all problems found."""
    path = Path(path)
    values, lines = recipe.read_yaml(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    places |= dict.fromkeys(overrides or {}, "command line")
    # ./ on the command line means the working directory, in the file the file's folder.
    here = recipe.rebase_paths(overrides or {}, Path.cwd(), path.parent)
    return make_recipe({**values, **here}, path, places)


def make_recipe(
    values: Mapping[str, Any], path: Path | None = None, places: Mapping[str, str] | None = None
) -> Recipe:
    """Build a recipe from plain values; `places` says where each key was set, for error messages."""
    where = str(path or "recipe")
    model_keys, training_keys = trl_keys()
    known = {**DATA_KEYS, **OWN_KEYS, **model_keys, **training_keys}
    problems = _problems(values, known, places or {}, where) + _combinations(values, where)
    if problems:
        raise InputError(problems)
    # null in `max_length` is a choice, rows of any length; elsewhere it is the default.
    given = {
        key: value for key, value in values.items() if value is not None or key == "max_length"
    }
    given = recipe.rebase_paths(given, path.parent if path else None)
    return Recipe(
        name=f"{path.parent.name}/{path.stem}" if path else "recipe",
        path=path,
        values=dict(values),
        model={key: value for key, value in given.items() if key in model_keys},
        training={key: value for key, value in given.items() if key in training_keys},
        data=_data_settings(given, where),
        labels=LabelSettings(**_fields(LabelSettings, given)),
        template=TemplateSettings(**_fields(TemplateSettings, given)),
        evaluation=_evaluation_settings(given.get("evaluation", {}), where),
        global_batch_size=given.get("global_batch_size"),
    )


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """What a recipe says of its data, for data that has no recipe."""

    data: DataSettings
    labels: LabelSettings
    template: TemplateSettings


def make_data_recipe(path: str, options: Mapping[str, Any]) -> DataRecipe:
    """Settings for a data file, folder or Hub name. `options` are a recipe's keys for data, labels and template; rows
    may have any length unless `max_length` is set. Raises InputError listing all problems found.
    """
    where = "command line"
    known: dict[str, Any] = {**DATA_KEYS, "max_length": int | None, "data_seed": int}
    for settings in (DatasetSource, DataSettings, LabelSettings, TemplateSettings):
        for key, kind in typing.get_type_hints(settings).items():
            if key in OWN_KEYS:
                known[key] = kind
    for key in ("dataset_name", "datasets"):
        del known[key]
    problems = _problems(options, known, dict.fromkeys(options, where), where)
    if problems:
        raise InputError(problems)
    given = {"max_length": None, **options, "dataset_name": path}
    return DataRecipe(
        data=_data_settings(given, where),
        labels=LabelSettings(**_fields(LabelSettings, given)),
        template=TemplateSettings(**_fields(TemplateSettings, given)),
    )


def _fields(settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: given[field.name]
        for field in dataclasses.fields(settings)
        if field.name in given
    }


def _combinations(values: Mapping[str, Any], where: str) -> list[Problem]:
    """Keys that are missing, and keys that exclude one another."""
    required = [key for key in ("model_name_or_path", "output_dir") if not values.get(key)]
    problems = [Problem(where, key, "is required", f"add `{key}: ...`") for key in required]
    if not values.get("dataset_name") and not values.get("datasets"):
        problems.append(
            Problem(where, "dataset_name", "no data set is named", "add dataset_name or datasets")
        )
    if bool(values.get("push_to_hub")) != bool(values.get("hub_model_id")):
        what, fix = "push_to_hub: true and hub_model_id go together", "set both or none"
        problems.append(Problem(where, "hub_model_id", what, fix))
    for key, other in _OTHER_KEYS["apart"].items():
        if values.get(key) and values.get(other):
            problems.append(
                Problem(
                    where, key, f"set together with {other}", "remove one of them or set it to null"
                )
            )
    return problems


def _problems(
    values: Mapping[str, Any],
    known: Mapping[str, Any],
    places: Mapping[str, str],
    where: str,
    prefix: str = "",
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
            found = (
                "unknown key",
                suggest(key, known, "" if prefix else "remove it; the README lists every key"),
            )
        elif instead := REFUSED_VALUES.get(key, {}).get(str(value)):
            found = f"{value!r} is not taken", instead
        elif (now := current(key, value)) and now[1] != value:
            found = (
                f"{value!r} is now called {now[1]!r}",
                "write that, or run `sft-recipes check --fix`",
            )
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
    offer = (
        ", or let `sft-recipes check --fix` rewrite it"
        if in_file and current(key, values[key])
        else ""
    )
    return what, f"write `{RENAMED[key]}: ...`{offer}"


def fits_type(value: Any, kind: Any) -> bool:
    """Whether a plain YAML value fits a type hint; an int fits a float, an enum takes its values."""
    arguments = typing.get_args(kind)
    if choices := _choices(kind):
        return value in choices or (value is None and types.NoneType in arguments)
    origin = typing.get_origin(kind) or kind
    if origin in _UNIONS:
        return any(fits_type(value, one) for one in arguments)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(
            fits_type(item, one) for one in arguments for item in value
        )
    if origin is Mapping and arguments:
        return isinstance(value, Mapping) and all(
            _fits_entry(entry, arguments) for entry in value.items()
        )
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin)


def _fits_entry(entry: tuple[Any, Any], kinds: Sequence[Any]) -> bool:
    """Whether a key of a mapping and its value fit the two type hints."""
    return all(fits_type(part, kind) for part, kind in zip(entry, kinds, strict=True))


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of an enum even where TRL takes any text beside it; none for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else [kind]
    enums = [one for one in kinds if isinstance(one, type) and issubclass(one, enum.Enum)]
    return tuple(member.value for one in enums for member in one)


def _type_name(kind: Any) -> str:
    if choices := _choices(kind):
        return "one of " + ", ".join(map(str, choices))
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else [kind]
    names = {bool: "true or false", Mapping: "dict", Sequence: "list"}
    if typing.get_origin(kind) is Mapping and typing.get_args(kind)[-1] is not Any:
        return "a mapping of names to names, {ours: theirs}"
    plain = [typing.get_origin(one) or one for one in kinds if one is not types.NoneType]
    return " or ".join(names.get(one) or one.__name__ for one in plain)


def _data_settings(given: Mapping[str, Any], where: str) -> DataSettings:
    single = {"dataset_config": "name", "dataset_train_split": "split"}
    single |= {key: key for key in _OTHER_KEYS["set_keys"]}
    if "datasets" in given:
        sources = [_source(entry, where, "datasets.") for entry in given["datasets"]]
        faults = [
            (key, "belongs to one data set", "write it inside `datasets:`")
            for key in single
            if key in given
        ]
    else:
        one = {field: given[key] for key, field in single.items() if key in given}
        sources, faults = [_source({"path": given["dataset_name"], **one}, where, "")], []
    fractions = [source.fraction is not None for source in sources]
    if any(fractions) and not all(fractions):
        faults.append(("fraction", "set for some data sets only", "set it for all or for none"))
    if any(fractions) and any(source.weight != 1 for source in sources):
        faults.append(("weight", "set together with fraction", "use one of them"))
    if faults:
        raise InputError([Problem(where, *fault) for fault in faults])
    seed, settings = given.get("data_seed", given.get("seed", 42)), _fields(DataSettings, given)
    settings |= {
        "datasets": tuple(sources),
        "test_split": given.get("dataset_test_split"),
        "seed": seed,
    }
    return DataSettings(**settings)


def _source(entry: Any, where: str, prefix: str) -> DatasetSource:
    """One data set: a path, or a mapping with TRL's and our per-set keys."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or entry.get("path") is None:
        raise InputError(
            Problem(
                where, f"{prefix}path", f"expected a mapping with `path`, got {entry!r}", "add path"
            )
        )
    known = typing.get_type_hints(DatasetSource)
    if prefix.startswith("evaluation"):  # rows to answer are no mixture
        known = {key: kind for key, kind in known.items() if key not in ("weight", "fraction")}
    return DatasetSource(**_block(entry, known, where, prefix))


def _evaluation_settings(block: Mapping[str, Any], where: str) -> EvaluationSettings:
    chosen = _block(
        block, {**typing.get_type_hints(EvaluationSettings), "data": Any}, where, "evaluation."
    )
    data = chosen.pop("data", None)
    return EvaluationSettings(
        _source(data, where, "evaluation.data.") if data is not None else None, **chosen
    )


def _block(
    block: Mapping[str, Any], known: Mapping[str, Any], where: str, prefix: str
) -> dict[str, Any]:
    """The keys of a nested block; null is the default, except where "none" is a choice of its own."""
    if problems := _problems(block, known, {}, where, prefix):
        raise InputError(problems)
    return {
        key: value
        for key, value in block.items()
        if value is not None or fits_type(None, known[key])
    }
