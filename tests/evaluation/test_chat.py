"""The chat command: histories, commands, two models, JSON, and what no longer fits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import cli
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import chat as chat_module
from sft_recipes.evaluation.generation import Generation


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run the command on these lines; returns exit code, output, and the text of every prompt that
    was generated on."""

    def run(
        lines: str, *options: object, answer: Callable[[str], str] | None = None
    ) -> tuple[int, str, list[str]]:
        prompts: list[str] = []

        def generate(
            model: Any, tokenizer: Any, ids: list[list[int]], **settings: Any
        ) -> list[Generation]:
            prompts.append(tokenizer.decode(ids[0]))
            if answer is None:
                return real(model, tokenizer, ids, **settings)
            return [Generation([1], answer(prompts[-1]), "eos")]

        real = chat_module.generate
        with monkeypatch.context() as patch:
            patch.setattr(chat_module, "generate", generate)
            patch.setattr("sys.stdin", io.StringIO(lines))
            patch.setattr("sys.argv", ["sft-recipes", "chat", str(base_folder), *map(str, options)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out, prompts

    return run


def test_the_conversation_goes_on_until_reset(talk) -> None:
    """Each turn holds those before it in the training template; /reset forgets them, /quit leaves
    the rest unread."""
    code, out, prompts = talk(
        "One?\n\n  Two?  \n/reset\nThree?\n/quit\nFour?\n", answer=lambda prompt: "Blue."
    )
    assert code == 0 and out == "tuned: Blue.\n" * 3
    first = "### Instruction:\nOne?\n\n### Response:\n"
    assert prompts[0] == first
    assert prompts[1] == f"{first}Blue.<|endoftext|>\n\n### Instruction:\nTwo?\n\n### Response:\n"
    assert prompts[2] == "### Instruction:\nThree?\n\n### Response:\n"


def test_two_models_keep_their_own_histories(talk, base_folder) -> None:
    """Run and base answer every line, each after its own answers; one JSON object per answer."""
    replies = iter(("a", "b", "c", "d"))
    code, out, prompts = talk(
        "One?\nTwo?\n", "--base", base_folder, "--json", answer=lambda prompt: next(replies)
    )
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(one["model"], one["prompt"], one["response"]) for one in found] == [
        ("tuned", "One?", "a"),
        ("base", "One?", "b"),
        ("tuned", "Two?", "c"),
        ("base", "Two?", "d"),
    ]
    assert "a<|endoftext|>" in prompts[2] and "b<|endoftext|>" in prompts[3]
    assert {one["stop_reason"] for one in found} == {"eos"}


def test_answers_are_greedy_and_shown_as_text(talk) -> None:
    """A real model answers the same twice, at most as long as asked; what would act on a terminal
    is spelled out."""
    _, once, _ = talk("One?\n", "--max_new_tokens", 3, "--json")
    _, again, _ = talk("One?\n", "--max_new_tokens", 3, "--json")
    assert once == again and json.loads(once)["stop_reason"] == "length"
    _, out, _ = talk("One?\n", answer=lambda prompt: "\x1b[2J\u202eBlue.")
    assert out == "tuned: \u27e8U+001B\u27e9[2J\u27e8U+202E\u27e9Blue.\n"


def test_a_question_that_does_not_fit_ends_nothing(talk, capsys) -> None:
    """It is refused with the way out, the history stays as it was, and the next question is
    answered."""

    def answer(prompt: str) -> str:
        if "long" in prompt:
            raise InputError(Problem("chat", "prompt", "too many tokens", "ask less"))
        return "Blue."

    code, out, prompts = talk("One?\nlong\nTwo?\n", answer=answer)
    assert code == 0 and out == "tuned: Blue.\n" * 2
    assert "long" not in prompts[2] and "One?" in prompts[2]


def test_a_model_that_is_not_there(talk, tmp_path, monkeypatch) -> None:
    """A wrong base ends with code 2 before anything is asked."""
    code, out, prompts = talk("One?\n", "--base", tmp_path / "none")
    assert (code, out, prompts) == (2, "", [])
