"""What the commands say of changed recipes, data and runs, for automation: one summary, one exit code.

    python -m sft_recipes.verdicts changed [FILE ...]      `check` and `audit`; names on stdin end in NUL
    python -m sft_recipes.verdicts gate RUN --data D --gate G [--base B] [-- OPTIONS]      `evaluate --gate`

`action.yaml` and `.pre-commit-hooks.yaml` run these. The commands are those that a person types, with
`--json`; what they say is written as Markdown to stdout and, on GitHub, into the job's summary.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.reading.row_files import file_kind
from sft_recipes.errors import CheckFailed, InputError, Problem, SFTRecipesError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.markdown import code_block, inline

SUMMARY = "GITHUB_STEP_SUMMARY"
_YAML = (".yaml", ".yml")
_IS_RECIPE = re.compile(r"^model_name_or_path:", re.MULTILINE)
_EXIT_WORDS = {0: "ok", 1: "failed", 4: "inconclusive"}
_SHOWN_LINES = 20  # of what a refused command says
_SHOWN_FINDINGS = 10
_SHOWN_PLACES = 3


@dataclass(frozen=True)
class Verdict:
    """How a command ended: `content` is what `--json` gave, empty if it was refused; `said` is its stderr."""

    command: str
    exit_code: int
    content: Mapping[str, Any]
    said: str

    def as_markdown(self) -> str:
        """A heading and what a reader needs to act; no text of data is read as Markdown."""
        word = _EXIT_WORDS.get(self.exit_code, "refused")
        lines = [f"### {inline(self.command)}: {word}", ""]
        if not self.content:
            said = self.said.strip().splitlines()[-_SHOWN_LINES:]
            lines.append(code_block("\n".join(said)))
        elif "findings" in self.content:
            lines += _audit_lines(self.content)
        elif "gate" in self.content:
            lines += _gate_lines(self.content)
        else:
            lines += _check_lines(self.content)
        return "\n".join([*lines, ""])


def verdict(command: str, *arguments: str) -> Verdict:
    """Run `sft-recipes COMMAND ARGUMENTS --json` in a process of its own."""
    words = [command, *arguments]
    called = [sys.executable, "-m", "sft_recipes", *words, "--json"]
    ended = subprocess.run(called, capture_output=True, text=True, check=False)
    content = json.loads(ended.stdout) if ended.stdout.strip() else {}
    return Verdict(" ".join(words), ended.returncode, content, ended.stderr)


def require(command: str, *arguments: str) -> Verdict:
    """The verdict of a command that has to end with 0. Raises CheckFailed with what it says instead."""
    reached = verdict(command, *arguments)
    if reached.exit_code:
        raise CheckFailed(reached.as_markdown())
    return reached


def verdicts_on(files: Iterable[Path]) -> list[Verdict]:
    """`check` and `audit` of each recipe that changed or whose data did; other data is audited alone."""
    changed = list(files)
    missing = [file for file in changed if not file.is_file()]
    if missing:
        fix = "name files below the working directory"
        raise InputError([Problem(str(file), "", "there is no such file", fix) for file in missing])
    data = [file for file in changed if file_kind(file) is not None]
    recipes = list(filter(_is_recipe, changed))
    for recipe in _tracked_recipes():
        if recipe not in recipes and any(_trains_on(recipe, file) for file in data):
            recipes.append(recipe)
    reached = []
    for recipe in recipes:
        reached += [verdict("check", _argument(recipe)), verdict("audit", _argument(recipe))]
    for file in data:
        # JSON is the form of many things; without a recipe only what holds rows for sure is audited.
        is_alone = not any(_trains_on(recipe, file) for recipe in recipes)
        if is_alone and file_kind(file) != "json":
            reached.append(verdict("audit", _argument(file)))
    return reached


def _argument(path: Path) -> str:
    """The path in a form that no command takes for an option."""
    return str(path) if path.is_absolute() else f"./{path}"


def _is_recipe(path: Path) -> bool:
    if path.suffix not in _YAML:
        return False
    return _IS_RECIPE.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def _tracked_recipes() -> list[Path]:
    """The recipes that git knows below the working directory; none where there is no repository."""
    command = ["git", "ls-files", "-z", "--", "*.yaml", "*.yml"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and _is_recipe(path)]


def _trains_on(recipe: Path, file: Path) -> bool:
    """Whether a file is, or lies in, a data set that the recipe names."""
    try:
        loaded = load_recipe(recipe)
    except InputError:
        return True  # whatever it names: its own `check` says what is wrong
    sources = list(loaded.data.datasets)
    if loaded.evaluation.data is not None:
        sources.append(loaded.evaluation.data)
    return any(file.resolve().is_relative_to(Path(source.path).resolve()) for source in sources)


def _check_lines(content: Mapping[str, Any]) -> list[str]:
    plan = content["plan"]
    steps = f"{plan['steps']:,} steps" if isinstance(plan.get("steps"), int) else "steps not known"
    lines = [f"{plan['rows']:,} rows, {plan['trained tokens']:,} trained tokens, {steps}.", ""]
    for check in content["checks"]:
        if check["outcome"] not in ("ok", "not looked at"):
            lines.append(
                f"- {inline(check['name'])}: {check['outcome']}; {inline(check['detail'])}"
            )
    for note in content["notes"]:
        lines.append(f"- note: {inline(note)}")
    return lines


def _audit_lines(content: Mapping[str, Any]) -> list[str]:
    found = content["findings"]
    lines = [f"{content['rows_in']:,} rows, {len(found)} findings.", ""]
    if not found:
        return lines
    lines += ["| | Finding | Rows | Where |", "|---|---|---:|---|"]
    for finding in found[:_SHOWN_FINDINGS]:
        places = dict.fromkeys(row["where"] for row in finding["examples"])
        where = ", ".join(list(places)[:_SHOWN_PLACES])
        cells = (finding["severity"], finding["title"], finding["count"], where)
        lines.append(f"| {' | '.join(map(inline, cells))} |")
    if len(found) > _SHOWN_FINDINGS:
        lines += ["", f"{len(found) - _SHOWN_FINDINGS} more in the report."]
    return lines


def _gate_lines(content: Mapping[str, Any]) -> list[str]:
    gate = content["gate"]
    lines = [f"Gate: **{gate['verdict'].replace('_', ' ')}**, {content['rows']:,} answers.", ""]
    lines += ["| Bound | Value | Limit | Rows | Verdict |", "|---|---:|---:|---:|---|"]
    for bound in gate["lines"]:
        name = bound["name"].replace("_", " ")
        if bound["compared_with"]:
            name += ", tuned - base"
        if bound["group"]:
            name += f" ({bound['group']})"
        value = "no value" if bound["value"] is None else f"{bound['value']:.3f}"
        limit = f"{bound['side'].replace('_', ' ')} {bound['limit']}"
        cells = (name, value, limit, bound["n"], bound["verdict"].replace("_", " "))
        lines.append(f"| {' | '.join(map(inline, cells))} |")
    return lines


def publish(reached: Sequence[Verdict]) -> int:
    """Write the summary to stdout and to GitHub's; returns the first exit code that is not 0."""
    text = "\n".join(verdict.as_markdown() for verdict in reached)
    if not reached:
        text = "No recipe and no data changed.\n"
    print(text)
    summary = os.environ.get(SUMMARY)
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(f"## sft-recipes\n\n{text}\n")
    return next((verdict.exit_code for verdict in reached if verdict.exit_code), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The two commands of this module; an option of `gate` that is empty counts as not given.

    What stands behind `--` are further options of `evaluate`.
    """
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.verdicts")
    commands = parser.add_subparsers(dest="command", required=True)
    changed = commands.add_parser("changed", help="check and audit changed recipes and data")
    changed.add_argument("files", nargs="*", type=Path)
    gate = commands.add_parser("gate", help="evaluate a run and judge it by a gate")
    gate.add_argument("run")
    for name in ("data", "gate", "base"):
        gate.add_argument(f"--{name}", default="")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options: list[str] = []
    if "--" in words:
        end = words.index("--")
        options = words[end + 1 :]
        words = words[:end]
    try:
        return publish(_reached(parser.parse_args(words), options))
    except SFTRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _reached(given: argparse.Namespace, options: Sequence[str]) -> list[Verdict]:
    if given.command == "changed":
        files = given.files
        if not files:
            files = [Path(name) for name in sys.stdin.read().split("\0") if name]
        return verdicts_on(files)
    words = [given.run]  # may be a name on the Hub, too
    for name in ("data", "gate", "base"):
        if getattr(given, name):
            words += [f"--{name}", getattr(given, name)]
    return [verdict("evaluate", *words, *options)]


if __name__ == "__main__":
    sys.exit(main())
