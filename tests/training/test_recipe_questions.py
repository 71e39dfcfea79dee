"""`init` asks a person what a look at model and data leaves open, and nobody else."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import recipe_questions
from sft_recipes.training.new_recipe import RecipeRequest, parameter_count
from sft_recipes.training.rates import first_rates
from sft_recipes.training.recipe_questions import write_asking
from tests.conftest import instruction_rows
from tests.tiny_architectures import build_base

ODD_ROWS: Sequence[dict[str, Any]] = [
    {"Kundenfrage": f"Was kostet {n}?", "Unser Text": f"{n} Euro."} for n in range(20)
]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sit at the terminal and type these lines."""

    def sit(*lines: str) -> None:
        monkeypatch.setattr(recipe_questions, "can_ask", lambda: True)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return sit


def test_enter_takes_every_default(
    base_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    answer: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With nothing but Enter a base without template gets the instruction template, LoRA, and two odd columns in
    their order; each question shows what it may be answered with.
    """
    data = write_rows(list(ODD_ROWS))
    answer("", "", "")
    made = write_asking(RecipeRequest(str(base_folder), str(data), {}, tmp_path / "mine"))
    recipe = load_recipe(made.path)
    assert recipe.template.chat_template == "instruction"
    assert recipe.model["use_peft"] is True
    source = recipe.data.datasets[0]
    assert source.column_mapping == {"instruction": "Kundenfrage", "output": "Unser Text"}
    shown = " ".join(capsys.readouterr().out.split())
    assert "Kundenfrage: Was kostet 0?" in shown
    assert "[lora/full] (lora)" in shown
    assert "(instruction)" in shown


def test_answers_are_obeyed(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, answer: Callable[..., None]
) -> None:
    """What is typed is what is written; an answer that is no choice is asked for again."""
    data = write_rows([row | {"Ort": "Ulm"} for row in ODD_ROWS])
    answer("chatml", "fll", "full", "Unser Text", "Kundenfrage", "Ort")
    made = write_asking(RecipeRequest(str(base_folder), str(data), {}, tmp_path / "mine"))
    recipe = load_recipe(made.path)
    assert recipe.template.chat_template == "chatml"
    assert not recipe.model.get("use_peft")
    assert recipe.training["learning_rate"] == first_rates(parameter_count(str(base_folder))).full
    assert recipe.data.datasets[0].column_mapping == {
        "instruction": "Unser Text",
        "output": "Kundenfrage",
        "input": "Ort",
    }


def test_what_is_said_or_clear_is_not_asked(
    write_rows: Callable[..., Path], tmp_path: Path, answer: Callable[..., None]
) -> None:
    """A template of the tokenizer's own, columns that are recognised, `--full`: nothing is left to ask."""
    base = build_base("qwen3", tmp_path / "base")
    answer()  # a question would find the end of input
    request = RecipeRequest(
        str(base), str(write_rows(instruction_rows(20))), {}, tmp_path / "mine", full=True
    )
    recipe = load_recipe(write_asking(request).path)
    assert not recipe.model.get("use_peft")


def test_nobody_is_asked_without_a_terminal(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Without a terminal unclear columns are the error that names the way in, and defaults come with a note."""
    request = RecipeRequest(
        str(base_folder), str(write_rows(list(ODD_ROWS))), {}, tmp_path / "mine"
    )
    with pytest.raises(InputError, match="--column_mapping"):
        write_asking(request)
    assert not (tmp_path / "mine").exists()
    clear = RecipeRequest(
        str(base_folder), str(write_rows(instruction_rows(20))), {}, tmp_path / "mine"
    )
    notes = " ".join(write_asking(clear).notes)
    assert "--chat_template" in notes and "--full" in notes


def test_a_full_recipe_trains_all_weights_at_its_rate(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """`--full` writes no key of LoRA, and the rate of a model of that size."""
    data = str(write_rows(instruction_rows(20)))
    made = write_asking(RecipeRequest(str(base_folder), data, {}, tmp_path / "mine", full=True))
    recipe = load_recipe(made.path)
    assert not [key for key in recipe.values if "lora" in key or "peft" in key]
    assert recipe.training["learning_rate"] == first_rates(1_000_000).full == 1e-4
    assert "full fine-tuning on" in made.path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("parameters", "full", "lora"),
    [
        (134_515_008, 1e-4, 2e-3),
        (268_098_176, 3e-5, 1e-3),
        (596_049_920, 2e-5, 2e-4),
        (None, 2e-5, 2e-4),
    ],
)
def test_rates_are_those_that_were_measured(
    parameters: int | None, full: float, lora: float
) -> None:
    """SmolLM2-135M and Gemma-3-270m get what was best on their validation rows, large and unknown models less."""
    rates = first_rates(parameters)
    assert (rates.of(lora=False), rates.of(lora=True)) == (full, lora)


def test_absolute_paths_stay_absolute(
    base_folder: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model or file given in full stands so in the recipe; one given from here is seen from the recipe."""
    data = write_rows(instruction_rows(20))
    made = write_asking(RecipeRequest(str(base_folder), str(data), {}, tmp_path / "mine"))
    values = load_recipe(made.path).values
    assert values["model_name_or_path"] == str(base_folder)
    assert values["dataset_name"] == str(data)
    monkeypatch.chdir(tmp_path)
    made = write_asking(RecipeRequest(str(base_folder), data.name, {}, tmp_path / "other"))
    assert load_recipe(made.path).values["dataset_name"] == f"../{data.name}"


def type_into(command: Sequence[str], folder: Path, keys: str, seconds: float = 120) -> str:
    """Run a command on a pseudo-terminal, type `keys` at its questions, and return what it shows."""
    here, there = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    os.write(here, keys.encode())
    shown = b""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if not select.select([here], [], [], 1)[0]:
            continue
        try:
            part = os.read(here, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_on_a_real_terminal_the_command_asks(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """`sft-recipes init` on a pseudo-terminal asks three questions and writes the recipe after as many times Enter."""
    write_rows(list(ODD_ROWS), "rows.jsonl")
    command = [sys.executable, "-m", "sft_recipes", "init", "--model", str(base_folder)]
    shown = type_into([*command, "--data", "rows.jsonl", "--output", "mine"], tmp_path, "\n" * 3)
    for question in ("Chat template", "Train with", "Question or instruction", "Answer to be"):
        assert question in shown
    assert "wrote mine/recipe.yaml" in shown
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    assert recipe.data.datasets[0].column_mapping["output"] == "Unser Text"
