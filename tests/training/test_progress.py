"""What a person sees while a run trains: lines off a terminal, a live line on one, evaluations in four figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import progress
from sft_recipes.training import train as page
from sft_recipes.training.progress import NOT_GENERATED, TrainingProgress, evaluation_words


def at(step: int, steps: int = 10) -> Any:
    return SimpleNamespace(
        global_step=step, max_steps=steps, epoch=step / 10, is_world_process_zero=True
    )


def test_a_run_off_a_terminal_is_a_line_a_log_step(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step is told, then each log step, and each evaluation in words; no dictionary is printed."""
    keys = {"num_train_epochs": 2, "logging_steps": 2, "eval_strategy": "epoch", "eval_split": 4}
    answers = {"rows": 4, "max_new_tokens": 8, "max_share": None}
    recipe = load_recipe(write_recipe(**keys, evaluation=answers))
    page.train(recipe)
    said = capsys.readouterr().out
    steps = re.findall(r"^step (\d+)/(\d+)  epoch [\d.]+  loss [\d.]+.* lr \S+ .*left$", said, re.M)
    assert steps[0][0] == "1" and len(steps) > 2
    evaluations = re.findall(r"^evaluation at step \d+: loss [\d.]+.*well formed.*$", said, re.M)
    assert len(evaluations) == 2
    assert "(" not in evaluations[0] and re.search(r"loss [\d.]+ \([+-]", evaluations[1])
    assert "{'" not in said


def test_evaluation_in_words() -> None:
    """Known figures: the change since the last; words shared where nothing ever was exact."""
    first = {
        "loss": 0.5,
        "exact_match": 0.0,
        "token_f1": 0.25,
        "eos_rate": 0.5,
        "format_adherence": 1.0,
    }
    assert evaluation_words(first, {}) == (
        "loss 0.500, token F1 0.25, ended by itself 0.50, well formed 1.00"
    )
    second = {**first, "loss": 0.4, "exact_match": 0.5}
    assert evaluation_words(second, first) == (
        "loss 0.400 (-0.100), exact match 0.50 (+0.50), ended by itself 0.50 (+0.00), well formed 1.00 (+0.00)"
    )


def test_an_evaluation_without_answers_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """Where answers are meant to be generated and were not, it is said at that moment; else it is not."""
    for generates in (True, False):
        shown = TrainingProgress(generates)
        shown.on_train_begin(None, at(0), None)
        shown.on_log(None, at(2), None, {"eval_loss": 0.5})
        shown.on_step_begin(None, at(2), None)
        said = capsys.readouterr().out
        assert "evaluation at step 2: loss 0.500" in said
        assert (NOT_GENERATED in said) == generates


def test_on_a_terminal_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step, epoch, loss with its trend, rate, speed and times stand in one line; evaluations stay above it."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(
        "sys.stdout", SimpleNamespace(isatty=lambda: True, write=screen.write, flush=lambda: None)
    )
    with TrainingProgress(generates=False) as shown:
        shown.on_train_begin(None, at(0), None)
        for step, loss in ((1, 2.0), (2, 1.0)):
            logs = {"loss": loss, "learning_rate": 1e-4, "num_tokens": 100.0 * step}
            shown.on_step_end(None, at(step), None)
            shown.on_log(None, at(step), None, logs)
        shown.on_log(None, at(2), None, {"eval_loss": 0.5})
        shown.on_step_begin(None, at(2), None)
        shown.on_train_end(None, at(10), None)
    said = screen.getvalue()
    assert re.search(
        r"step 2/10  epoch 0\.20  loss 1\.000 falling  lr 1\.0e-04  [\d,]+ tokens/s", said
    )
    assert "evaluation at step 2: loss 0.500" in said
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l"), "the cursor is shown again"
