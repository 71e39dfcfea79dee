"""What a recipe is: a flat YAML file, read strictly into frozen dataclasses; the recipes that ship.

TRL's keys keep their names and meaning and go to TRL verbatim (`trl_keys` in `recipe_keys.py` names
them); the keys below are this project's own or TRL's data keys, which this project reads itself.
`recipe_keys.load_recipe` checks and builds a recipe from its file. No torch here.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.plain_values import is_file, shown
from sft_recipes.yaml_reader import parse_word, read_yaml_file

_PACKAGE = Path(__file__).resolve().parent
GATE = "gate.yaml"  # the bounds that belong to the recipes of a folder
# Keys whose text names a file, a folder or a repository; those of which `./` is seen from the
# recipe's file, at any depth; and those that hold other keys.
PATHS = (
    "model_name_or_path",
    "adapter_name_or_path",
    "dataset_name",
    "chat_template",
    "output_dir",
    "path",
    "data_files",
)
_PATH_KEYS = (*PATHS[:-1], "datasets", "data")
BLOCK_KEYS = ("datasets", "evaluation", "data")


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """One data set of the mixture; the names are those of TRL's `DatasetConfig`, then ours.

    What each key means stands in `recipe_keys.yaml`, from which the documentation is made.
    """

    path: str
    name: str | None = None
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None
    split: str = "train"
    columns: Sequence[str] | None = None
    fraction: float | None = None
    weight: float = 1.0
    held_out: bool = True
    format: str | None = None
    column_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    message_mapping: Mapping[str, str] = field(default_factory=dict)
    role_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    consecutive_turns: Literal["error", "merge"] = "error"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which rows are read, and which of them are held out."""

    datasets: Sequence[DatasetSource]
    test_split: str | None = None
    eval_split: float | None = None
    max_rows: int | None = None
    on_bad_rows: Literal["error", "skip"] = "error"
    max_rejected: float = 0.05
    allow_empty_output: bool = False
    seed: int = 42
    dataset_num_proc: int | None = None


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How rows become input_ids and labels; see `data/labels.py` for the contract."""

    system_prompt: str | None = None
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    history: Literal["expand", "mask"] = "expand"
    empty_think: Literal["mask", "train"] = "mask"
    overlength: Literal["drop", "truncate", "error"] = "drop"
    max_length: int | None = 1024
    max_lost: float = 0.05
    control_tokens: Literal["neutralize", "strip_end", "drop", "error"] = "neutralize"


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """How conversations are rendered, in training and when served.

    `chat_template` None: the tokenizer's own where it has one, else the instruction template.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Generation-based evaluation inside training. `data` None means the recipe's own eval rows."""

    data: DatasetSource | None = None
    during_training: bool = True
    max_share: float | None = 0.05
    rows: int = 32
    max_new_tokens: int = 256
    batch_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. `values` are the keys exactly as set (file, then overrides); the rest follows.

    `model` and `training` hold the keys that go verbatim to TRL's `ModelConfig` and `SFTConfig`.
    `adapter_name` is the folder or Hub name of the adapter that the run goes on from, if it does.
    `places` says where each key was set, `FILE:LINE` or the command line.
    """

    name: str
    path: Path | None
    values: Mapping[str, Any]
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    data: DataSettings
    labels: LabelSettings
    template: TemplateSettings
    evaluation: EvaluationSettings
    global_batch_size: int | None = None
    adapter_name: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Where a key was set, for errors; the recipe's name for one that was not."""
        return self.places.get(key.partition(".")[0], self.name)

    @property
    def model_name(self) -> str:
        """The model's folder or Hub name, already resolved against the recipe file."""
        return str(self.model["model_name_or_path"])

    def saved_values(self) -> dict[str, Any]:
        """The keys as the run folder's recipe.yaml holds them: paths are seen from there."""
        base = self.path.parent if self.path else None
        return {**rebase_paths(self.values, base, self.output_dir), "output_dir": "./"}

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(str(self.training["output_dir"]))


class RecipeFile(NamedTuple):
    """A recipe file as it was read: its keys, and the 1-based line of each top-level key."""

    values: dict[str, Any]
    lines: dict[str, int]


