"""Recipes are read strictly: what is wrong is named with its line and its fix, what is right means what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes.errors import InputError
from sft_recipes.recipe import (
    EvaluationSettings,
    parse_overrides,
    parse_value,
    read_yaml,
    rebase_paths,
)
from sft_recipes.recipe_checks import NOTES, REFUSED, RENAMED
from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS, load_recipe, trl_keys

MINIMAL = "model_name_or_path: ./base\ndataset_name: ./data\noutput_dir: runs/x\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe text below tmp_path/recipes."""

    def write(text: str) -> Path:
        path = tmp_path / "recipes" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, **overrides: Any) -> list[str]:
    """Every problem of a recipe, as text."""
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rte", "learning_rate"),
        ("train_onn", "train_on"),
        ("lora_rr", "lora_r"),
        ("data_set_name", "dataset_name"),
    ],
)
def test_unknown_key_gets_a_suggestion(
    recipe_file: Callable[[str], Path], key: str, meant: str
) -> None:
    """A misspelt key is an error with file, line and the key that was meant."""
    path = recipe_file(f"{MINIMAL}# a comment\n{key}: 1\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:5: {key}: unknown key. Fix: did you mean {meant!r}?")


def test_all_problems_are_found_in_one_pass(recipe_file: Callable[[str], Path]) -> None:
    """Three wrong keys and a missing one are four problems, those of the command line named as such."""
    found = problems(
        recipe_file("dataset_name: d\noutput_dir: o\nzzz: 1\nenv: {}\n"), max_length="long"
    )
    assert len(found) == 4
    assert any(problem.startswith("command line: max_length: ") for problem in found)
    assert any("model_name_or_path: is required" in problem for problem in found)


def test_duplicate_key_names_both_lines(recipe_file: Callable[[str], Path]) -> None:
    """A key that stands twice is an error with both lines, at the top and inside a block."""
    path = recipe_file(f"{MINIMAL}seed: 1\nmax_length: 5\nseed: 2\n")
    assert problems(path) == [f"{path}:6: seed: set twice (first in line 4). Fix: keep one."]
    path = recipe_file(f"{MINIMAL}evaluation:\n  rows: 1\n  rows: 2\n")
    assert problems(path) == [f"{path}:6: rows: set twice (first in line 5). Fix: keep one."]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-2e-5", -2e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("7", 7),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("1e-5x", "1e-5x"),
        ("[a, 2e-5]", ["a", 2e-5]),
        ("{unbalanced", "{unbalanced"),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    """2e-5 is a number; no, off and yes are words; a date is text."""
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_values_in_a_file(recipe_file: Callable[[str], Path]) -> None:
    """The same rules hold in the file: a rate is a float, `eval_strategy: no` is TRL's word."""
    recipe = load_recipe(
        recipe_file(f"{MINIMAL}learning_rate: 2e-5\neval_strategy: no\nmax_length: null\n")
    )
    assert recipe.training["learning_rate"] == 2e-5
    assert recipe.training["eval_strategy"] == "no"
    assert recipe.labels.max_length is None
    assert load_recipe(recipe_file(MINIMAL)).labels.max_length == 1024


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_keys_give_their_fix(recipe_file: Callable[[str], Path], key: str) -> None:
    """Every key that is not taken says what to do instead, whatever its value."""
    (problem,) = problems(recipe_file(f"{MINIMAL}{key}: true\n"))
    assert (
        ":4: " in problem
        and f"{key}: not taken by this project. Fix: {REFUSED[key].rstrip('.')}." in problem
    )


@pytest.mark.parametrize("key", sorted(RENAMED))
def test_renamed_keys_give_the_new_name(recipe_file: Callable[[str], Path], key: str) -> None:
    """Every old name leads to a key that is accepted, with what differs, or out of the way of one that is set."""
    (problem,) = problems(recipe_file(f"{MINIMAL}{key}: 1\n"))
    assert (
        f"is now called {RENAMED[key]!r}" in problem and f"write `{RENAMED[key]}: ...`" in problem
    )
    assert NOTES.get(key, "") in problem
    both = problems(recipe_file(f"{MINIMAL}{key}: 1\n{RENAMED[key]}: null\n"))
    assert f"remove it; {RENAMED[key]} is set as well" in both[0]
    model, training = trl_keys()
    assert RENAMED[key] in {*DATA_KEYS, *OWN_KEYS, *model, *training}


