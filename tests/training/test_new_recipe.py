"""`init --model --data` writes a recipe that says what it found and that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.prepared import load_prepared
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe
from sft_recipes.training.new_recipe import RecipeRequest, write_recipe
from sft_recipes.training.train import train
from tests.conftest import instruction_rows
from tests.data.template_tokenizers import tokenizer_for


def test_written_recipe_trains(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The recipe written for a model and a file loads, points at both from its own folder, and trains to the end."""
    data = write_rows(instruction_rows(40))
    made = write_recipe(
        RecipeRequest(str(base_folder), str(data), {}, tmp_path / "mine", force=False),
        progress=False,
    )
    recipe = load_recipe(
        made.path, {"max_steps": 2, "per_device_train_batch_size": 2, "global_batch_size": 2}
    )
    assert Path(recipe.model_name) == base_folder.resolve()
    assert Path(recipe.data.datasets[0].path) == data.resolve()
    assert recipe.data.datasets[0].format == "instruction"
    assert recipe.labels.max_length == 256
    assert len(made.rows) == 3
    run = train(recipe)
    assert run == tmp_path.resolve() / "mine" / "run"
    assert (run / "adapter_config.json").is_file()


def test_max_length_is_the_smallest_that_nearly_all_rows_fit(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """One row in two hundred may be longer than max_length; with more of them it grows, and the comment counts them."""
    rows: list[dict[str, Any]] = instruction_rows(199)
    rows.append({"instruction": "Say it.", "output": "one two three " * 200})
    made = write_recipe(
        RecipeRequest(str(base_folder), str(write_rows(rows)), {}, tmp_path / "a", force=False),
        progress=False,
    )
    assert load_recipe(made.path).labels.max_length == 256
    assert "Of 200 training rows looked at, 199 fit" in made.path.read_text()
    rows += rows[-1:] * 4
    made = write_recipe(
        RecipeRequest(str(base_folder), str(write_rows(rows)), {}, tmp_path / "b", force=False),
        progress=False,
    )
    assert (load_recipe(made.path).labels.max_length or 0) > 256


def test_a_tuned_models_template_is_kept_and_said(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """A tokenizer with its own template keeps it: the recipe names none, and warns of forgetting."""
    tokenizer = load_tokenizer(str(base_folder))
    tokenizer.chat_template = (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\\n{%- endif -%}"
    )
    tokenizer.save_pretrained(tmp_path / "tuned")
    made = write_recipe(
        RecipeRequest(
            str(tmp_path / "tuned"),
            str(write_rows(instruction_rows(5))),
            {},
            tmp_path / "c",
            force=False,
        ),
        progress=False,
    )
    assert load_recipe(made.path).template.chat_template is None
    assert "can lose what it knows" in made.path.read_text()
    assert "<|im_end|>" in made.renderer.tokenizer.decode(made.rows[0].result.input_ids)


def test_nothing_is_overwritten(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """A second call is refused and changes nothing; --force writes."""
    data = str(write_rows(instruction_rows(5)))
    path = write_recipe(
        RecipeRequest(str(base_folder), data, {}, tmp_path / "d", force=False), progress=False
    ).path
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_recipe(
            RecipeRequest(str(base_folder), data, {}, tmp_path / "d", force=False), progress=False
        )
    assert path.read_text() == "mine"
    write_recipe(
        RecipeRequest(str(base_folder), data, {}, tmp_path / "d", force=True), progress=False
    )
    assert "model_name_or_path" in path.read_text()


@pytest.mark.parametrize("reasoned", [True, False])
def test_a_hybrid_models_switch_follows_the_rows(
    reasoned: bool, base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """With a template that can switch reasoning, the recipe switches it on exactly where rows bring reasoning."""
    answer = {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nYes." if reasoned else "Yes.",
    }
    data = write_rows(
        [{"messages": [{"role": "user", "content": f"Is {n} odd?"}, answer]} for n in range(4)]
    )
    model = tmp_path / "hybrid"
    tokenizer_for("qwen3").save_pretrained(model)
    made = write_recipe(
        RecipeRequest(str(model), str(data), {}, tmp_path / "e", force=False), progress=False
    )
    recipe = load_recipe(made.path)
    assert recipe.template.chat_template_kwargs == {"enable_thinking": reasoned}
    assert (recipe.labels.empty_think, recipe.labels.history) == ("mask", "expand")
    assert f"{4 if reasoned else 0} of the rows looked at bring reasoning" in made.path.read_text()


def test_rows_with_tools_are_said(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Rows that bring tools are counted in the recipe, and the calls are what is trained."""
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "blue"}}}
    tool = {
        "name": "look_up",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {}},
    }
    messages = [
        {"role": "user", "content": "What is blue?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a colour"},
        {"role": "assistant", "content": "A colour."},
    ]
    data = write_rows([{"messages": messages, "tools": [tool]}] * 3)
    tokenizer_for("qwen2_5").save_pretrained(tmp_path / "model")
    made = write_recipe(
        RecipeRequest(str(tmp_path / "model"), str(data), {}, tmp_path / "f", force=False),
        progress=False,
    )
    assert "3 of the rows looked at bring tools" in made.path.read_text()
    row = made.rows[0].result
    trained = made.renderer.tokenizer.decode([label for label in row.labels if label >= 0])
    assert '"name": "look_up"' in trained and "A colour." in trained and "a colour" not in trained


def test_replayed_rows_are_mixed_in_and_never_held_out(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """With --replay the recipe names both sets, passes the checks, trains rows of both, and holds out
    rows of the task alone; what is longer in either decides on max_length."""
    data = write_rows(
        [{"Q": f"Spell {n}.", "A": "x" * (n % 7 + 1), "task_type": "spell"} for n in range(60)],
        "task.jsonl",
    )
    general = []
    for number in range(30):
        question = {"role": "user", "content": f"Tell me of thing {number}."}
        answer = {"role": "assistant", "content": f"It is {number}. " * 30}
        general.append({"messages": [question, answer], "source": f"p.jsonl:{number}"})
    replay = write_rows(general, "replay.jsonl")
    options = {
        "column_mapping": {"instruction": "Q", "output": "A"},
        "dataset_train_split": "train",
    }
    made = write_recipe(
        RecipeRequest(str(base_folder), str(data), options, tmp_path / "mixed", replay=str(replay)),
        progress=False,
    )
    recipe = load_recipe(
        made.path, {"max_steps": 2, "per_device_train_batch_size": 2, "global_batch_size": 2}
    )
    task, mixed_in = recipe.data.datasets
    assert (Path(task.path), task.held_out) == (data.resolve(), True)
    assert task.column_mapping == options["column_mapping"]
    assert (Path(mixed_in.path), mixed_in.format, mixed_in.weight) == (
        replay.resolve(),
        "messages",
        1,
    )
    assert mixed_in.held_out is False
    assert (recipe.labels.max_length or 0) > 256
    assert check_recipe(recipe, progress=False)
    run = train(recipe)
    prepared = load_prepared(recipe, run / "prepared")
    assert prepared.summary["train"]["rows"] == 48 + 30
    assert prepared.summary["eval"]["rows"] == 12
    assert {example.source for example in prepared.eval_examples} == {str(data)}
