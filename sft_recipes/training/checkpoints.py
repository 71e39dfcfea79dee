"""What makes a folder a checkpoint, which one a run resumes from, and whether it may.

A save is marked as unfinished before its first file and sealed after its last: the manifest holds size and hash of
every file. Only a sealed checkpoint whose files are what the manifest says is resumed from, counted or removed.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from sft_recipes import run_folder
from sft_recipes.errors import CheckFailed, InputError, Problem, TrainingFault
from sft_recipes.path_contents import by_content, path_contents, read_contents
from sft_recipes.recipe import Recipe, read_yaml

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-\d+")
_WEIGHTS = ("model_name_or_path", "adapter_name_or_path")
UNFINISHED = "unfinished"
INTERRUPTED = "its save was interrupted"
CORRUPT_SEAL = f"corrupt {MANIFEST}"
# Optimizer states of many gigabytes are hashed at each save. Measured for each GiB, from memory: SHA-256 0.78 s, XXH3
# 0.11 s. It finds damage, not forgery; what is published is hashed with SHA-256.
XXH3 = "xxh3_128"
# Keys that may differ between a run and its resumption: where it writes and what it prints, not what it trains.
_FREE_KEYS = frozenset({"output_dir", "report_to", "run_name", "disable_tqdm"})
# What a checkpoint's own states decide: another value would be ignored, or would not fit.
_HELD = re.compile(
    "learning_rate|weight_decay|adam_.*|optim.*|model_.*|adapter_.*|dtype|use_(peft|.*lora|bnb.*)|lora_.*|load_in.*"
)
# What must be as it was besides the recipe, and how messages call it.
_CONTRACT = {
    "data": "the data, its template or its tokenizer",
    "global_batch_size": "batch",
}
# Optimizer states as one process or DDP writes them, as FSDP does, and as DeepSpeed does.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "global_step*/*optim_states.pt")
_NEEDED = (
    ("trainer_state.json",),
    _OPTIMIZER,
    ("scheduler.pt",),
    ("rng_state*.pth",),
    ("*.safetensors",),
)


class Change(NamedTuple):
    """What a key was when the run was begun or the checkpoint written, and what it is now."""

    before: Any
    now: Any


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, last and at once: `facts`, size and hash of each file, and a hash over all that."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    content = {**facts, "files": _files(folder)}
    run_folder.write_json(folder / MANIFEST, {**content, "seal": _seal_of(content)})


def _seal_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, list[Any]]:
    """Size and hash of each file, on the disk and not only in memory: the seal must not outlive what it seals."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    with ThreadPoolExecutor() as pool:
        for path, entry in zip(paths, pool.map(_measure, paths), strict=True):
            files[str(path.relative_to(folder))] = entry
    return files


def _measure(path: Path, algorithm: str = XXH3) -> list[Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, xxhash.xxh3_128 if algorithm == XXH3 else algorithm)
    return [path.stat().st_size, f"{algorithm}:{digest.hexdigest()}"]


