"""The report of an evaluation that is finished, written again from the files of its folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.evaluation.evaluator import METRICS_FILE, REPORT, read_evaluation
from sft_recipes.evaluation.samples import SAMPLES
from sft_recipes.report.evaluation_report import render_evaluation_report
from sft_recipes.text_files import interpreting

REVIEW = "review.json"
_EVALUATE_AGAIN = "evaluate again"


def rewrite_report(folder: Path) -> Path:
    """Write `report.html` from metrics, samples, those of the base, and votes of people.

    Raises InputError if one of these files is damaged.
    """
    content = run_folder.read_json(folder / METRICS_FILE, _EVALUATE_AGAIN)
    review = _votes_of(folder)
    if review is not None:
        content["review"] = review
    tuned = read_evaluation(folder)
    with interpreting(folder / METRICS_FILE, _EVALUATE_AGAIN):
        base = _base_folder(folder, content["info"])
    if base is None or "differences" not in content:
        page = render_evaluation_report(content, tuned.rows)
    else:
        compared = read_evaluation(base)
        page = render_evaluation_report(content, tuned.rows, compared.as_json(), compared.rows)
    run_folder.write_text(folder / REPORT, page + "\n")
    return folder / REPORT


def _base_folder(folder: Path, info: Mapping[str, Any]) -> Path | None:
    """Where the base's answers are: below, or in the earlier evaluation that was the base."""
    for place in (folder / "base", Path(str(info.get("base")))):
        if (place / SAMPLES).is_file():
            return place
    return None


def _votes_of(folder: Path) -> dict[str, Any] | None:
    """What people voted on these very answers: an evaluation may have been made again since."""
    if not (folder / REVIEW).is_file():
        return None
    result = run_folder.read_json(folder / REVIEW)
    return result if _is_about(result, folder) else None


def _is_about(result: Mapping[str, Any], folder: Path) -> bool:
    """Whether a result of votes is about the answers in a folder."""
    samples = folder / SAMPLES
    if not samples.is_file() or not (folder / METRICS_FILE).is_file():
        return False
    judged = result["systems"]["samples_sha256"][0]
    return bool(hashlib.sha256(samples.read_bytes()).hexdigest() == judged)


def add_votes(result: Mapping[str, Any]) -> Path | None:
    """Put the result of `review score` into the candidate's report.

    None where its folder is elsewhere now, or holds other answers than those that were judged.
    """
    folder = Path(result["systems"]["candidate"])
    if not _is_about(result, folder):
        return None
    run_folder.write_json(folder / REVIEW, result)
    return rewrite_report(folder)
