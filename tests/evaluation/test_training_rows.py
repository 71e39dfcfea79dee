"""What is asked of the training rows: task types, and shots for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.trained_rows import trained_rows
from sft_recipes.errors import InputError
from sft_recipes.evaluation.training_rows import read_training_rows
from sft_recipes.messages import Example
from sft_recipes.recipe_keys import load_recipe


def row(text: str, task: str | None = None) -> dict[str, Any]:
    return {"instruction": text, "output": f"answer to {text}", "task_type": task}


def asked(text: str, task: str | None = None, system: str | None = None) -> Example:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
    return Example(messages, "test.jsonl", 0, columns={"task_type": task})


@pytest.fixture
def read(write_rows, write_recipe, make_tokenizer, tmp_path) -> Callable[..., Any]:
    """Read shots from these rows, as seen from these prompts."""

    def do(rows: list[Any], prompts: list[Example], shots: int, **keys: Any) -> Any:
        write_rows(rows)
        recipe = load_recipe(write_recipe(**keys))
        labeller = Labeller(attach_chat_template(make_tokenizer(), recipe.template), recipe.labels)
        folder = tmp_path / "prepared"
        prepare(recipe, labeller, folder, progress=False)
        trained = trained_rows(recipe, folder)
        return read_training_rows(recipe, labeller, trained, prompts, shots)

    return do


def contents(example: Example) -> list[str]:
    return [message["content"] for message in example.messages]


def test_shots_are_training_rows_of_the_prompts_own_task_type(read) -> None:
    """Two rows of type a for a prompt of type a, of any type for one that training does not know;
    counts by type."""
    rows = (
        [row(f"a{index}", "a") for index in range(5)]
        + [row(f"b{index}", "b") for index in range(3)]
        + [row("n")]
    )
    found = read(rows, [], 2)
    assert found.task_types == {"a": 5, "b": 3}
    shown = contents(found.shown_to(asked("question", "a"), 2))
    assert len(shown) == 6 and shown[-2:] == ["question", "x"]
    assert shown[0] != shown[2]
    for question, answer in ((shown[0], shown[1]), (shown[2], shown[3])):
        assert question.startswith("a") and answer == f"answer to {question}"
    assert len(contents(found.shown_to(asked("question", "unknown"), 2))) == 6
    assert found == read(rows, [], 2)


def test_a_prompt_that_is_asked_is_never_shown(read) -> None:
    """Whatever its case and spaces, also behind the recipe's system prompt; with nothing else there
    is nothing."""
    rows = [row("One  TWO", "a"), row("three", "a")]
    found = read(rows, [asked("one two", "a", "Be brief.")], 2, system_prompt="Be brief.")
    assert found.task_types == {"a": 2}
    shown = contents(found.shown_to(asked("one two", "a", "Be brief."), 2))
    assert shown == ["Be brief.", "three", "answer to three", "one two", "x"]
    with pytest.raises(
        InputError, match=r"no question with one answer\. Fix: evaluate without --shots"
    ):
        read(rows[:1], [asked("one two")], 1)


def test_only_questions_with_one_answer_are_shown(read) -> None:
    """Longer conversations are counted, not shown."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(InputError, match="--shots"):
        read([{"messages": turns}], [], 1)
    assert read([{"messages": turns, "task_type": "a"}], [], 0).task_types == {"a": 1}