def test_no_key_of_trl_is_unknown() -> None:
    """Every field of the installed SFTConfig and ModelConfig is accepted, renamed or refused with a fix; and no refused
    or renamed key is accepted as well."""
    from trl import ModelConfig, SFTConfig

    fields = {
        field.name for config in (ModelConfig, SFTConfig) for field in dataclasses.fields(config)
    }
    model, training = trl_keys()
    accepted = {*model, *training}
    assert fields <= accepted | OWN_KEYS.keys() | REFUSED.keys() | RENAMED.keys()
    assert not accepted & (REFUSED.keys() | RENAMED.keys()) and accepted <= fields
    assert (
        not OWN_KEYS.keys() & REFUSED.keys()
        and not (OWN_KEYS.keys() | DATA_KEYS.keys()) & RENAMED.keys()
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "fast", "float"),
        ("max_steps", "2.5", "int"),
        ("max_steps", "true", "int"),
        ("packing", "1", "true or false"),
        ("packing", "yes", "true or false"),
        ("lora_target_modules", "q_proj", "list"),
        ("train_on", "user", "one of assistant, last_assistant, all"),
        ("lr_scheduler_type", "cosinus", "cosine"),
        ("eval_strategy", "often", "one of no, steps, epoch"),
        ("column_mapping", "text", "mapping of names"),
        ("evaluation", "7", "dict"),
        ("eval_split", "a", "float"),
    ],
)
def test_wrong_types_are_refused(
    recipe_file: Callable[[str], Path], key: str, value: str, expected: str
) -> None:
    """A value of the wrong type or choice is named with what was expected, for TRL's keys and ours."""
    (problem,) = problems(recipe_file(f"{MINIMAL}{key}: {value}\n"))
    assert f":4: {key}: expected " in problem and expected in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1),
        ("lr_scheduler_type", "cosine"),
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("report_to", ["tensorboard"]),
        ("report_to", "none"),
        ("optim", "adamw_torch"),
        ("warmup_steps", 0.05),
        ("lr_scheduler_kwargs", {"num_cycles": 1}),
        ("eval_split", 100),
        ("save_strategy", "no"),
    ],
)
def test_right_types_are_taken(recipe_file: Callable[[str], Path], key: str, value: Any) -> None:
    """What TRL takes is taken verbatim."""
    recipe = load_recipe(recipe_file(MINIMAL + yaml.safe_dump({key: value})))
    assert {**recipe.model, **recipe.training, "eval_split": recipe.data.eval_split}[key] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("a: [1\n", "not plain YAML"),
        ("a: !!python/object:os.system x\n", "not plain YAML"),
        (f"{MINIMAL}datasets: [./a]\n", "datasets: set together with dataset_name"),
        (
            f"{MINIMAL}evaluation: {{rowz: 1}}\n",
            "evaluation.rowz: unknown key. Fix: did you mean 'rows'?",
        ),
        (f"{MINIMAL}evaluation: {{rows: many}}\n", "evaluation.rows: expected int"),
    ],
)
def test_broken_files_are_refused(
    recipe_file: Callable[[str], Path], text: str, message: str
) -> None:
    """Files that are no recipe, and wrong nested keys, are refused with what is wrong."""
    assert any(message in problem for problem in problems(recipe_file(text)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: ./a, weigth: 2}", "datasets.weigth: unknown key. Fix: did you mean 'weight'?"),
        ("{name: x}", "expected a mapping with `path`"),
        ("{path: ./a, weight: heavy}", "datasets.weight: expected float"),
        ("{path: ./a, fraction: 0.5}, {path: ./b}", "fraction: set for some data sets only"),
        ("{path: ./a, fraction: 1, weight: 2}", "weight: set together with fraction"),
    ],
)
def test_broken_data_sets_are_refused(
    recipe_file: Callable[[str], Path], entry: str, message: str
) -> None:
    """Wrong keys inside `datasets:` are named."""
    path = recipe_file(f"model_name_or_path: m\noutput_dir: o\ndatasets: [{entry}]\n")
    assert message in problems(path)[0]


