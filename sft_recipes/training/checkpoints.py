"""Which checkpoint a run resumes from, and whether it may."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.errors import CheckFailed, InputError, Problem, TrainingFault
from sft_recipes.recipe import Recipe, read_yaml

# Keys that may differ between a run and its resumption: where it writes and what it prints, not what it trains.
_FREE_KEYS = frozenset({"output_dir", "report_to", "run_name", "disable_tqdm"})
# Optimizer states as one process or DDP writes them, as FSDP does, and as DeepSpeed does.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "global_step*/*optim_states.pt")
_NEEDED = (("trainer_state.json",), _OPTIMIZER, ("scheduler.pt",), ("rng_state*.pth",))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None for a fresh start.

    Raises TrainingFault if there are checkpoints but none is complete: a silent fresh start would lose the run.
    """
    found = sorted(
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    )
    for _, path in reversed(found):
        missing = [names[0] for names in _NEEDED if not any(any(path.glob(name)) for name in names)]
        weights = any(path.glob("*.safetensors"))
        if weights and not missing:
            return path
        print(f"skipped {path.name}: incomplete ({', '.join(missing) or 'no weights'})")
    if found:
        fix = "remove the checkpoint folders to start over, or use another output_dir"
        raise TrainingFault(str(Problem(str(output_dir), "", "no checkpoint in it is complete", fix)))
    return None


def check_same_run(recipe: Recipe) -> Mapping[str, Any]:
    """The state of the run already in `output_dir`, or nothing. Raises InputError if it was another recipe."""
    output_dir = recipe.output_dir
    if not run_folder.is_run_folder(output_dir):
        return {}
    state = run_folder.read_state(output_dir)
    # A run that was refused before its first step holds nothing to protect: the mended recipe may have the folder.
    refused = state.get("exit_code") in (CheckFailed.exit_code, InputError.exit_code)
    if refused and not any(output_dir.glob("checkpoint-*")) and not (output_dir / run_folder.LOG).exists():
        return {}
    before, _ = read_yaml(output_dir / run_folder.RECIPE)
    now = recipe.saved_values()
    changed = sorted(key for key in {*before, *now} - _FREE_KEYS if before.get(key) != now.get(key))
    if changed:
        differences = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in changed)
        fix = "use --output_dir NEW for a new run, or restore the keys to resume"
        raise InputError(Problem(str(output_dir), changed[0], f"holds a run of another recipe ({differences})", fix))
    return state


def check_same_data(output_dir: Path, summary: Mapping[str, Any]) -> None:
    """Raise InputError if the checkpoints in `output_dir` were trained on other data than `summary` describes."""
    path = output_dir / run_folder.DATA
    if not path.is_file() or not any(output_dir.glob("checkpoint-*")):
        return
    if run_folder.read_json(path)["fingerprint"] != summary["fingerprint"]:
        what = "the data, its template or its tokenizer changed since the checkpoints were written"
        fix = "restore them to resume, or use --output_dir NEW for a new run"
        raise InputError(Problem(str(output_dir), "data", what, fix))
