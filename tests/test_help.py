"""What the command says before it works: help with examples, versions, names that exist, wrong columns at once."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import sft_recipes
from sft_recipes import cli
from sft_recipes.cli_examples import EXAMPLES
from sft_recipes.errors import InputError
from sft_recipes.recipe import launch_config, launch_names, parse_overrides
from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS, trl_keys
from sft_recipes.run_folder import RUN_STATE, require_there
from tests.test_architecture import HEAVY, MODULES

COMMAND: Any = typer.main.get_command(cli.app)


def all_commands(group: Any = COMMAND, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command and group by its words, the program itself as an empty name."""
    yield name, group
    for word, inner in getattr(group, "commands", {}).items():
        yield from all_commands(inner, f"{name} {word}".strip())


COMMANDS = dict(all_commands())


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Exit code and all output of `sft-recipes ARGUMENTS`, on a terminal of 100 columns."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "100")
        code = cli.run(arguments)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_the_table_of_examples_has_every_command_and_no_other() -> None:
    """A command without examples, or examples of a command that is gone, fail."""
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_ends_in_its_two_examples(name, say) -> None:
    """Each stands on a line of its own, uncut, so that it works when it is copied."""
    code, out = say(*name.split(), "--help")
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert code == 0 and lines[-3:] == ["Examples:", *EXAMPLES[name]]
    assert all(len(example) <= 78 for example in EXAMPLES[name])


