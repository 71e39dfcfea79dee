"""Automation hears what the commands say: which files are looked at, in what words, with which exit code."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import verdicts
from sft_recipes.errors import CheckFailed
from sft_recipes.verdicts import Verdict, main, require, verdicts_on
from tests.documents import ROOT

HOSTILE = (
    "<img src=x onerror=alert(1)> | [a](javascript:b) `code` **bold** ![c](https://d.e/f) $(id)"
)
BASE = ROOT / "recipes/quickstart/base"
BOUND = {
    "name": "exact_match",
    "compared_with": "base",
    "group": HOSTILE,
    "side": "at_least",
    "limit": -0.05,
    "value": None,
    "n": 7,
    "verdict": "insufficient_n",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that would run; each ends with 0 and says nothing."""
    commands: list[str] = []

    def answer(command: str, *arguments: str) -> Verdict:
        commands.append(" ".join([command, *arguments]))
        return Verdict(commands[-1], 0, {}, "")

    monkeypatch.setattr(verdicts, "verdict", answer)
    return commands


@pytest.fixture
def repository(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a recipe, its rows, rows of nobody, and files that are neither; the working directory."""
    folder = write_recipe().parent
    (folder / "others.csv").write_text("prompt,completion\na,b\n", encoding="utf-8")
    (folder / "package.json").write_text("{}", encoding="utf-8")
    (folder / "gate.yaml").write_text("gate: []\n", encoding="utf-8")
    (folder / "notes.md").write_text("model_name_or_path: none\n", encoding="utf-8")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "commands"),
    [
        (["recipe.yaml"], ["check ./recipe.yaml", "audit ./recipe.yaml"]),
        (["train.jsonl"], ["check ./recipe.yaml", "audit ./recipe.yaml"]),
        (["recipe.yaml", "train.jsonl"], ["check ./recipe.yaml", "audit ./recipe.yaml"]),
        (["others.csv"], ["audit ./others.csv"]),
        (["package.json", "gate.yaml", "notes.md"], []),
    ],
)
def test_what_changed_is_looked_at_once(
    repository: Path, asked: list[str], changed: Sequence[str], commands: Sequence[str]
) -> None:
    """A recipe is looked at when it or its rows change; rows of no recipe are audited; other files are left alone."""
    verdicts_on(map(Path, changed))
    assert asked == commands


def test_a_recipe_that_cannot_be_read_is_not_passed_over(
    repository: Path, asked: list[str]
) -> None:
    """Where changed rows might be those of a recipe with a fault, the recipe's own check says what it is."""
    (repository / "recipe.yaml").write_text("model_name_or_path: a\nno_key: 1\n", encoding="utf-8")
    verdicts_on([Path("others.csv")])
    assert asked[0] == "check ./recipe.yaml"


def test_names_come_by_stdin_and_none_is_an_option(
    repository: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names end in NUL, so they may hold blanks and newlines, and begin like an option."""
    for name in ("--clean.csv", "two words.csv", "two\nlines.csv"):
        Path(name).write_text("prompt,completion\na,b\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("--clean.csv\0two words.csv\0two\nlines.csv\0"))
    assert main(["changed"]) == 0
    assert asked == ["audit ./--clean.csv", "audit ./two words.csv", "audit ./two\nlines.csv"]


def test_a_file_that_is_not_there_is_refused(
    repository: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped name does not pass as "nothing changed"."""
    assert main(["changed", "recipes.yaml", "rows.csv"]) == 2
    said = capsys.readouterr().err
    assert "recipes.yaml: there is no such file. Fix: " in said
    assert "rows.csv: there is no such file. Fix: " in said
    assert asked == []


def test_empty_options_of_a_gate_are_not_given(asked: list[str]) -> None:
    """The inputs of an action that nobody filled in are empty texts."""
    assert main(["gate", "runs/mine", "--data=", "--gate=recipe", "--base="]) == 0
    assert main(["gate", "runs/mine", "--base=b", "--", "--max_rows", "8"]) == 0
    assert asked == ["evaluate runs/mine --gate recipe", "evaluate runs/mine --base b --max_rows 8"]


def verdict_with(**content: Any) -> Verdict:
    """A verdict of the kind that has these keys."""
    return Verdict(f"audit {HOSTILE}", 1, content, "")


FINDING = {
    "severity": "error",
    "title": HOSTILE,
    "count": 3,
    "examples": [{"where": f"{HOSTILE}:1"}, {"where": "b:2"}],
}
PLAN = {"rows": 3, "trained tokens": 4, "steps": 5}
CHECK = {"name": "training ids are serving ids", "outcome": "fail", "detail": HOSTILE}


@pytest.mark.parametrize(
    "verdict",
    [
        verdict_with(rows_in=9, findings=[FINDING]),
        verdict_with(rows=9, gate={"verdict": "insufficient_n", "lines": [BOUND]}),
        verdict_with(plan=PLAN, checks=[CHECK], notes=[HOSTILE]),
        Verdict("check r.yaml", 2, {}, f"r.yaml:1: {HOSTILE}\n</code>\n```\n{HOSTILE}"),
    ],
    ids=["audit", "gate", "check", "refused"],
)
def test_a_summary_holds_text_as_text(verdict: Verdict) -> None:
    """No element, link, picture or emphasis comes from data; tables keep their columns; words, not names."""
    text = verdict.as_markdown()
    outside_code = re.sub(r"(`+)(?!`).*?\1", "", re.sub(r"(?m)^    .*$", "", text))
    assert "<img" not in outside_code
    assert "](" not in outside_code
    rows = [line for line in outside_code.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) <= 1
    assert "insufficient_n" not in text
    assert "None" not in text


def test_the_summary_is_published_and_the_first_failure_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stdout and GitHub's file get the same text, appended; the exit code is the first that is not 0."""
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv(verdicts.SUMMARY, str(summary))
    reached = [
        Verdict("check a", 0, {}, ""),
        Verdict("audit a", 1, {}, "why"),
        Verdict("x", 4, {}, ""),
    ]
    assert verdicts.publish(reached) == 1
    printed = capsys.readouterr().out
    written = summary.read_text(encoding="utf-8")
    assert written.startswith("before\n## sft-recipes\n")
    assert printed.strip() in written
    for heading in ("### check a: ok", "### audit a: failed", "### x: inconclusive"):
        assert heading in printed


@pytest.mark.slow
def test_commands_say_what_they_say_to_people(repository: Path) -> None:
    """A sound recipe passes, rows with an error fail the audit, and a wrong key is refused with its fix."""
    assert require("check", "recipe.yaml").content["plan"]["rows"] == 40
    row = {"prompt": "Say it.", "completion": ""}
    with Path("train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\nno JSON\n")
    with pytest.raises(CheckFailed, match="rows that cannot be read"):
        require("audit", "train.jsonl", "--tokenizer", str(BASE))
    refused = verdicts.verdict("check", "recipe.yaml", "--no_key", "1")
    assert refused.exit_code == 2
    assert "Fix: " in refused.as_markdown()
