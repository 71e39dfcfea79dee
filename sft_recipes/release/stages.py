"""The runs that trained a model's weights one after the other."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import run_folder
from sft_recipes.release.local_paths import public
from sft_recipes.report.number_texts import thousands
from sft_recipes.text_files import RESTORE, interpreting

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Stage(NamedTuple):
    """One of these runs in the words of the card; None is "not recorded"."""

    run: str
    data: str | None
    rows: str | None
    trained_tokens: str | None
    steps: str | None


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """What the weights in a folder were trained on by runs here, the first one first: for each run
    its data sets, rows, trained tokens and steps. Empty for a model that no run here made.
    """
    run = run_folder.run_of(folder)
    if run is None:
        return []
    path = run / run_folder.DATA
    data = run_folder.read_json(path) if path.is_file() else {}
    steps = run_folder.read_state(run).get("step")
    checkpoint = _CHECKPOINT.fullmatch(folder.name)
    if checkpoint:
        steps = int(checkpoint[1])
    with interpreting(path, RESTORE):
        rows = data.get("train") or {}
        stage = {
            "run": str(folder),
            "sources": [source["source"] for source in data.get("sources", ())],
            "rows": rows.get("rows"),
            "trained_tokens": rows.get("trained_tokens"),
            "steps": steps,
            "data": data.get("fingerprint"),
        }
        return [*data.get("earlier_stages", ()), stage]


def card_stages(run: Path, name: str) -> list[Stage]:
    """The stages of a run for its card, which calls it `name`; none for a run that is the only one."""
    with interpreting(run / run_folder.DATA, RESTORE):
        stages = [_in_words(stage) for stage in stages_of(run)]
    if len(stages) < 2:
        return []
    return [*stages[:-1], stages[-1]._replace(run=name)]


def _in_words(stage: Mapping[str, Any]) -> Stage:
    sources = ", ".join(public(source) for source in stage.get("sources", ()))
    counts = []
    for key in ("rows", "trained_tokens", "steps"):
        count = stage.get(key)
        counts.append(None if count is None else thousands(count))
    return Stage(public(stage["run"]), sources or None, *counts)
