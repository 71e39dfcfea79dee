"""The house stays as drawn: imports point downward, names say something, importing stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sft_recipes

PACKAGE = Path(sft_recipes.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)

# From the top down. Rooms of one layer know nothing of one another, except inside the foundation, where modules build
# on each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("cli_answers", "cli_benchmark", "cli_doctor", "cli_init", "cli_review", "verdicts"),
    ("cli_examples", "cli_options", "cli_output"),
    ("chapter",),
    ("training",),
    ("audit", "doctor", "evaluation", "foreign", "release"),
    ("models", "report"),
    ("data", "devices"),
    ("upstream",),
)
FOUNDATION = (
    "recipe",
    "recipe_keys",
    "recipe_checks",
    "recipe_copies",
    "recipe_mixtures",
    "recipe_rewrite",
    "messages",
    "run_folder",
    "model_folder",
    "path_contents",
    "text_files",
    "stop_request",
    "crash",
    "errors",
    "number_range",
    "plain_values",
    "yaml_reader",
    "statistics",
    "shingles",
    "similarity",
    "overlap",
    "response_patterns",
)
LEVEL = {name: len(LAYERS) - depth for depth, names in enumerate(LAYERS) for name in names}
LEVEL |= dict.fromkeys(FOUNDATION, 0)
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def room(parts: tuple[str, ...]) -> str:
    """The room of a module below the package: its folder, or its own name at the top."""
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST, module: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import anywhere in a module, lazy ones included; relative ones resolved."""
    package = ("sft_recipes", *module.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def test_every_module_has_its_room() -> None:
    """No module stands outside the layers."""
    rooms = {room(path.relative_to(PACKAGE).parts) for path in MODULES}
    assert rooms - {"__init__"} <= LEVEL.keys()


def upward_imports(path: Path, text: str) -> list[str]:
    """Imports of a module from a higher layer or from another room of its own layer, as messages."""
    own = room(path.relative_to(PACKAGE).parts)
    wrong = []
    for line, name in imports(ast.parse(text), path):
        if not name.startswith("sft_recipes.") or name == "sft_recipes.__version__":
            continue
        other = name.split(".")[1]
        # A name that is no room is one that `__init__` loads from anywhere: only users of the package may.
        level = LEVEL.get(other, len(LAYERS) + 1)
        if other != own and level >= LEVEL[own] and not level == LEVEL[own] == 0:
            wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    return wrong


def test_imports_point_downward() -> None:
    """No module imports from a higher layer or from another room of its own layer, inside functions either."""
    modules = [path for path in MODULES if path != PACKAGE / "__init__.py"]
    wrong = [
        message
        for path in modules
        for message in upward_imports(path, path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/prepare.py", "from sft_recipes.training.train import train"),
        ("data/prepare.py", "def f():\n    from sft_recipes import models"),
        ("data/prepare.py", "from ..report import page"),
        ("models.py", "from sft_recipes.report import page"),
        ("evaluation/gate.py", "import sft_recipes.audit.checks"),
        ("recipe.py", "from sft_recipes.data import labels"),
        ("training/train.py", "from sft_recipes import train"),
    ],
)
def test_upward_imports_are_seen(module: str, line: str) -> None:
    """The check itself sees absolute, relative, lazy and re-exported imports that point upward or sideways."""
    assert upward_imports(PACKAGE / module, line)


def test_the_foundation_has_no_circles() -> None:
    """Modules of the foundation may build on one another, never in a circle."""
    needs: dict[str, set[str]] = {}
    for name in FOUNDATION:
        path = PACKAGE / f"{name}.py"
        used = set()
        for _, module in imports(ast.parse(path.read_text(encoding="utf-8")), path):
            if module.startswith("sft_recipes."):
                used.add(module.split(".")[1])
        needs[name] = used & set(FOUNDATION)
    done: set[str] = set()
    while needs:
        ready = {name for name, others in needs.items() if others <= done}
        assert ready, f"circle among {sorted(needs)}"
        done |= ready
        needs = {name: others for name, others in needs.items() if name not in ready}


def test_names_say_something() -> None:
    """No module is called utils, common, helpers or misc, and none shadows a library it uses."""
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert not names & {
        "utils",
        "util",
        "common",
        "helpers",
        "helper",
        "misc",
        "datasets",
        "evaluate",
        "logging",
    }


@pytest.mark.parametrize("name", FOUNDATION)
def test_foundation_imports_nothing_heavy(name: str) -> None:
    """No module of the foundation imports torch and its family outside of functions."""
    path = PACKAGE / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [ast.Pass()]
    found = {one.split(".")[0] for _, one in imports(tree, path)}
    assert not found & set(HEAVY)


def test_importing_and_help_stay_light() -> None:
    """`import sft_recipes`, its recipe reader and `--help` of the command load neither torch nor transformers."""
    code = (
        "import sys, runpy\n"
        "import sft_recipes, sft_recipes.recipe, sft_recipes.recipe_keys, sft_recipes.recipe_checks\n"
        "sys.argv = ['sft-recipes', '--help']\n"
        "try:\n    runpy.run_module('sft_recipes', run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout and "evaluate" in result.stdout
