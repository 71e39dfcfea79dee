"""Which keys a recipe may hold, and recipes from their keys.

`recipe_keys.yaml` is the table of this project's own keys: what each means, the range of a number.
Their types and defaults are those of the dataclasses in `recipe.py`. The names and types of TRL's
keys are read from the installed TRL, so there is no list of them here to go stale.
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.number_range import Range
from sft_recipes.plain_values import fault_of, quoted
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    EvaluationSettings,
    LabelSettings,
    Recipe,
    TemplateSettings,
    read_yaml,
    rebase_paths,
)
from sft_recipes.recipe_checks import REFUSED, RENAMED, TABLES, Key, KeyCheck, Setting


@dataclass(frozen=True, slots=True)
class TopKeys:
    """Types and defaults of the keys at the top of a recipe that no settings hold as they stand.

    A push is ours under TRL's names: TRL's goes public and takes the whole output_dir.
    """

    datasets: list | None = None
    adapter_name_or_path: str | None = None
    global_batch_size: int | None = None
    evaluation: dict | None = None
    gate: list | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None


def _keys_of(settings: type) -> dict[str, Key]:
    """The keys that a dataclass holds, as far as the table explains them."""
    kinds = typing.get_type_hints(settings)
    table = TABLES["keys"][settings.__name__]
    keys = {}
    for field in dataclasses.fields(settings):
        row = table.get(field.name)
        if row is not None:
            keys[field.name] = Key(kinds[field.name], _default(field), _range(row), row["meaning"])
    return keys


def _default(field: "dataclasses.Field[Any]") -> Any:
    """A field's default; None for one that has to be set."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is not dataclasses.MISSING:
        return field.default
    return None


def _range(row: Mapping[str, Any]) -> Range | None:
    """The range that a row of the table states."""
    bounds = {}
    for field in dataclasses.fields(Range):
        if field.name in row:
            bounds[field.name] = row[field.name]
    return Range(**bounds) if bounds else None


# Keys inside `datasets:` and `evaluation: data:`, and inside `evaluation:`.
SOURCE_KEYS: Mapping[str, Key] = _keys_of(DatasetSource)
EVALUATION_KEYS: Mapping[str, Key] = _keys_of(EvaluationSettings)
_SET_KEYS: Mapping[str, Key] = {name: SOURCE_KEYS[name] for name in TABLES["set_keys"]}
_SETTINGS_KEYS: Mapping[str, Key] = {
    **_keys_of(DataSettings),
    **_keys_of(LabelSettings),
    **_keys_of(TemplateSettings),
}
_TOP_KEYS: Mapping[str, Key] = _keys_of(TopKeys)
# TRL's names, beside `dataset_name`, of what stands inside `datasets:` under another.
NAMES_INSIDE = {"dataset_config": "name", "dataset_train_split": "split"}
# TRL's data keys, read by this project with the same meaning.
DATA_KEYS: Mapping[str, Key] = {
    "dataset_name": SOURCE_KEYS["path"],
    "dataset_config": SOURCE_KEYS["name"],
    "dataset_train_split": SOURCE_KEYS["split"],
    "dataset_test_split": _SETTINGS_KEYS["test_split"],
    "datasets": _TOP_KEYS["datasets"],
}


def _own_keys() -> dict[str, Key]:
    """This project's own keys at the top of a recipe."""
    keys = {**_SET_KEYS, **_SETTINGS_KEYS, **_TOP_KEYS}
    for name in ("test_split", "datasets"):  # known by TRL's names
        del keys[name]
    return keys


OWN_KEYS: Mapping[str, Key] = _own_keys()


class TRLKeys(NamedTuple):
    """TRL's `ModelConfig` and `SFTConfig` keys that recipes may set, by name."""

    model: dict[str, Key]
    training: dict[str, Key]


@lru_cache(maxsize=1)
def trl_keys() -> TRLKeys:
    """The keys of the installed TRL, without those that this project reads, renames or refuses.

    Types are the installed TRL's; what a number or a text may be stands in the table, for neither
    TRL nor transformers say it. A number that the table does not know has to be finite.
    """
    from trl import ModelConfig, SFTConfig  # seconds to import, and `--help` needs none of it

    taken = {*REFUSED, *RENAMED, *OWN_KEYS}
    model = _field_keys(ModelConfig, taken)
    return TRLKeys(model, _field_keys(SFTConfig, taken | model.keys()))


def _field_keys(config: type, taken: Collection[str]) -> dict[str, Key]:
    """The fields of a dataclass that are not taken, as keys."""
    kinds = typing.get_type_hints(config)
    untaken = {}
    for field in dataclasses.fields(config):
        if field.name not in taken:
            row = TABLES["trl"].get(field.name, {})
            kind = Mapping if row.get("mapping") else kinds[field.name]
            words = tuple(row.get("words", ()))
            untaken[field.name] = Key(kind, _default(field), _range(row), words=words)
    return untaken


