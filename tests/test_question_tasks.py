"""The data of the small recipes: every answer follows from its question, checked by other means than those that made
it, and nothing of the test stands in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.evaluation.constraints import broken_constraints
from sft_recipes.overlap import prompt_overlaps

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DATA = RECIPES / "smollm2-135m" / "data"
HELD_OUT = {"question", "numbers_json", "smallest_number"}


def rows(split: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def digits(text: str) -> list[str]:
    return [word for word in re.split(r"[^0-9.]+", text) if word.strip(".")]


def by_hand(row: dict[str, Any]) -> bool:
    """Whether an answer is right, told in another way than it was made."""
    question, answer = row["input"], row["output"]
    numbers = [word.strip(".") for word in digits(question)]
    ends = sum(question.count(mark) for mark in ("? ", ". ")) + 1
    checks = {
        "numbers": lambda: answer.split(", ") == numbers,
        "numbers_json": lambda: json.loads(answer) == {"numbers": list(map(json.loads, numbers))},
        "money_json": lambda: (
            json.loads(answer)
            == {
                "dollars": [
                    json.loads(word.strip(".,?")) for word in re.findall(r"\$([\d.]+)", question)
                ]
            }
        ),
        "names": lambda: all(
            re.search(rf"\b{line[2:]}\b", question) for line in answer.split("\n")
        ),
        "asks_for": lambda: (
            {"time": "how", "money": "how", "count": "how many"}[answer] in question.lower()
        ),
        "first_sentence": lambda: question.startswith(answer) and answer.count(". ") == 0,
        "question": lambda: question.endswith(answer) and answer.count(". ") == 0,
        "sentence_count": lambda: int(answer) == ends,
        "largest_number": lambda: float(answer) == max(map(float, numbers)),
        "smallest_number": lambda: float(answer) == min(map(float, numbers)),
        "first_words": lambda: question.upper().split()[:3] == answer.split(),
    }
    return bool(checks[row["task_type"]]())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_answer_follows_and_keeps_its_form(split: str) -> None:
    """Each answer is right when told in another way, and keeps the constraints that its row states."""
    for number, row in enumerate(rows(split), 1):
        assert by_hand(row), f"{split}.jsonl:{number}: {row}"
        assert not broken_constraints(row["output"], row["expected_format"]), (
            f"{split}.jsonl:{number}"
        )


def test_the_test_is_unseen() -> None:
    """No question stands in two files; the held-out families and some wordings stand in the test alone; each family has
    as many rows as the others, and the first rows of the test are a sample of it."""
    trained, validated, tested = rows("train"), rows("validation"), rows("test")
    questions = [row["input"] for row in [*trained, *validated, *tested]]
    assert len(set(questions)) == len(questions) == 2600
    families = {row["task_type"] for row in trained}
    assert {row["task_type"] for row in tested} == families | HELD_OUT
    assert not families & HELD_OUT and len(families) == 8
    assert {row["task_type"] for row in validated} == families
    for family in families | HELD_OUT:
        assert sum(row["task_type"] == family for row in tested) == 40
    assert {row["task_type"] for row in tested[:11]} == families | HELD_OUT
    wordings = {row["instruction"] for row in trained}
    assert {row["instruction"] for row in tested} - wordings


def test_no_question_comes_back_with_other_names() -> None:
    """By the rules that `evaluate --gate` refuses rows by, no held-out prompt was trained, nearly."""
    trained = [f"{row['instruction']}\n\n{row['input']}" for row in rows("train")]
    asked = [
        f"{row['instruction']}\n\n{row['input']}" for row in [*rows("validation"), *rows("test")]
    ]
    assert not prompt_overlaps(trained, asked)


def test_both_recipes_have_the_same_data() -> None:
    """The rows are stored once; GSM8K's licence stands beside them."""
    for file in ("train.jsonl", "validation.jsonl", "test.jsonl", "LICENSE"):
        assert (RECIPES / "gemma-3-270m" / "data" / file).resolve() == (DATA / file).resolve()
    assert "Copyright (c) 2021 OpenAI" in (DATA / "LICENSE").read_text(encoding="utf-8")
