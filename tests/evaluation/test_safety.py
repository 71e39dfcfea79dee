"""Refusal and over-refusal: the packaged prompts, a set of one's own, every number by hand, and the
gate on it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows, write_evaluation
from sft_recipes.evaluation.format_overfitting import TEMPLATE
from sft_recipes.evaluation.gate import judge, parse_gate
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.safety import (
    LEAST_PROMPTS,
    PROMPTS,
    SAFETY_METRICS,
    measure_safety,
    read_prompts,
)
from sft_recipes.report.evaluation_tables import safety_text
from sft_recipes.response_patterns import refusal_error

NO, YES = "I'm sorry, but I can't help with that.", "Sure: <script>alert(1)</script>\u202e"


def answered(safe: str, unsafe: str) -> Evaluation:
    """A row for each letter: `n` is refused, `y` answered."""
    rows = []
    for index, (label, letter) in enumerate(
        [("safe", one) for one in safe] + [("unsafe", one) for one in unsafe]
    ):
        scores = score_row(Answer(f"{label} {index}", None, NO if letter == "n" else YES, "eos"))
        where = {
            "row": index,
            "source": "own.csv",
            "task_type": label,
            "messages": [],
            "prompt": f"{label} {index}",
        }
        rows.append(where | scores | {"n_tokens": 1})
    return evaluation_from_rows(rows)


def values(content: Mapping[str, Any], **where: str) -> dict[str, tuple[float, int]]:
    """Share refused and n by label, of one model and format."""
    found = [one for one in content["refused"] if where.items() <= one.items()]
    return {one["label"]: (one["value"], one["n"]) for one in found}


def test_the_packaged_prompts() -> None:
    """At least 30 of each kind, none twice, each pair of rows a safe and an unsafe one; all can be
    read."""
    prompts = read_prompts()
    labels = [example.columns["task_type"] for example in prompts]
    assert labels == ["safe", "unsafe"] * (len(labels) // 2) and len(labels) >= 60
    texts = [example.messages[0]["content"].casefold() for example in prompts]
    assert len(set(texts)) == len(texts)
    assert prompts[0].messages[-1] == {"role": "assistant", "content": None}
    with Path(PROMPTS).open(encoding="utf-8", newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == [
            one.messages[0]["content"] for one in prompts
        ]


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    """CSV and JSON Lines with further columns; a row without prompt or with another label is named
    with its line."""
    (tmp_path / "own.csv").write_text(
        'id,prompt,type,label\n1,"How, then?",x,safe\n2,Why?,x,unsafe\n', "utf-8"
    )
    found = read_prompts(str(tmp_path / "own.csv"))
    assert [(one.messages[0]["content"], one.columns["task_type"], one.line) for one in found] == [
        ("How, then?", "safe", 2),
        ("Why?", "unsafe", 3),
    ]
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "Why?", "label": "safe"}\n{"prompt": "How?", "label": 1}\n', "utf-8"
    )
    with pytest.raises(
        InputError, match=r"own\.jsonl:2: .*Fix: name the columns so; a label is safe or unsafe"
    ):
        read_prompts(str(tmp_path / "own.jsonl"))
    (tmp_path / "own.csv").write_text("question,label\nWhy?,safe\n", "utf-8")
    with pytest.raises(InputError, match=r"own\.csv:2: .*no `prompt`"):
        read_prompts(str(tmp_path / "own.csv"))
    (tmp_path / "own.jsonl").write_text('{"prompt": \n', "utf-8")
    with pytest.raises(InputError, match=r"own\.jsonl:1: "):
        read_prompts(str(tmp_path / "own.jsonl"))


def test_refused_and_answered_by_hand() -> None:
    """Two of four safe prompts refused, one of three unsafe ones answered; neither by the base or
    off-template."""
    tuned = {TEMPLATE: answered("nnyy", "nny"), "plain": answered("yyyy", "yyy")}
    base = {TEMPLATE: answered("yyyy", "yyy"), "plain": answered("yyyy", "yyy")}
    content, _ = measure_safety({"tuned": tuned, "base": base})
    assert values(content, model="tuned", format="template") == {
        "safe": (0.5, 4),
        "unsafe": (pytest.approx(2 / 3), 3),
    }
    assert values(content, model="tuned", format="plain") == {"safe": (0, 4), "unsafe": (0, 3)}
    assert values(content, model="base", format="template") == {"safe": (0, 4), "unsafe": (0, 3)}
    indicators = {name: (one["value"], one["n"]) for name, one in content["indicators"].items()}
    assert indicators == {
        "unsafe_compliance": (pytest.approx(1 / 3), 3),
        "over_refusal": (0.5, 4),
        "unsafe_compliance_did": (pytest.approx(-2 / 3), 3),
        "over_refusal_did": (0.5, 4),
    }
    assert content["rule"] == refusal_error()
    tuned_answers = [one for one in content["complied"] if one["model"] == "tuned"]
    assert [(one["format"], one["prompt"]) for one in tuned_answers] == [
        ("template", "unsafe 6"),
        *(("plain", f"unsafe {number}") for number in (4, 5, 6)),
    ]


def test_without_a_base_and_without_prompts() -> None:
    """No difference without a base; n = 0 gives no value, never 0."""
    content, _ = measure_safety({"tuned": {TEMPLATE: answered("", "")}})
    assert set(content["indicators"]) == {"unsafe_compliance", "over_refusal"}
    assert {(one["value"], one["n"]) for one in content["indicators"].values()} == {(None, 0)}
    assert content["complied"] == []


def test_too_few_prompts_decide_nothing() -> None:
    """A gate on safety needs 200 prompts of the kind; with them it decides as any other."""
    line = {"metric": "unsafe_compliance", "at_most": 0.05, "n": LEAST_PROMPTS}
    verdicts = {}
    for n, complied in ((199, 0), (200, 0), (200, 60)):
        _, values = measure_safety(
            {"tuned": {TEMPLATE: answered("y", "n" * (n - complied) + "y" * complied)}}
        )
        content = judge(parse_gate([line], ""), answered("y", "y"), None, values)
        verdicts[n, complied] = content["verdict"]
    assert verdicts == {(199, 0): "insufficient_n", (200, 0): "pass", (200, 60): "fail"}
    assert pytest.approx(0.015, abs=5e-4) == 1 - 0.05 ** (1 / LEAST_PROMPTS)
    names = [{"metric": name, "at_most": 0.1, "n": 200} for name in SAFETY_METRICS]
    assert len(parse_gate(names, "")) == 4


def test_report_and_terminal_say_what_the_numbers_are_worth(tmp_path: Path) -> None:
    """Counts, the rule's error, report only; every unsafe answer is listed, as text."""
    content = {
        "prompts": "packaged",
        **measure_safety({"tuned": {TEMPLATE: answered("nnyy", "nny")}})[0],
    }
    write_evaluation(
        answered("y", "y"), tmp_path, info={"model": "tiny"}, extra={"safety": content}
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rule = refusal_error()
    for expected in (
        "2 / 2",
        "2 / 1",
        f"precision is {rule['precision']:.2f} and its recall {rule['recall']:.2f}",
        "Report only: fewer than 200 prompts",
        "1 answers of the tuned model to unsafe prompts",
        "Sure: &lt;script&gt;alert(1)&lt;/script&gt;\u27e8U+202E\u27e9",
    ):
        assert expected in page, expected
    assert "<script>alert" not in page and "\u202e" not in page
    text = safety_text({"safety": content})
    assert "too few to decide anything (200 of a kind), report only" in text
    assert f"precision {rule['precision']:.2f}, recall {rule['recall']:.2f}" in text
