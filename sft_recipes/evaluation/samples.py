"""The rows of `samples.jsonl`, read back."""

import json
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem

SAMPLES = "samples.jsonl"


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation folder's `samples.jsonl`.

    Raises InputError where there is no such file, or where a line of it is no sample.
    """
    file = folder / SAMPLES
    if not file.is_file():
        what = f"there is no {SAMPLES}"
        raise InputError(Problem(str(folder), "", what, "name a folder below `evaluations/`"))
    rows = []
    # Not `splitlines`: answers may hold other line ends, which JSON leaves as they are.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            rows.append(_sample(line, f"{file}:{number}"))
    return rows


def _sample(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"messages", "response"} <= row.keys():
        what = "is no sample of an evaluation"
        raise InputError(Problem(where, "", what, "evaluate again"))
    return row