def test_null_leaves_the_default(recipe_file: Callable[[str], Path]) -> None:
    """null in `evaluation:` is the default, except where "no limit" is a choice of its own."""
    recipe = load_recipe(
        recipe_file(f"{MINIMAL}evaluation: {{rows: null, max_share: null, data: null}}\n")
    )
    assert recipe.evaluation == dataclasses.replace(EvaluationSettings(), max_share=None)


def test_missing_file(tmp_path: Path) -> None:
    """A recipe that is not there leads to `init`."""
    assert "no such recipe file. Fix: run `sft-recipes init`" in problems(tmp_path / "none.yaml")[0]


def test_paths_are_relative_to_the_file(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    """./ and ../ are relative to the recipe file; Hub names and other paths stay as they are."""
    path = recipe_file(
        "model_name_or_path: ../base\noutput_dir: ./run\nchat_template: ./mine.jinja\n"
        "datasets: [{path: ./a.jsonl}, {path: org/name}]\nevaluation: {data: ../test.jsonl}\n"
    )
    recipe = load_recipe(path)
    here = path.parent.resolve()
    assert recipe.model_name == str(here.parent / "base")
    assert recipe.output_dir == here / "run"
    assert recipe.template.chat_template == str(here / "mine.jinja")
    assert [source.path for source in recipe.data.datasets] == [str(here / "a.jsonl"), "org/name"]
    assert recipe.evaluation.data is not None and recipe.evaluation.data.path == str(
        here.parent / "test.jsonl"
    )
    assert (
        load_recipe(recipe_file(MINIMAL.replace("./base", "org/model"))).model_name == "org/model"
    )
    assert rebase_paths({"output_dir": "runs/x"}, here) == {"output_dir": "runs/x"}


def test_saved_recipe_holds_from_the_run_folder(
    recipe_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """recipe.yaml in the run folder names the same files and the run folder itself, wherever the run folder is."""
    path = recipe_file(
        "model_name_or_path: ../base\nchat_template: chatml\nlearning_rate: 2e-5\nsystem_prompt: ./not a path\n"
        "datasets: [{path: ./a.jsonl, weight: 2.0}, org/name]\nevaluation: {data: {path: ./t.jsonl}, rows: 3}\n"
        f"output_dir: {tmp_path}/deep/er/run\n"
    )
    recipe = load_recipe(path)
    recipe.output_dir.mkdir(parents=True)
    saved = recipe.output_dir / "recipe.yaml"
    saved.write_text(yaml.safe_dump(recipe.saved_values()))
    again = load_recipe(saved)
    assert again.output_dir.resolve() == recipe.output_dir.resolve()
    assert again.data == recipe.data and again.evaluation == recipe.evaluation
    assert (again.model, again.labels, again.template) == (
        recipe.model,
        recipe.labels,
        recipe.template,
    )
    assert again.saved_values() == recipe.saved_values()


def test_rebase_paths() -> None:
    """Only keys that hold paths, and only values that start with ./ or ../, are rebased."""
    values = {
        "dataset_name": "./d",
        "chat_template": "chatml",
        "run_name": "./x",
        "model_name_or_path": "org/m",
    }
    rebased = rebase_paths(values, Path("/r/recipes"), Path("/r/runs/one"))
    assert rebased == {**values, "dataset_name": "../../recipes/d"}
    assert rebase_paths({"dataset_name": "./d"}, Path("/r"), Path("/r"))["dataset_name"] == "./d"


def test_overrides_replace(recipe_file: Callable[[str], Path]) -> None:
    """A key of the command line replaces the file's, blocks are not merged, and ./ there is the working directory."""
    path = recipe_file(f"{MINIMAL}seed: 1\nevaluation: {{rows: 5, batch_size: 2}}\n")
    recipe = load_recipe(
        path, parse_overrides(["--seed", "3", "--evaluation", "{rows: 7}", "--dataset_name", "./e"])
    )
    assert recipe.training["seed"] == 3 == recipe.data.seed
    assert recipe.evaluation.rows == 7 and recipe.evaluation.batch_size != 2
    assert recipe.data.datasets[0].path == str(Path.cwd() / "e")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning-rate=1e-4"], {"learning_rate": 1e-4}),
        (["--packing"], {"packing": True}),
        (["--packing", "--seed", "3"], {"packing": True, "seed": 3}),
        (["--x", "-1"], {"x": -1}),
        (["--x="], {"x": None}),
        (["--x", "a=b"], {"x": "a=b"}),
        (
            ["--lora_target_modules", "[q_proj, v_proj]"],
            {"lora_target_modules": ["q_proj", "v_proj"]},
        ),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        ([], {}),
    ],
)
def test_override_forms(arguments: list[str], expected: dict[str, Any]) -> None:
    """`--key value`, `--key=value`, dashes, flags alone, negative numbers and lists."""
    assert parse_overrides(arguments) == expected