def read_yaml(path: Path) -> RecipeFile:
    """Read a recipe file. Raises InputError for a file that is missing or is no flat YAML."""
    if not is_file(path):
        fix = "run `sft-recipes init` to see the shipped ones"
        raise InputError(Problem(shown(str(path)), "", "no such recipe file", fix))
    document = read_yaml_file(path)
    if not isinstance(document.value, dict):
        what = "a recipe is a mapping of keys to values"
        raise InputError(Problem(str(path), "", what, "write `key: value` lines"))
    return RecipeFile(document.value, document.lines)


def parse_value(text: str) -> Any:
    """Read one command-line value by the YAML rules of recipes: `2e-5` is a number."""
    return parse_word(text)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--seed", "3", "--packing=true"]` as `{"seed": 3, "packing": True}`.

    A flag without a value means true. Raises InputError for anything that is not `--key value`.
    """
    overrides: dict[str, Any] = {}
    waiting = ""  # the key whose value may be the next argument
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            if equals:
                overrides[key] = parse_value(value)
                waiting = ""
            else:
                overrides[key] = True
                waiting = key
        elif waiting:
            overrides[waiting] = parse_value(argument)
            waiting = ""
        else:
            fix = "write `--key value`"
            raise InputError(Problem("command line", argument, "not an override", fix))
    return overrides


def relative_path(path: Path, folder: Path) -> str:
    """The path as seen from `folder`, starting with `./` or `../`."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    if relative.startswith(".."):
        return relative
    return f"./{relative}"


def rebase_paths(
    values: Mapping[str, Any], base: Path | None, folder: Path | None = None
) -> dict[str, Any]:
    """The recipe's keys with paths relative to `base` (those that start with `./` or `../`) made
    absolute, or relative to `folder`. Any other path, and every path without a `base`, stays.
    """
    if base is None:
        return dict(values)

    def rebased(_: str, path: str) -> str:
        if not path.startswith(("./", "../")):
            return path
        if folder is None:
            return str((base / path).resolve())
        return relative_path(base / path, folder)

    return map_paths(values, rebased)


def map_paths(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """The recipe's keys with `change(key, path)` in the place of every path or name that may be one.

    Keys inside others have their names, too: `datasets.0.path`, `evaluation.data`.
    """
    return {key: _mapped(key, key, value, change) for key, value in values.items()}


def _mapped(place: str, key: str, value: Any, change: Callable[[str, str], str]) -> Any:
    """The value of one key, and of the keys inside it; `place` is its full name."""
    if isinstance(value, str) and key in _PATH_KEYS:
        return change(place, value)
    if isinstance(value, list) and key == "datasets":
        entries = []
        for number, entry in enumerate(value):
            entries.append(_mapped(f"{place}.{number}", key, entry, change))
        return entries
    if isinstance(value, Mapping) and key in BLOCK_KEYS:
        return {
            name: _mapped(f"{place}.{name}", name, part, change) for name, part in value.items()
        }
    return value


def as_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain data for JSON."""
    return dataclasses.asdict(settings)


# -- what ships ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A shipped recipe: `name` is model/kind, `summary` the first comment line of its file."""

    name: str
    path: Path
    summary: str


def _shipped_folder(name: str) -> Path:
    """A folder that travels inside the wheel; in a checkout it stands beside the package."""
    inside = _PACKAGE / "shipped" / name
    if inside.is_dir():
        return inside
    return _PACKAGE.parent / name


def shipped_recipes() -> list[ShippedRecipe]:
    """All shipped recipes, by name."""
    root = _shipped_folder("recipes")
    recipes = []
    for path in sorted(root.rglob("*.yaml")):
        if path.name != GATE:
            name = path.relative_to(root).with_suffix("").as_posix()
            first_line = path.read_text(encoding="utf-8").splitlines()[0]
            recipes.append(ShippedRecipe(name, path, first_line.lstrip("# ")))
    return recipes


def launch_names() -> list[str]:
    """The names of the accelerate configs that ship."""
    return sorted(file.stem for file in _shipped_folder("accelerate_configs").glob("*.yaml"))


def launch_config(name: Path | str) -> Path:
    """The accelerate config called `name`, or the file if `name` is one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = launch_names()
    if str(name) in known:
        return _shipped_folder("accelerate_configs") / f"{name}.yaml"
    what = f"there is no accelerate config {str(name)!r}"
    fix = f"use one of {', '.join(known)}, or a file"
    raise InputError(Problem("command line", "--launch", what, fix))