# -- recipes from keys -----------------------------------------------------------------------------


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply overrides, check every key. Raises InputError with all problems."""
    path = Path(path)
    given = _read_keys(path, overrides or {})
    return make_recipe(given.values, path, given.places)


class _GivenKeys(NamedTuple):
    values: dict[str, Any]
    places: dict[str, str]


def _read_keys(path: Path, overrides: Mapping[str, Any]) -> _GivenKeys:
    values, lines = read_yaml(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    places |= dict.fromkeys(overrides, "command line")
    _require_plain(overrides)
    # ./ on the command line means the working directory, in the file the file's folder.
    here = rebase_paths(overrides, Path.cwd(), path.parent)
    return _GivenKeys({**values, **here}, places)


def load_data_settings(path: Path, overrides: Mapping[str, Any]) -> DataSettings | None:
    """What a recipe says of its data, read without TRL; None where its keys have to be mended."""
    values, places = _read_keys(path, overrides)
    known = {**DATA_KEYS, **OWN_KEYS}
    own = {key: value for key, value in values.items() if key in known and value is not None}
    faults = KeyCheck(own, known, str(path), places).problems()
    if faults or own.keys().isdisjoint(("dataset_name", "datasets")):
        return None
    return _data_settings(rebase_paths(own, path.parent), str(path), places)


def _require_plain(overrides: Mapping[str, Any]) -> None:
    """Raise InputError for overrides whose paths cannot even be looked at."""
    problems = []
    for key, value in overrides.items():
        fault = fault_of(value)
        if fault:
            problems.append(Problem("command line", key, fault, "write a plain value"))
    if problems:
        raise InputError(problems)


def make_recipe(
    values: Mapping[str, Any], path: Path | None = None, places: Mapping[str, str] | None = None
) -> Recipe:
    """Build a recipe from plain values; `places` says where each key was set, for errors."""
    where = str(path or "recipe")
    places = places or {}
    trl = trl_keys()
    known = {**DATA_KEYS, **OWN_KEYS, **trl.model, **trl.training}
    problems = KeyCheck(values, known, where, places).problems()
    problems += _combinations(values, where, places)
    if problems:
        raise InputError(problems)
    # null in `max_length` is a choice, rows of any length; elsewhere it is the default.
    given = {
        key: value for key, value in values.items() if value is not None or key == "max_length"
    }
    name = "recipe"
    if path is not None:
        name = f"{path.parent.name}/{path.stem}"
        given = rebase_paths(given, path.parent)
    return Recipe(
        name=name,
        path=path,
        values=dict(values),
        model=_handed_on(given, trl.model),
        training=_handed_on(given, trl.training),
        data=_data_settings(given, where, places),
        labels=LabelSettings(**_fields(LabelSettings, given)),
        template=TemplateSettings(**_fields(TemplateSettings, given)),
        evaluation=_evaluation_settings(
            given.get("evaluation", {}), places.get("evaluation", where)
        ),
        global_batch_size=given.get("global_batch_size"),
        adapter_name=given.get("adapter_name_or_path"),
        places=dict(places),
    )


def _handed_on(given: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The given values that go to TRL.

    A whole number for a float becomes one, since torch takes no `adam_beta1: 0`; counts that may be
    shares stay as written, for transformers tells them apart by their size.
    """
    values = {}
    for name, value in given.items():
        if name not in keys:
            continue
        bounds = keys[name].range
        is_count = bounds is not None and bounds.whole_from is not None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if keys[name].kind is float and is_whole and not is_count:
            value = float(value)
        values[name] = value
    return values


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """What a recipe says of its data, for data that has no recipe."""

    data: DataSettings
    labels: LabelSettings
    template: TemplateSettings


def make_data_recipe(path: str, options: Mapping[str, Any]) -> DataRecipe:
    """Settings for a data file, folder or Hub name. `options` are a recipe's keys for data, labels
    and template; rows may have any length unless `max_length` is set. Raises InputError listing all
    problems found.
    """
    where = "command line"
    known = {**DATA_KEYS, **_SET_KEYS, **_SETTINGS_KEYS}
    for name in ("max_length", "data_seed"):
        known[name] = Key(int | None, range=_range(TABLES["trl"][name]))
    for name in ("dataset_name", "datasets", "test_split"):
        del known[name]
    problems = KeyCheck(options, known, where, dict.fromkeys(options, where)).problems()
    if problems:
        raise InputError(problems)
    given = {"max_length": None, **options, "dataset_name": path}
    return DataRecipe(
        data=_data_settings(given, where, {}),
        labels=LabelSettings(**_fields(LabelSettings, given)),
        template=TemplateSettings(**_fields(TemplateSettings, given)),
    )


