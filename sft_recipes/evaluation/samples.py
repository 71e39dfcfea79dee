"""The rows of `samples.jsonl`, read back."""

from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.text_files import read_json_lines

SAMPLES = "samples.jsonl"
_FIX = "evaluate again"


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation folder's `samples.jsonl`.

    Raises InputError where there is no such file, or where a line of it is no sample.
    """
    file = folder / SAMPLES
    if not file.is_file():
        what = f"there is no {SAMPLES}"
        raise InputError(Problem(str(folder), "", what, "name a folder below `evaluations/`"))
    rows = []
    for line in read_json_lines(file, _FIX):
        if not {"messages", "response"} <= line.content.keys():
            raise InputError(Problem(line.where, "", "is no sample of an evaluation", _FIX))
        rows.append(line.content)
    return rows
