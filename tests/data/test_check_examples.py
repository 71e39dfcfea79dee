"""The checks before a run look at training rows, at every structure among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.check_examples import MOST_EXAMPLES, CheckExamples
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.template_checks import check_template
from sft_recipes.messages import Example
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import instruction_rows

QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}


def test_each_structure_occurs_however_rare() -> None:
    """Behind thousands of plain rows one with reasoning, one with tools and one of another source are looked at."""
    examples = CheckExamples()
    for row in range(5000):
        examples.add(0, Example([QUESTION, ANSWER], "plain", row))
    rare = [
        Example([QUESTION, {**ANSWER, "reasoning_content": "Because."}], "reasoned", 0),
        Example([QUESTION, ANSWER], "tools", 0, tools=[{"type": "function"}]),
        Example([QUESTION, ANSWER, QUESTION, ANSWER], "longer", 0),
        Example(
            [QUESTION, ANSWER, QUESTION, ANSWER], "partly", 0, train=(False, False, False, True)
        ),
    ]
    for example in rare:
        examples.add(0, example)
    examples.add(1, Example([QUESTION, ANSWER], "other", 0))
    chosen = examples.chosen()
    assert len(chosen) == MOST_EXAMPLES
    assert {"reasoned", "tools", "longer", "partly", "other"} <= {
        example.source for example in chosen
    }


@pytest.mark.parametrize("structures", [3, 30])
def test_kept_by_parts_is_kept_at_once(structures: int) -> None:
    """What is kept of parts of the rows and then of those parts' rows is what is kept of all rows."""
    draw = random.Random(structures)
    rows: list[Example] = []
    for row in range(6000):
        turns = [QUESTION, ANSWER] * (draw.randrange(structures) % 3 + 1)
        extra = {f"key_{draw.randrange(structures)}": "x"}
        rows.append(Example([{**turns[0], **extra}, *turns[1:]], "row", row))
    at_once, by_parts = CheckExamples(), CheckExamples()
    for example in rows:
        at_once.add(0, example)
    for start in range(0, len(rows), 700):
        part = CheckExamples()
        for example in rows[start : start + 700]:
            part.add(0, example)
        for example in part.kept:
            by_parts.add(0, example)
    assert by_parts.kept == at_once.kept and by_parts.chosen() == at_once.chosen()


def test_checks_see_training_rows_without_any_split(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """A recipe without held-out rows is checked on its training rows; what none of them brings is not called ok."""
    rows: list[dict[str, Any]] = instruction_rows(40)
    write_rows(rows)
    recipe = load_recipe(write_recipe())
    labeller = open_labeller(recipe)
    data = prepare(recipe, labeller, recipe.output_dir / "prepared", progress=False)
    assert data.eval is None and len(data.check_examples) == 40
    checks = {check.name: check for check in check_template(labeller, data.check_examples)}
    assert "checked 41 rows" in checks["stop token trained"].detail  # and the probe
    assert (
        checks["reasoning rendered"].outcome == checks["tools rendered"].outcome == "not looked at"
    )
    assert "none of 40" in checks["reasoning rendered"].detail
