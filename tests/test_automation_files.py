"""Workflows, hooks and the pull request template have the form that GitHub and pre-commit read.

They cannot run here, so what can be known without them is held: their keys and types, and that
every command they run exists in this repository.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import ROOT, make_targets

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*"))
HOOKS = ROOT / ".pre-commit-config.yaml"

# A schema is a mapping of keys (a `?` at the end: may be left out; `*`: every other key), a list
# with the schema of its entries, a pattern that a text matches whole, or several schemas.
PINNED = r"[\w.-]+/[\w.-]+@v\d+\.\d+\.\d+"
TEXT = r".+"
USE = {"uses": PINNED, "name?": TEXT, "with?": {"*": TEXT}}
RUN = {"run": TEXT, "name?": TEXT}
JOB = {
    "runs-on": r"ubuntu-\d\d\.\d\d",
    "timeout-minutes": r"\d+",
    "strategy?": {"fail-fast?": r"true|false", "matrix": {"*": [TEXT]}},
    "steps": [(USE, RUN)],
}
WORKFLOW = {
    "name": TEXT,
    "on": {
        "push?": {"branches": [TEXT]},
        "pull_request?": r"",
        "schedule?": [{"cron": r"(\S+ ){4}\S+"}],
        "workflow_dispatch?": r"",
    },
    "permissions": {"contents": r"read"},
    "jobs": {"*": JOB},
}
HOOK = {
    "id": r"[a-z-]+",
    "name": TEXT,
    "entry": TEXT,
    "language": r"system",
    "types": [TEXT],
    "pass_filenames?": r"true|false",
}
PRE_COMMIT = {"repos": [{"repo": r"local", "hooks": [HOOK]}]}


def load(path: Path) -> Any:
    """A YAML file with every scalar as the text that stands there: `on` stays a key, 3.10 is no number."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def faults(value: Any, schema: Any, place: str = "") -> Iterator[str]:
    """Where a value departs from its schema, in words."""
    if isinstance(schema, tuple):
        if all(list(faults(value, choice)) for choice in schema):
            yield f"{place}: fits none of {len(schema)} forms"
    elif isinstance(schema, dict):
        yield from _faults_of_mapping(value, schema, place)
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            yield f"{place}: no list, or an empty one"
            return
        for number, entry in enumerate(value):
            yield from faults(entry, schema[0], f"{place}[{number}]")
    elif not isinstance(value, str) or not re.fullmatch(schema, value, re.S):
        yield f"{place}: {value!r} is not {schema}"


def _faults_of_mapping(value: Any, schema: dict[str, Any], place: str) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield f"{place}: no mapping, or an empty one"
        return
    forms = {key.removesuffix("?"): form for key, form in schema.items()}
    for key in schema:
        if key != "*" and not key.endswith("?") and key not in value:
            yield f"{place}.{key}: missing"
    for key, entry in value.items():
        if key in forms or "*" in forms:
            yield from faults(entry, forms.get(key, forms.get("*")), f"{place}.{key}")
        else:
            yield f"{place}.{key}: unknown"


def is_known(command: str) -> bool:
    """Whether a command line is a make target, an executable file of the repository, or a program of `.venv`."""
    words = shlex.split(command)
    if words[0] == "make":
        return set(words[1:]) <= make_targets()
    if words[0].startswith(".venv/bin/"):
        return Path(words[0]).name in ("python", "ruff", "mypy")
    return os.access(ROOT / words[0], os.X_OK)


def run_lines(workflow: dict[str, Any]) -> list[str]:
    """Every command line of a workflow, in order."""
    lines: list[str] = []
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            lines += step.get("run", "").splitlines()
    return lines


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_their_form(path: Path) -> None:
    """Required keys, no unknown ones, read-only permissions, actions pinned by version."""
    assert path.suffix == ".yaml"
    assert not list(faults(load(path), WORKFLOW))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path: Path) -> None:
    """Every command is a make target or a file; what lies in .venv comes after `make install`."""
    lines = run_lines(load(path))
    assert lines
    for number, line in enumerate(lines):
        assert is_known(line), line
        if line.startswith(".venv/"):
            assert "make install" in lines[:number]


def test_workflows_are_the_two_that_are_documented() -> None:
    """One that runs `.ci/run` on the oldest Python allowed and a later one, one against the latest TRL."""
    loaded = {path.name: load(path) for path in WORKFLOWS}
    assert set(loaded) == {"ci.yaml", "weekly.yaml"}
    assert run_lines(loaded["ci.yaml"]) == [".ci/run"]
    versions = loaded["ci.yaml"]["jobs"]["checks"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12"]
    weekly = run_lines(loaded["weekly.yaml"])
    assert any(re.search(r"--upgrade .*\btrl\b.*\btransformers\b", line) for line in weekly)
    assert weekly[-1] == "make test"


def test_hooks_are_the_linters_of_make_check() -> None:
    """pre-commit runs the same programs as `make check`, from .venv, and nothing from elsewhere."""
    content = load(HOOKS)
    assert not list(faults(content, PRE_COMMIT))
    hooks = content["repos"][0]["hooks"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    assert entries == ["ruff check", "ruff format --check", "mypy"]
    assert all(is_known(hook["entry"]) for hook in hooks)


def test_the_pull_request_template_has_three_lines() -> None:
    """Each is a question; every make target and module that it names exists."""
    text = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3
    named = re.findall(r"`make ([a-z-]+)`", text)
    assert named and set(named) <= make_targets()
    for module in re.findall(r"`python -m ([\w.]+)`", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"permissions": {"contents": "write"}}, ".permissions.contents"),
        ({"permissions": None}, ".permissions"),
        ({"runs": "on"}, ".runs: unknown"),
        ({"jobs": {"a": {**JOB, "steps": [{"uses": "actions/checkout@main"}]}}}, "fits none of 2"),
        ({"jobs": {"a": {"steps": [{"run": "make test"}]}}}, ".jobs.a.runs-on: missing"),
    ],
)
def test_faults_are_seen(change: dict[str, Any], fault: str) -> None:
    """The check itself finds a permission, a key, a version and a command that should not be there."""
    changed = {**load(WORKFLOWS[0]), **change}
    assert any(fault in found for found in faults(changed, WORKFLOW))
    assert not is_known("make nothing")
    assert not is_known(".ci/nothing")
