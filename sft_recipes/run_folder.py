"""Names of everything in a run folder, and how its JSON files are written. No torch here."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem

SCHEMA_VERSION = 1

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
DATA = "data.json"
RUN_STATE = "run_state.json"
PREPARED = "prepared"
EVALUATIONS = "evaluations"
AUDIT = "audit"
LOG = "log.jsonl"
LOCK = "run.lock"
CONSUMPTION = "consumption.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with its schema version, as a whole."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the run folder's files; an unknown schema version is refused, not guessed at."""
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        what = f"expected {SCHEMA_VERSION}, got {version!r}"
        fix = "use the version of sft-recipes that wrote it"
        raise InputError(Problem(str(path), "schema_version", what, fix))
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """Where the run in `folder` stands, from its `run_state.json`; empty if none was started."""
    path = folder / RUN_STATE
    return read_json(path) if path.is_file() else {}


def is_run_folder(path: Path) -> bool:
    """Whether `path` is the output folder of a run of this project."""
    return (path / RECIPE).is_file()
