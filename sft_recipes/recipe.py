"""Recipes: flat YAML files, read strictly into frozen dataclasses.

TRL's keys keep their names and meaning and go to TRL verbatim (`trl_keys` in `recipe_keys.py` names them); the keys
below are this project's own or TRL's data keys, which this project reads itself. No torch here.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sft_recipes.errors import InputError, Problem

_PATH_KEYS = (
    "model_name_or_path",
    "dataset_name",
    "chat_template",
    "output_dir",
    "datasets",
    "data",
    "path",
)


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """One data set of the mixture. `path` is a file, a folder or a Hub name; the rest as TRL's `DatasetConfig`.

    `fraction` is TRL's: this set's share of the final mixture (all sets or none). `weight` is ours: 2.5 means every
    row twice plus a seeded half of the rows a third time.

    How rows are read: `column_mapping` is {our column: their column, or a list of columns to join}, `message_mapping`
    {our key inside a turn: their key}, `role_mapping` {our role: their name or names}. `consecutive_turns: merge`
    joins turns of one role in a row by a blank line; by default they are an error.
    """

    path: str
    name: str | None = None
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None
    split: str = "train"
    columns: Sequence[str] | None = None
    fraction: float | None = None
    weight: float = 1.0
    format: str | None = None
    column_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    message_mapping: Mapping[str, str] = field(default_factory=dict)
    role_mapping: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    consecutive_turns: Literal["error", "merge"] = "error"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which rows are read. `eval_split`: share (below 1) or count of rows held out by a seeded draw."""

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

    `chat_template`: a shipped name, a `.jinja` path, `tokenizer` for the tokenizer's own, or None for the tokenizer's
    own where it has one and the chapter's instruction template where it has none.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Generation-based evaluation. `data` None means the recipe's own eval rows.

    `rows`: how many prompts are generated inside training (all in the standalone command unless
    `max_rows` there); `batch_size` in prompts per process (None: 64 on CUDA, 32 elsewhere);
    `during_training` switches the metrics inside `trainer.evaluate()`, which may take `max_share`
    of the run's time (null: as much as it takes).
    """

    data: DatasetSource | None = None
    during_training: bool = True
    max_share: float | None = 0.05
    rows: int = 32
    max_new_tokens: int = 256
    batch_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. `values` are the keys exactly as set (file, then overrides); the rest is derived from them.

    `model` and `training` hold the keys that go verbatim to TRL's `ModelConfig` and `SFTConfig`.
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

    @property
    def model_name(self) -> str:
        """The model's folder or Hub name, already resolved against the recipe file."""
        return str(self.model["model_name_or_path"])

    def saved_values(self) -> dict[str, Any]:
        """The keys as they are written to the run folder's recipe.yaml: paths hold from there, output_dir is there."""
        base = self.path.parent if self.path else None
        return {**rebase_paths(self.values, base, self.output_dir), "output_dir": "./"}

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(str(self.training["output_dir"]))


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses duplicate keys, reads `2e-5` as a number and only true/false as booleans."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                what = f"set twice (first in line {seen[key]})"
                raise InputError(Problem(f"{self.name}:{line}", str(key), what, "keep one"))
            seen[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `no` as False and `2e-5` as text; both have ruined runs elsewhere, so the 1.2 rules apply here.
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS, _POWER = r"\d[\d_]*", r"[eE][-+]?\d+"
_FLOAT = rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:{_POWER})?|{_DIGITS}{_POWER}|\.(?:inf|Inf|nan))"
_BOOL = "true|True|TRUE|false|False|FALSE"
for _tag, _pattern, _first in (("bool", _BOOL, "tTfF"), ("float", _FLOAT, "-+.0123456789")):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a recipe file into its keys and the 1-based line of each top-level key."""
    if not path.is_file():
        fix = "run `sft-recipes init` to see the shipped ones"
        raise InputError(Problem(str(path), "", "no such recipe file", fix))
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _StrictLoader)
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise InputError(
            Problem(where, "", f"not plain YAML: {what}", "use plain keys and values")
        ) from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise InputError(
            Problem(
                str(path), "", "a recipe is a mapping of keys to values", "write `key: value` lines"
            )
        )
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return {str(key): value for key, value in values.items()}, lines


def parse_value(text: str) -> Any:
    """Read one command-line value by the YAML rules of recipes: `2e-5` is a number, `[a, b]` a list."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError:
        return text


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--learning_rate", "1e-4", "--packing=true"]` as `{"learning_rate": 1e-4, "packing": True}`.

    A flag without a value means true. Raises InputError for anything that is not `--key value`.
    """
    overrides: dict[str, Any] = {}
    waiting = ""  # the key whose value may be the next argument
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            overrides[key] = parse_value(value) if equals else True
            waiting = "" if equals else key
        elif waiting:
            overrides[waiting], waiting = parse_value(argument), ""
        else:
            raise InputError(
                Problem("command line", argument, "not an override", "write `--key value`")
            )
    return overrides


def relative_path(path: Path, folder: Path) -> str:
    """The path as seen from `folder`, starting with `./` or `../`."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return relative if relative.startswith("..") else f"./{relative}"


def rebase_paths(
    values: Mapping[str, Any], base: Path | None, folder: Path | None = None
) -> dict[str, Any]:
    """The recipe's keys with paths relative to `base` (those that start with `./` or `../`) made absolute, or relative
    to `folder`. Any other path, and every path without a `base`, is left as it is.
    """

    def rebase(key: str, value: Any) -> Any:
        if (
            isinstance(value, str)
            and base is not None
            and key in _PATH_KEYS
            and value.startswith(("./", "../"))
        ):
            return relative_path(base / value, folder) if folder else str((base / value).resolve())
        if isinstance(value, list) and key == "datasets":
            return [rebase(key, entry) for entry in value]
        if isinstance(value, Mapping) and key in ("datasets", "evaluation", "data"):
            return {name: rebase(name, part) for name, part in value.items()}
        return value

    return {key: rebase(key, value) for key, value in values.items()}


def as_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain data for JSON."""
    return dataclasses.asdict(settings)
