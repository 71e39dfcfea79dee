"""The report of a finished evaluation is written again from its files, and shows what people voted."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.cli import run
from sft_recipes.errors import InputError
from sft_recipes.evaluation import review
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.evaluator import (
    Evaluation,
    compare,
    evaluation_from_rows,
    write_evaluation,
)
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.review import build
from sft_recipes.evaluation.written_report import add_votes, rewrite_report


def answered(word: str) -> Evaluation:
    rows = []
    for row in range(4):
        messages = [{"role": "user", "content": f"{row}?"}, {"role": "assistant", "content": "a"}]
        place = {"row": row, "source": "d.jsonl", "task_type": None, "prompt": f"<s>{row}?"}
        answer = Answer(f"{row}?", "a", word if row else "a", "eos")
        rows.append({**place, "messages": messages, **score_row(answer)})
    return evaluation_from_rows(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation folder as the command writes it, with a base below."""
    tuned, base = answered("a"), answered("b")
    assert compare(base, tuned)
    info = {"model": "me/tuned"}
    write_evaluation(tuned, tmp_path / "out", info=info, base=base)
    write_evaluation(base, tmp_path / "out" / "base", info={"model": "me/base"})
    return tmp_path / "out"


def test_the_report_is_the_one_that_was_written(folder: Path) -> None:
    """Byte for byte, for the evaluation and for its base, which has none."""
    for place in (folder, folder / "base"):
        before = (place / "report.html").read_bytes()
        (place / "report.html").unlink()
        assert rewrite_report(place).read_bytes() == before


def result_for(folder: Path) -> dict[str, Any]:
    """What `review score` makes of votes on this folder against its base."""
    share = {"value": 0.75, "ci_low": 0.5, "ci_high": 0.9, "n": 3}
    digest = hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    return {
        "systems": {
            "candidate": str(folder),
            "baseline": str(folder / "base"),
            "samples_sha256": [digest, "0"],
        },
        "answered_alike": 1,
        "raters": {"ann <b>": 3},
        "choices": {"a_little": 3},
        "tags": {"candidate": {}, "baseline": {"wrong": 1}},
        "items": {"page": 3, "won": 2, "lost": 1, "tied": 0},
        "win_rate": share,
        "p_value": 0.5,
        "agreement": share,
        "alpha": None,
        "self_consistency": share,
        "left_chosen": share,
        "left_p_value": 1.0,
        "length_terciles": [{**share, "ratios": [0.5, 1.5]}],
        "acceptable": {"candidate": share, "baseline": share},
        "comments": [{"source": "d.jsonl", "row": 1, "rater": "ann", "comment": "good <i>"}],
    }


def test_votes_are_a_section_of_the_candidates_report(folder: Path) -> None:
    """Win rate, sign test and comments, as text; written again, the report still has them."""
    report = add_votes(result_for(folder))
    assert report == folder / "report.html"
    page = report.read_text(encoding="utf-8")
    assert "<h2>What people preferred</h2>" in page
    for text in ("0.750 [0.50, 0.90] of the candidate", "2 items won, 1 lost", "good &lt;i&gt;"):
        assert text in page
    assert rewrite_report(folder).read_text(encoding="utf-8") == page


def test_votes_on_other_answers_are_not_shown(folder: Path) -> None:
    """An evaluation that was made again, and a folder that is gone, are left alone."""
    result = result_for(folder)
    before = (folder / "report.html").read_bytes()
    result["systems"]["samples_sha256"] = ["0", "0"]
    assert add_votes(result) is None
    assert add_votes({"systems": {"candidate": str(folder / "gone")}}) is None
    assert (folder / "report.html").read_bytes() == before


def test_votes_go_with_the_answers_that_were_judged(folder: Path) -> None:
    """Made again with other answers, the evaluation shows none of the old votes."""
    add_votes(result_for(folder))
    write_evaluation(answered("c"), folder, info={"model": "me/tuned"})
    assert "What people preferred" not in rewrite_report(folder).read_text(encoding="utf-8")


def test_the_digest_is_the_one_of_the_review(folder: Path) -> None:
    """What `review build` seals in its key is what is compared here."""
    built = build(folder, folder / "base", folder / "page.html")
    assert (
        built["systems"]["samples_sha256"][0] == result_for(folder)["systems"]["samples_sha256"][0]
    )


def test_a_damaged_folder_is_named(folder: Path) -> None:
    """The file and what to do, not a traceback."""
    (folder / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.json"):
        rewrite_report(folder)
    (folder / "metrics.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="evaluate again"):
        rewrite_report(folder)


def test_the_command_says_where_the_votes_are_shown(folder: Path, capsys, monkeypatch) -> None:
    """`review score` names the report, or says that none shows them; with `--json` only the result is printed."""
    monkeypatch.setattr(review, "score", lambda *_: result_for(folder))
    assert run(["review", "score", "page.key.json", "votes.json"]) == 0
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    assert run(["review", "score", "page.key.json", "votes.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"]["won"] == 2
    shutil.rmtree(folder)
    monkeypatch.setattr(review, "score", lambda *_: result_of_nobody(folder))
    assert run(["review", "score", "page.key.json", "votes.json"]) == 0
    assert "no report shows this" in capsys.readouterr().out


def result_of_nobody(folder: Path) -> dict[str, Any]:
    """A result on a folder that is gone."""
    folder.mkdir()
    (folder / "samples.jsonl").touch()
    result = result_for(folder)
    shutil.rmtree(folder)
    return result
