"""Names of everything in a run folder, and how its JSON files are written and read. No torch here."""

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sft_recipes import text_files
from sft_recipes.errors import InputError, Problem
from sft_recipes.model_folder import is_checkpoint
from sft_recipes.plain_values import shown

SCHEMA_VERSION = 1

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
DATA = "data.json"
RUN_STATE = "run_state.json"
PREPARED = "prepared"
EVALUATIONS = "evaluations"
BENCHMARKS = "benchmarks"  # below the evaluations
BENCHMARK_FILE = "benchmark_*.json"  # in there, one for each
AUDIT = "audit"
LOG = "log.jsonl"
LOCK = "run.lock"
CONSUMPTION = "consumption.json"
CONTENTS = "contents.json"

# How alike two names are of which one is taken for a slip of the other: two letters of ten differ.
_ALIKE = 0.8
_SHOWN_RUNS = 3
_STATE_KINDS: Mapping[str, type] = {
    "state": str,
    "exit_code": int,
    "pid": int,
    "step": int,
    "allowed_changes": dict,
}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with its schema version, as a whole."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process: several ranks may say at the same moment how the run ended.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path, fix: str = text_files.RESTORE) -> dict[str, Any]:
    """Read one of the run folder's files. Raises InputError, with this fix, if it is damaged.

    An unknown schema version is refused, not guessed at.
    """
    content = text_files.read_json(path, fix)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        what = f"expected {SCHEMA_VERSION}, got {version!r}"
        older_fix = "use the version of sft-recipes that wrote it"
        raise InputError(Problem(str(path), "schema_version", what, older_fix))
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """Where the run in `folder` stands, from its `run_state.json`; empty if none was started.

    Raises InputError if the file is damaged.
    """
    path = folder / RUN_STATE
    if not path.is_file():
        return {}
    fix = "delete it: `train` then goes on from the newest checkpoint"
    state = read_json(path, fix)
    for key, kinds in _STATE_KINDS.items():
        if key in state and not isinstance(state[key], kinds):
            what = f"expected {kinds.__name__}, got {state[key]!r}"
            raise InputError(Problem(str(path), key, what, fix))
    return state


def is_run_folder(path: Path) -> bool:
    """Whether `path` is the output folder of a run of this project."""
    return (path / RECIPE).is_file()


def evaluations_of(model: Path) -> Path:
    """Where the evaluations of a model are written: into a run of ours, else below the working directory."""
    if is_run_folder(model):
        return model / EVALUATIONS
    name = model.name or model.resolve().name
    if is_checkpoint(model):  # every run has one of that name
        name = f"{model.resolve().parent.name}-{name}"
    return Path(EVALUATIONS) / name


def run_of(folder: Path) -> Path | None:
    """The run folder that a model lies in, which is the folder itself or, for an export or a
    checkpoint, the one above it; None for a model that no run here made.
    """
    for path in (folder, folder.parent):
        if (path / RUN_STATE).is_file():
            return path
    return None


def looks_local(name: str) -> bool:
    """Whether a name of a model is a path, and none of the Hub."""
    # Shipped recipes write below runs/; a name that begins with a dash is a misspelt option.
    return name.startswith(("/", ".", "~", "-", "runs/")) or name.count("/") > 1


def require_there(name: str, may_be_on_hub: bool = True) -> None:
    """Raise InputError, with the names of runs that are meant instead, for a folder that is not there.

    A name that may be one of the Hub is refused where it is close to a run's, or beside runs.
    """
    if os.path.exists(name):  # noqa: PTH110 - of a name that no file can have it says no
        return
    meant = _runs_near(Path(name))
    if may_be_on_hub and not meant and not looks_local(name):
        return
    fix = "check the path, or name the output_dir of the recipe"
    if len(meant) == 1:
        fix = f"did you mean {meant[0]!r}?"
    elif meant:
        fix = f"use one of {', '.join(meant)}"
    raise InputError(Problem(shown(name), "", "there is no such run folder", fix))


def _runs_near(path: Path) -> list[str]:
    """The run folders that are called much like this one, or those beside it."""
    folder = path.parent
    beside: list[str] = []
    runs: list[str] = []
    if os.path.isdir(folder):  # noqa: PTH112 - as above
        beside = sorted(str(file.parent) for file in folder.glob(f"*/{RUN_STATE}"))
        runs += beside
    if os.path.isdir(folder.parent):  # noqa: PTH112
        runs += sorted(str(file.parent) for file in folder.parent.glob(f"*/*/{RUN_STATE}"))
    close = get_close_matches(str(path), dict.fromkeys(runs), _SHOWN_RUNS, _ALIKE)
    if close or folder == Path():  # the working directory is beside every name of the Hub
        return close
    return beside[:_SHOWN_RUNS]
