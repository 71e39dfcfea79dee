"""The answers that a model card shows: of one evaluation, wrong ones first, masked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.release.local_paths import LOCAL_PATH
from sft_recipes.response_patterns import mask
from sft_recipes.text_files import interpreting, read_json_lines

SAMPLES = 4
EVALUATE_AGAIN = "evaluate it again, or delete its folder"


def read_samples(evaluation: Path) -> list[dict[str, str]]:
    """Some answers of an evaluation, half of them wrong where there are wrong ones, masked."""
    path = evaluation / "samples.jsonl"
    if not path.is_file():
        return []
    wrong: list[dict[str, Any]] = []
    right: list[dict[str, Any]] = []
    for line in read_json_lines(path, EVALUATE_AGAIN):
        if line.content.get("exact_match") is True:
            right.append(line.content)
        else:
            wrong.append(line.content)
    wrong_shown = max(SAMPLES // 2, SAMPLES - len(right))
    chosen = [*wrong[:wrong_shown], *right][:SAMPLES]
    samples = []
    with interpreting(path, EVALUATE_AGAIN):
        for row in chosen:
            sample = {
                "prompt": _masked(_asked(row)),
                "reference": _masked(row["reference"]),
                "response": _masked(row["response"]),
            }
            samples.append(sample)
    return samples


def _asked(row: Mapping[str, Any]) -> str:
    """What people read as the prompt: one message as it is, several behind their roles."""
    asked = row.get("messages", ())[:-1]
    if not asked:
        return str(row["prompt"])
    if len(asked) == 1:
        return str(asked[0].get("content"))
    turns = []
    for message in asked:
        turns.append(f"{message['role']}: {message.get('content') or ''}")
    return "\n\n".join(turns)


def _masked(text: str | None) -> str:
    """Text of a sample without secrets, personal data and paths, as far as patterns know them."""
    return LOCAL_PATH.sub("[local path]", mask(text or ""))