@pytest.mark.parametrize("arguments", [["seed", "1"], ["--"], ["--seed", "1", "2"], ["-s", "1"]])
def test_other_arguments_are_refused(arguments: list[str]) -> None:
    """Anything that is not `--key value` is an error, not ignored."""
    with pytest.raises(InputError, match="not an override"):
        parse_overrides(arguments)


def test_lines_of_keys(recipe_file: Callable[[str], Path]) -> None:
    """Each top-level key comes with the line it stands in."""
    _, lines = read_yaml(recipe_file("# one\na: 1\n\nb:\n  c: 2\n  d: 3\ne: 5\n"))
    assert lines == {"a": 2, "b": 4, "e": 7}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "column_mapping: {output: 5}",
            "column_mapping: expected a mapping of names to names, {ours: theirs}, got {'output': 5}",
        ),
        (
            "column_mapping: {output: [a, 5]}",
            "column_mapping: expected a mapping of names to names, ",
        ),
        (
            "message_mapping: {role: [from]}",
            "message_mapping: expected a mapping of names to names, ",
        ),
        ("role_mapping: {user: {a: b}}", "role_mapping: expected a mapping of names to names, "),
        ("consecutive_turns: join", "consecutive_turns: expected one of error, merge, got 'join'"),
        ("columns: messages", "columns: expected list, got 'messages'"),
    ],
)
def test_mappings_hold_names(recipe_file: Callable[[str], Path], line: str, expected: str) -> None:
    """A mapping with something else than names in it is refused when the recipe is read."""
    (problem,) = problems(recipe_file(f"{MINIMAL}{line}\n"))
    assert f": {expected}" in problem


def test_how_rows_are_read_stands_beside_the_data_set_or_inside(
    recipe_file: Callable[[str], Path],
) -> None:
    """The keys that say how the rows of a data set are read mean the same in both places."""
    keys = (
        "columns: [chat]",
        "column_mapping: {messages: chat, tools: [a, b]}",
        "message_mapping: {role: who}",
        "role_mapping: {user: [A, B], assistant: C}",
        "consecutive_turns: merge",
    )
    beside = load_recipe(recipe_file(MINIMAL + "\n".join(keys))).data.datasets
    inside = "".join(f"    {key}\n" for key in keys)
    minimal = MINIMAL.replace("dataset_name: ./data\n", "")
    assert (
        load_recipe(recipe_file(f"{minimal}datasets:\n  - path: ./data\n{inside}")).data.datasets
        == beside
    )
    assert beside[0].role_mapping == {"user": ["A", "B"], "assistant": "C"}