@pytest.mark.parametrize("example", sorted(set().union(*EXAMPLES.values())))
def test_examples_go_through_the_parser(example, monkeypatch, tmp_path) -> None:
    """Arguments, options and overrides of every example are ones that the command takes."""
    for run in ("mine", "other"):
        (tmp_path / run / "run" / "evaluations" / "eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(example.split("| ")[-1])
    assert words[0] == "sft-recipes"
    name, rest = words[1], words[2:]
    if name == "review":
        name, rest = f"review {rest[0]}", rest[1:]
    context = COMMANDS[name].make_context(name, rest)
    trl = trl_keys()
    known = {*DATA_KEYS, *OWN_KEYS, *trl.model, *trl.training, "data_seed"}
    assert parse_overrides(context.args).keys() <= known
    if launch := context.params.get("launch"):
        launch_config(launch)


def test_examples_belong_to_their_command() -> None:
    """The help of a command shows how that command is called; a group's, one of its own."""
    for name, examples in EXAMPLES.items():
        for example in examples:
            assert f"sft-recipes {name}".strip() in example


def test_version(say) -> None:
    """`--version` is the package's, and ends well."""
    assert say("--version") == (0, f"sft-recipes {sft_recipes.__version__}\n")


def test_launch_lists_its_names(say) -> None:
    """All names that work stand in the help of each command that launches, and behind a wrong one."""
    for command in ("check", "train"):
        _, out = say(command, "--help")
        words = out.replace("│", " ").replace(",", " ").replace(";", " ").split()
        assert set(launch_names()) <= set(words)
    with pytest.raises(InputError) as refused:
        launch_config("dpp")
    assert all(name in str(refused.value) for name in launch_names())


@pytest.mark.parametrize("command", ["check", "train", "prepare", "inspect"])
def test_overrides_are_told(command, say) -> None:
    """That any key of a recipe can be set behind the command stands in its help."""
    _, out = say(command, "--help")
    assert "--key value" in out


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2", "fsdp2_cp", "zero3_offload"])
def test_a_launch_on_gpus_needs_gpus(name, say, write_recipe, monkeypatch) -> None:
    """It is refused before anything starts, and the launch that the fix names is one for CPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out = say("train", str(write_recipe()), "--launch", name)
    assert code == 2 and "there is none here" in out
    fix = out.split("--launch ")[1].split()[0]
    assert fix in launch_names() and fix.endswith("_cpu")
    assert fix == f"{name}_cpu" or f"{name}_cpu" not in launch_names()


def test_the_module_that_launchers_start_explains_itself() -> None:
    """`python -m sft_recipes.training.train --help` says how it is called, and loads nothing."""
    code = "import runpy, sys; sys.argv = ['train', '--help']\ntry:\n"
    code += "    runpy.run_module('sft_recipes.training.train', run_name='__main__')\n"
    code += f"finally:\n    print(sorted(set(sys.modules) & {set(HEAVY)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert "--config RECIPE" in done.stdout and "--allow_changed" in done.stdout
    assert done.stdout.endswith("\n[]\n")


# -- wrong columns ---------------------------------------------------------------------------------

WRONG = {"column_mapping": {"instruction": "question", "output": "answer"}}


@pytest.mark.parametrize(
    "command", ["check", "train", "train --launch ddp_cpu", "prepare", "inspect", "audit"]
)
def test_a_wrong_column_is_said_before_heavy_imports(command, write_rows, write_recipe) -> None:
    """The error of training, with FILE:LINE and the columns that are there, while torch and its
    like are not even imported."""
    data = write_rows([{"prompt": "One?", "reply": "One."}] * 3)
    recipe = write_recipe(dataset_name=str(data), **WRONG)
    done = run_alone([*command.split(), str(recipe)])
    assert done["code"] == 2 and done["heavy"] == []
    assert f"{data.name}: column_mapping: no row has a column 'question'" in done["err"]
    assert "prompt, reply" in done["err"]


def test_a_wrong_column_of_data_without_a_recipe(write_rows, base_folder) -> None:
    """So it is for `inspect` and `audit` of a file."""
    data = str(write_rows([{"prompt": "One?", "reply": "One."}]))
    options = [
        "--tokenizer",
        str(base_folder),
        "--column_mapping",
        json.dumps(WRONG["column_mapping"]),
    ]
    for command in ("inspect", "audit"):
        done = run_alone([command, data, *options])
        assert done["code"] == 2 and done["heavy"] == []
        assert "no row has a column 'question'" in done["err"]


def test_one_good_row_leaves_the_others_to_the_account_of_all_rows(
    write_rows, write_recipe, say
) -> None:
    """The early look stops at the first example: what is wrong further down is told with its total."""
    rows = [{"instruction": "One?", "output": "One."}, *[{"instruction": "", "output": "x"}] * 5]
    code, out = say("check", str(write_recipe(dataset_name=str(write_rows(rows)))))
    assert code == 2 and "5 of 6 rows cannot be trained" in out


def test_wrong_keys_are_still_listed_together(write_rows, write_recipe, say) -> None:
    """A recipe with wrong keys of ours and of TRL's is told of all of them, not of its rows."""
    data = write_rows([{"a": "One?"}])
    recipe = write_recipe(dataset_name=str(data), train_on="nonsense", learning_rat=1)
    code, out = say("check", str(recipe))
    assert code == 2 and "'learning_rate'" in out and "train_on" in out and ".jsonl" not in out


def run_alone(arguments: list[str]) -> dict[str, Any]:
    """Code and stderr of a command in a process of its own, and the heavy modules it imported."""
    script = (
        "import json, sys\nfrom sft_recipes import cli\n"
        f"code = cli.run({arguments!r})\n"
        f"print(json.dumps([code, sorted(set(sys.modules) & {set(HEAVY)})]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return {"code": code, "heavy": heavy, "err": done.stderr}


# -- names of runs ---------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Two runs beside one another, one elsewhere; the working directory is above them."""
    for run in ("runs/capitals", "runs/birds", "mine/run"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / RUN_STATE).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/capitls", "did you mean 'runs/capitals'?"),
        ("runs/capital", "did you mean 'runs/capitals'?"),
        ("rnus/birds", "did you mean 'runs/birds'?"),
        ("mine/rn", "did you mean 'mine/run'?"),
        ("runs/quite-another", "use one of runs/birds, runs/capitals."),
        ("./nowhere/at/all", "check the path"),
    ],
)
def test_a_slip_in_a_runs_name_shows_the_names_that_exist(typed, meant, runs) -> None:
    """Where the Hub might have a model of that name, too."""
    with pytest.raises(InputError, match="no such run folder") as refused:
        require_there(typed)
    assert meant in str(refused.value)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "runs/birds", "mine", "\0", "x" * 999])
def test_names_of_the_hub_and_folders_pass(name, runs) -> None:
    """A name is refused only where a run was meant; impossible names are left to who loads them."""
    require_there(name)


@pytest.mark.parametrize(
    "command",
    [
        ["export", "runs/capitls"],
        ["push", "runs/capitls", "--repo", "a/b"],
        ["chat", "runs/capitls"],
        ["evaluate", "runs/capitls"],
        ["evaluate", "runs/birds", "--base", "runs/capitls"],
        ["evaluate", "runs/birds", "--compare", "runs/capitls"],
        ["replay", "runs/capitls", "--prompts", "x.jsonl", "--rows", "1"],
    ],
)
def test_every_command_that_takes_a_run_says_so(command, runs, say) -> None:
    """Its exit code is that of wrong input."""
    code, out = say(*command)
    assert code == 2 and "did you mean 'runs/capitals'?" in out


def test_rows_are_named_in_one_place() -> None:
    """`FILE:LINE` comes from `messages.place`: nothing else of the package prints the number of a row."""
    for path in MODULES:
        if path.name != "messages.py":
            assert not re.search(r"\brow \{", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", ["runs/quickstart", "--version", "./mine"])
def test_what_is_no_name_of_the_hub_is_not_asked_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no runs yet, the place of shipped recipes' runs and a stray option are refused at once."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such run folder"):
        require_there(name)
    require_there("organization/model")