def _is_as_sealed(path: Path, expected: Sequence[Any]) -> bool:
    """Whether a file has the size and the hash of the manifest. Old seals hold a SHA-256 without its name."""
    size, sealed = expected
    if path.stat().st_size != size:
        return False
    algorithm, _, digest = str(sealed).rpartition(":")
    named = f"{algorithm or 'sha256'}:{digest}"
    return _measure(path, algorithm or "sha256")[1] == named


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a checkpoint says, without its seal; None where the seal does not hold it."""
    try:
        content = run_folder.read_json(folder / MANIFEST)
    except InputError:
        return None
    content.pop("schema_version")
    sealed = content.pop("seal", None)
    is_whole = sealed == _seal_of(content) and isinstance(content.get("files"), dict)
    return content if is_whole else None


def fault_of(folder: Path) -> str:
    """Why a checkpoint is not to be resumed from, or nothing."""
    if not (folder / MANIFEST).is_file():
        return INTERRUPTED if (folder / UNFINISHED).exists() else "it was never sealed"
    content = read_manifest(folder)
    if content is None:
        return CORRUPT_SEAL
    with ThreadPoolExecutor() as pool:
        faults = pool.map(lambda entry: _file_fault(folder, *entry), content["files"].items())
        for fault in faults:
            if fault:
                return fault
    missing = [names[0] for names in _NEEDED if not any(any(folder.glob(name)) for name in names)]
    return f"it was saved without {', '.join(missing)}" if missing else ""


def _file_fault(folder: Path, name: str, expected: Sequence[Any]) -> str:
    """What is wrong with one file of a checkpoint, or nothing."""
    path = folder / name
    # A manifest is a file like others: a name that leads out of the folder is none of its files.
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside or not path.is_file():
        return f"{name} is missing"
    return "" if _is_as_sealed(path, expected) else f"corrupt {name}"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The valid checkpoint with the highest step, or None for a fresh start. What is skipped is printed and stays.

    Raises TrainingFault if there are checkpoints but none is valid: a silent fresh start would lose the run. A first
    save that was interrupted had nothing to lose.
    """
    faults = {}
    for path in reversed(_checkpoints(output_dir)):
        fault = fault_of(path)
        if not fault:
            return path
        faults[path.name] = fault
        print(f"skipped {path.name}: {fault}", flush=True)
    if set(faults.values()) - {INTERRUPTED}:
        texts = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        what = f"no checkpoint in it is valid ({texts})"
        fix = "remove the checkpoint folders to start over, or use another output_dir"
        raise TrainingFault(str(Problem(str(output_dir), "", what, fix)))
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """All folders with a checkpoint's name, by step."""
    paths = []
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and path.is_dir():
            paths.append(path)
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def _sealed_checkpoints(output_dir: Path) -> list[Path]:
    """Those whose manifest is whole, by step; their files are not read."""
    return [path for path in _checkpoints(output_dir) if read_manifest(path) is not None]


def sealed_precision(checkpoint: Path | None) -> str | None:
    """The precision of the run that wrote it: bf16, fp16, no, or unknown if an earlier version wrote it."""
    if checkpoint is None:
        return None
    precision = run_folder.read_json(checkpoint / MANIFEST).get("precision")
    return precision if precision is not None else "unknown"


def begin_save(folder: Path, estimate: int) -> None:
    """Clear what an interrupted save left, check the space, and mark the folder as unfinished.

    The space is 1.2 times what the newest sealed checkpoint takes, or `estimate` bytes. Raises TrainingFault.
    """
    sealed = _sealed_checkpoints(folder.parent)
    if sealed:
        newest = read_manifest(sealed[-1]) or {}
        estimate = sum(size for size, _ in newest["files"].values())
    require_space(folder.parent, int(1.2 * estimate))
    if (folder / UNFINISHED).exists():
        shutil.rmtree(folder)
    elif folder.exists():  # it was skipped at the start, so it is not ours to delete
        folder.rename(folder.with_name(f"incomplete-{folder.name}-{time.time_ns()}"))
    marked = folder.with_name(f".{folder.name}")
    marked.mkdir(exist_ok=True)
    (marked / UNFINISHED).touch()
    marked.rename(folder)