def _fields(settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys that are fields of these settings."""
    chosen = {}
    for field in dataclasses.fields(settings):
        if field.name in given:
            chosen[field.name] = given[field.name]
    return chosen


def _combinations(
    values: Mapping[str, Any], where: str, places: Mapping[str, str]
) -> list[Problem]:
    """Keys that are missing, and keys that exclude one another."""
    problems = []
    for key in ("model_name_or_path", "output_dir"):
        if values.get(key) is None:
            problems.append(Problem(where, key, "is required", f"add `{key}: ...`"))
    if values.get("dataset_name") is None and values.get("datasets") is None:
        fix = "add dataset_name or datasets"
        problems.append(Problem(where, "dataset_name", "no data set is named", fix))
    for key, other in TABLES["apart"].items():
        if values.get(key) and values.get(other):
            fix = "remove one of them or set it to null"
            place = places.get(key, where)
            problems.append(Problem(place, key, f"set together with {other}", fix))
    return problems


def _data_settings(given: Mapping[str, Any], where: str, places: Mapping[str, str]) -> DataSettings:
    problems = []
    beside = _keys_beside_dataset_name(given)
    if "datasets" in given:
        where = places.get("datasets", where)
        sources = [_source(entry, where, "datasets.") for entry in given["datasets"]]
        for setting in beside:
            fix = "write it inside `datasets:`"
            place = places.get(setting.key, where)
            problems.append(Problem(place, setting.key, "belongs to one data set", fix))
    else:
        entry = {"path": given["dataset_name"]}
        for setting in beside:
            entry[NAMES_INSIDE.get(setting.key, setting.key)] = setting.value
        sources = [_source(entry, where, "")]
    problems += _mixture_problems(sources, where)
    if problems:
        raise InputError(problems)
    settings = _fields(DataSettings, given)
    settings["datasets"] = tuple(sources)
    settings["test_split"] = given.get("dataset_test_split")
    if "data_seed" in given:
        settings["seed"] = given["data_seed"]
    return DataSettings(**settings)


def _keys_beside_dataset_name(given: Mapping[str, Any]) -> list[Setting]:
    """Those of the given keys that describe the data set of `dataset_name`."""
    settings = []
    for key in (*NAMES_INSIDE, *_SET_KEYS):
        if key in given:
            settings.append(Setting(key, given[key]))
    return settings


def _mixture_problems(sources: Sequence[DatasetSource], where: str) -> list[Problem]:
    """Shares of the mixture that do not go together, and a mixture that nothing is held out of."""
    problems = []
    if not any(source.held_out for source in sources):
        what = "false for every data set"
        problems.append(Problem(where, "held_out", what, "remove it from one of them"))
    with_fraction = [source for source in sources if source.fraction is not None]
    if with_fraction and len(with_fraction) < len(sources):
        what = "set for some data sets only"
        problems.append(Problem(where, "fraction", what, "set it for all or for none"))
    if with_fraction and any(source.weight != 1 for source in sources):
        problems.append(Problem(where, "weight", "set together with fraction", "use one of them"))
    return problems


def _source(entry: Any, where: str, prefix: str) -> DatasetSource:
    """One data set: a path, or a mapping with TRL's and our per-set keys."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or entry.get("path") is None:
        what = f"expected a mapping with `path`, got {quoted(entry)}"
        raise InputError(Problem(where, f"{prefix}path", what, "add path"))
    known = dict(SOURCE_KEYS)
    if prefix.startswith("evaluation"):  # rows to answer are no mixture
        del known["weight"], known["fraction"], known["held_out"]
    return DatasetSource(**_block(entry, known, where, prefix))


def _evaluation_settings(block: Mapping[str, Any], where: str) -> EvaluationSettings:
    known = {**EVALUATION_KEYS, "data": Key(Any)}  # a path or a block, which `_source` reads
    settings = _block(block, known, where, "evaluation.")
    if settings.get("data") is not None:
        settings["data"] = _source(settings["data"], where, "evaluation.data.")
    return EvaluationSettings(**settings)


def _block(
    block: Mapping[str, Any], known: Mapping[str, Key], where: str, prefix: str
) -> dict[str, Any]:
    """The keys of a nested block; null is the default, except where "none" is a choice too."""
    problems = KeyCheck(block, known, where, prefix=prefix).problems()
    if problems:
        raise InputError(problems)
    settings = {}
    for key, value in block.items():
        if value is not None or known[key].fits(None):
            settings[key] = value
    return settings
