"""The GitHub action and the pre-commit hook: their form, and what their scripts do, run as plain shell.

Actions cannot run here; their scripts can, with the variables that a runner would set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT
from tests.test_automation_files import faults, load

ACTION = ROOT / "action.yaml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"
TEXT = r".+"
STEP = {"name": TEXT, "if?": TEXT, "shell": r"bash", "env?": {"*": TEXT}, "run": TEXT}
FORM = {
    "name": TEXT,
    "description": TEXT,
    "inputs": {"*": {"description": TEXT, "default": r".*"}},
    "runs": {"using": r"composite", "steps": [STEP]},
}
HOOK = {
    "id": r"[a-z-]+",
    "name": TEXT,
    "entry": TEXT,
    "language": r"system",
    "files": TEXT,
    "require_serial": r"true",
}
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
# Stands in for this package where a test asks only what a script hands on.
ECHO = """#!{python}
import sys
names = sys.stdin.read().split("\\0") if "changed" in sys.argv else []
print([*sys.argv[1:], *filter(None, names)])
"""
PYTHON = """#!/bin/sh
exec "{python}" "$@"
"""


def steps() -> dict[str, dict[str, Any]]:
    """The steps of the action by name."""
    return {step["name"]: step for step in load(ACTION)["runs"]["steps"]}


def add_program(folder: Path, script: str) -> Path:
    """A folder beside `folder` with a program called python."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    python = programs / "python"
    python.write_text(script.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    return programs


def run_step(
    name: str, folder: Path, inputs: Mapping[str, str], before: str = "", echo: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the script of a step as a runner does: expressions fill its variables, bash stops at a failure."""
    programs = add_program(folder, ECHO if echo else PYTHON)
    step = steps()[name]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_ACTION_PATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder.parent / "summary.md"),
    }
    defaults = {key: entry["default"] for key, entry in load(ACTION)["inputs"].items()}
    filled = {**defaults, **inputs}
    for variable, value in step.get("env", {}).items():
        asked = EXPRESSION.fullmatch(value)[1].strip()  # type: ignore[index]
        environment[variable] = before
        if asked.startswith("inputs."):
            environment[variable] = filled[asked.removeprefix("inputs.")]
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def repository(write_recipe: Callable[..., Path]) -> Path:
    """A git repository with a recipe in its first commit and a changed row in its second."""
    folder = write_recipe().parent / "repository"
    folder.mkdir()
    for name in ("recipe.yaml", "train.jsonl"):
        (folder.parent / name).rename(folder / name)
    git(folder, "init", "-q")
    commit(folder)
    rows = (folder / "train.jsonl").read_text(encoding="utf-8")
    (folder / "train.jsonl").write_text(rows.replace("Say one", "Tell one"), encoding="utf-8")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """What git prints, as a user of its own."""
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *settings, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    """Commit all that is there."""
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a")


LOOK = "Check and audit what changed"
JUDGE = "Evaluate and judge"


def test_action_and_hook_have_their_form() -> None:
    """Required keys and no unknown ones; every input is used, and no input is used that there is not."""
    action = load(ACTION)
    assert not list(faults(action, FORM))
    assert not list(faults(load(HOOKS), [HOOK]))
    used = set(re.findall(r"inputs\.([\w-]+)", ACTION.read_text(encoding="utf-8")))
    assert used == action["inputs"].keys()


def test_no_expression_stands_in_a_script() -> None:
    """What others write (titles, names of branches and files) never becomes a part of a script's text: it
    comes as a variable, and every variable is quoted where it is used.
    """
    for step in steps().values():
        assert "${{" not in step["run"]
        for variable in step.get("env", {}):
            uses = re.findall(rf"(.?)\${variable}\b", step["run"])
            assert uses
            assert set(uses) <= {'"', "="}
    assert not re.search(r"=\$\w", "".join(step["run"] for step in steps().values()))


def test_the_files_that_changed_are_handed_on(repository: Path) -> None:
    """Those of the commits since the one before; all where that is not in the checkout, with a word; or those named."""
    before = git(repository, "rev-parse", "HEAD~1").strip()
    command = ["-m", "sft_recipes.verdicts", "changed"]
    changed = run_step(LOOK, repository, {}, before)
    assert changed.stdout.strip() == str([*command, "train.jsonl"])
    unknown = run_step(LOOK, repository, {}, "0" * 40)
    assert unknown.stdout.strip() == str([*command, "recipe.yaml", "train.jsonl"])
    assert "fetch-depth: 0" in unknown.stderr
    named = run_step(LOOK, repository, {"files": "a b.csv\nc.yaml\n"}, before)
    assert named.stdout.strip() == str([*command, "a b.csv", "c.yaml"])


def test_a_deleted_file_is_not_looked_at(repository: Path) -> None:
    """Of what changed only what is still there is handed on."""
    (repository / "train.jsonl").unlink()
    commit(repository)
    ended = run_step(LOOK, repository, {}, git(repository, "rev-parse", "HEAD~2").strip())
    assert "train.jsonl" not in ended.stdout


@pytest.mark.parametrize(
    "text", ["$(touch pwned)", "`touch pwned`", '"; touch pwned; "', "'; touch pwned #", "-x\\n"]
)
def test_no_text_of_others_is_run(repository: Path, text: str) -> None:
    """Names of files, inputs and the commit before are data, whatever they spell."""
    (repository / f"{text}.csv").write_text("prompt,completion\na,b\n", encoding="utf-8")
    commit(repository)
    before = git(repository, "rev-parse", "HEAD~1").strip()
    changed = run_step(LOOK, repository, {}, before)
    assert changed.stdout.strip().endswith(f"{f'{text}.csv'!r}]")
    run_step(LOOK, repository, {}, text)
    run_step(LOOK, repository, {"files": text}, before)
    inputs = dict.fromkeys(("run", "data", "gate", "base", "options"), text)
    judged = run_step(JUDGE, repository, inputs)
    assert judged.stdout.count(repr(text)[1:-1]) == len(inputs)
    assert not list(repository.rglob("pwned"))


@pytest.mark.slow
def test_the_scripts_check_audit_and_judge(repository: Path) -> None:
    """With the real commands a changed row leads to its recipe's check and audit, and a model to its gate's
    verdict; all of it stands in the job's summary, and the step fails where the gate does.
    """
    before = git(repository, "rev-parse", "HEAD~1").strip()
    looked = run_step(LOOK, repository, {}, before, echo=False)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    gate = "gate: [{metric: exact_match, at_least: 0.9, n: 40}]\n"
    (repository / "gate.yaml").write_text(gate, encoding="utf-8")
    model = re.search(r"model_name_or_path: (.*)", (repository / "recipe.yaml").read_text())
    assert model is not None
    inputs = {
        "run": model[1],
        "data": "train.jsonl",
        "gate": "gate.yaml",
        "options": "--max_new_tokens\n8\n",
    }
    judged = run_step(JUDGE, repository, inputs, echo=False)
    assert judged.returncode == 1, judged.stdout + judged.stderr
    summary = (repository.parent / "summary.md").read_text(encoding="utf-8")
    for heading in ("### `check ./recipe.yaml`: ok", "### `audit ./recipe.yaml`: ok"):
        assert heading in summary
    assert "Gate: **fail**, 40 answers." in summary
    assert "| exact match | 0.000 | at least 0.9 | 40 | fail |" in summary


@pytest.mark.slow
def test_pre_commit_runs_the_hook(repository: Path) -> None:
    """With pre-commit itself, where it is installed: a commit of rows that cannot be read is refused."""
    pytest.importorskip("pre_commit")
    (repository / "bad.jsonl").write_text('{"prompt": "a", "completion": 3}\n', encoding="utf-8")
    git(repository, "add", "-A")
    hooks = repository.parent / "hooks"
    hooks.mkdir()
    (hooks / HOOKS.name).write_text(HOOKS.read_text(encoding="utf-8"), encoding="utf-8")
    git(hooks, "init", "-q")
    commit(hooks)
    programs = add_program(repository, PYTHON)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PRE_COMMIT_HOME": str(repository.parent / "pre-commit"),
    }
    command = [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), "sft-recipes"]
    ended = subprocess.run(
        [*command, "--files", "bad.jsonl"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "audit ./bad.jsonl" in ended.stdout