def require_space(folder: Path, need: int) -> None:
    """Raise TrainingFault if the disk of `folder` has fewer than `need` bytes."""
    have = shutil.disk_usage(folder).free
    if have < need:
        text = f"no space left: need {need / 1e9:.3g} GB, have {have / 1e9:.3g} GB at {folder.resolve()}"
        raise TrainingFault(
            f"{text}. Earlier checkpoints are intact. Fix: make room and run it again."
        )


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest sealed checkpoints beyond `limit` (None: keep all). The newest and the best stay."""
    if not limit:
        return
    sealed = _sealed_checkpoints(output_dir)
    best_name = Path(best or "").name
    removable = [path for path in sealed[:-1] if path.name != best_name]
    for path in removable[: max(len(sealed) - limit, 0)]:
        (path / UNFINISHED).touch()
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def check_same_run(recipe: Recipe, allowed: Sequence[str] = ()) -> Mapping[str, Any]:
    """The state of the run already in `output_dir`, or nothing. Raises InputError if it was another recipe.

    Paths are compared by what stands there, where that is known: a run and its inputs may have been moved. Keys in
    `allowed` may differ; they are added to the state's `allowed_changes`, and such a run is not finished.
    """
    output_dir = recipe.output_dir
    if not run_folder.is_run_folder(output_dir):
        return {}
    state = run_folder.read_state(output_dir)
    if _was_refused(output_dir, state):
        return {}
    before, _ = read_yaml(output_dir / run_folder.RECIPE)
    new = allowed_changes(output_dir, _changed_keys(recipe, before), allowed)
    if not new:
        return state
    changes = {**state.get("allowed_changes", {}), **new}
    return {**state, "state": "changed", "allowed_changes": changes}


def _was_refused(output_dir: Path, state: Mapping[str, Any]) -> bool:
    """Whether the run ended before its first step: it holds nothing to protect, the mended recipe may have the
    folder.
    """
    if state.get("exit_code") not in (CheckFailed.exit_code, InputError.exit_code):
        return False
    has_steps = any(output_dir.glob("checkpoint-*")) or (output_dir / run_folder.LOG).exists()
    return not has_steps


def _changed_keys(recipe: Recipe, before: Mapping[str, Any]) -> dict[str, Change]:
    """The keys whose values differ from those of `before`, and a model whose files do."""
    now = recipe.saved_values()
    contents_before = read_contents(recipe.output_dir)
    contents_now = path_contents(recipe)
    meant_before = by_content(before, contents_before)
    meant_now = by_content(now, contents_now)
    changes = {}
    for key in sorted({*before, *now} - _FREE_KEYS):
        is_written_alike = before.get(key) == now.get(key)
        if not is_written_alike and meant_before.get(key) != meant_now.get(key):
            changes[key] = Change(before.get(key), now.get(key))
    # Rows have a fingerprint of their own in each checkpoint; what a run starts from has not.
    for key in _WEIGHTS:
        weights_before = contents_before.get(key)
        weights_now = contents_now.get(key)
        if weights_before and weights_now and weights_before != weights_now:
            changes.setdefault(key, Change(weights_before, weights_now))
    return changes


def check_contract(
    checkpoint: Path, facts: Mapping[str, Any], allowed: Sequence[str] = ()
) -> Mapping[str, Any]:
    """What differs from the run that wrote the checkpoint, if `allowed`. Raises InputError for anything else.

    `facts` as in the manifest: data, global_batch_size. Other versions of libraries are only announced; other numbers
    of processes are judged once the trainer stands (`process_count.py`).
    """
    sealed = run_folder.read_json(checkpoint / MANIFEST)
    if sealed.get("versions") != facts["versions"]:
        versions = f"{sealed.get('versions')} -> {facts['versions']}"
        print(f"resumed with other versions, so not bit for bit: {versions}")
    changes = {}
    for key in _CONTRACT:
        if sealed.get(key) != facts[key]:
            changes[key] = Change(sealed.get(key), facts[key])
    return allowed_changes(checkpoint, changes, allowed)


def allowed_changes(
    where: Path, changes: Mapping[str, Change], allowed: Sequence[str]
) -> dict[str, Any]:
    """The changes, if all are `allowed`. Raises InputError with the others."""
    refused = []
    for key in changes:
        if key not in allowed or _HELD.fullmatch(key):
            refused.append(key)
    if not refused:
        return dict(changes)
    in_contract = [key for key in refused if key in _CONTRACT]
    what = "holds a run of another recipe"
    if in_contract:
        what = ", ".join(f"{_CONTRACT[key]} changed since the checkpoint" for key in in_contract)
    texts = []
    for key in refused:
        texts.append(f"{key}: {changes[key].before!r} there, {changes[key].now!r} here")
    fix = "use --output_dir NEW for a new run, or restore the keys to resume"
    held = ", ".join(key for key in refused if _HELD.fullmatch(key))
    if held:
        fix += f" ({held}: the checkpoint's optimizer and model decide, a change would do nothing)"
    else:
        fix += f", or resume a run that cannot be repeated with --allow_changed {','.join(refused)}"
    raise InputError(Problem(str(where), refused[0], f"{what} ({'; '.join(texts)})", fix))
