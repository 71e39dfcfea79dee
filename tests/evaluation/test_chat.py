"""The chat command: histories, commands, two models, JSON, streamed words, what no longer fits."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes import cli
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.evaluation.chat_commands import COMMANDS
from sft_recipes.evaluation.chat_speaker import Speaker, _Words
from sft_recipes.recipe import DatasetSource, DataSettings


@dataclass
class Talk:
    """What a session came to, and the text of every prompt that was generated on."""

    code: int
    out: str
    err: str
    prompts: list[str]


Answering = Callable[[str], str]


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Talk]:
    """Run the command on these lines; `answer` stands in for the model where it is given."""

    def run(
        lines: str, *options: object, answer: Answering | None = None, model: Path = base_folder
    ) -> Talk:
        prompts: list[str] = []

        def generate(speaker: Speaker, ids: list[int], settings: Any, words: _Words) -> None:
            tokenizer = speaker.labeller.renderer.tokenizer
            prompts.append(tokenizer.decode(ids))
            if answer is None:
                real(speaker, ids, settings, words)
                return
            for token in tokenizer(answer(prompts[-1]), add_special_tokens=False)["input_ids"]:
                words.put(torch.tensor([token]))
            words.put(torch.tensor([speaker.labeller.renderer.stop_ids[0]]))
            words.end()

        real = Speaker._generate
        with monkeypatch.context() as patch:
            patch.setattr(Speaker, "_generate", generate)
            typed = io.BytesIO(lines.encode("utf-8", "surrogateescape"))
            patch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8"))
            patch.setattr("sys.argv", ["sft-recipes", "chat", str(model), *map(str, options)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        captured = capsys.readouterr()
        return Talk(int(ended.value.code or 0), captured.out, captured.err, prompts)

    return run


@pytest.fixture
def with_context(base_folder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """The base with a context of so many positions."""

    def write(positions: int) -> Path:
        folder = tmp_path / f"context_{positions}"
        folder.mkdir()
        for file in base_folder.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = positions
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return write


SHORT = 70  # positions, enough for two questions and answers


def blue(_: str) -> str:
    """Answers whatever is asked."""
    return "Blue."


def test_the_conversation_goes_on_until_reset(talk) -> None:
    """Each turn holds those before it in the training template; /reset forgets them, /quit leaves
    the rest unread."""
    said = talk("One?\n\n  Two?  \n/reset\nThree?\n/quit\nFour?\n", answer=blue)
    assert said.code == 0 and said.out == "tuned: Blue.\n" * 3
    first = "### Instruction:\nOne?\n\n### Response:\n"
    assert said.prompts == [
        first,
        f"{first}Blue.<|endoftext|>\n\n### Instruction:\nTwo?\n\n### Response:\n",
        "### Instruction:\nThree?\n\n### Response:\n",
    ]


def test_two_models_keep_their_own_histories(talk, base_folder) -> None:
    """Run and base answer every line, each after its own answers; one JSON object per answer."""
    replies = iter(("a", "b", "c", "d"))
    said = talk("One?\nTwo?\n", "--base", base_folder, "--json", answer=lambda _: next(replies))
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 0
    assert [(answer["model"], answer["prompt"], answer["response"]) for answer in answers] == [
        ("tuned", "One?", "a"),
        ("base", "One?", "b"),
        ("tuned", "Two?", "c"),
        ("base", "Two?", "d"),
    ]
    assert "a<|endoftext|>" in said.prompts[2] and "b<|endoftext|>" in said.prompts[3]
    assert {answer["stop_reason"] for answer in answers} == {"eos"}


def test_answers_are_greedy_and_shown_as_text(talk) -> None:
    """A real model answers the same twice, at most as long as asked; what would act on a terminal
    is spelled out."""
    once = talk("One?\n", "--max_new_tokens", 3, "--json").out
    again = talk("One?\n", "--max_new_tokens", 3, "--json").out
    assert once == again and json.loads(once)["stop_reason"] == "length"
    said = talk("One?\n", answer=lambda _: "\x1b[2J\u202eBlue.")
    assert said.out == "tuned: \u27e8U+001B\u27e9[2J\u27e8U+202E\u27e9Blue.\n"


def test_streamed_text_is_the_text(talk) -> None:
    """What is shown bit by bit is what the object of the same answer holds."""
    shown = talk("One?\n", "--max_new_tokens", 20).out
    whole = json.loads(talk("One?\n", "--max_new_tokens", 20, "--json").out)["response"]
    assert shown in (f"tuned: {whole}\n", f"tuned: {whole} [cut at max_new_tokens]\n")


def test_characters_come_whole() -> None:
    """No half character is shown, although a byte-level token ends inside one; the end shows all."""
    tokens = {1: b"A", 2: b"\xc3", 3: b"\xa4", 4: b"\xf0\x9f"}

    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return b"".join(tokens[token] for token in ids).decode("utf-8", "replace")

    shown: list[str] = []
    words = _Words(Bytes(), [9], shown.append)
    words.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in (1, 2, 3, 4):
        words.put(torch.tensor([token]))
    assert shown == ["A", "\u00e4"]
    words.put(torch.tensor([9]))
    words.end()
    assert "".join(shown) == words.text == "A\u00e4\ufffd" and words.stop_reason == "eos"


def test_bytes_that_are_no_text_are_shown_as_such(talk) -> None:
    """A pipe that brings half a character ends nothing: a mark stands in its place."""
    said = talk("One\udcff?\nTwo?\n", answer=blue)
    assert said.code == 0 and said.out == "tuned: Blue.\n" * 2
    assert "One\ufffd?" in said.prompts[0]


def test_temperature_draws_the_same_words_for_the_same_lines(talk) -> None:
    """Drawn answers differ within a session and are those of the same lines in another; 0 is
    greedy again. A temperature that is none changes nothing."""
    lines = "One?\n/temperature 1.5\n/reset\nOne?\n/reset\nOne?\n/temperature hot\n"
    lines += "/temperature 0\n/reset\nOne?\n"
    said = talk(lines, "--max_new_tokens", 12)
    greedy, first, second, last = said.out.split("tuned: ")[1:]
    assert greedy == last and len({greedy, first, second}) == 3
    assert talk(lines, "--max_new_tokens", 12).out == said.out
    assert "expected a number from 0 to 2, got 'hot'" in said.err


def test_a_conversation_that_is_too_long_loses_its_beginning(talk, with_context) -> None:
    """The oldest turns leave the prompt, whole, and a word is said; every prompt has room for the
    answer."""
    said = talk(
        "One?\nTwo?\nThree?\n", "--max_new_tokens", 20, answer=blue, model=with_context(SHORT)
    )
    assert said.out == "tuned: Blue.\n" * 3
    assert "One?" in said.prompts[1] and said.prompts[2].startswith("### Instruction:\nTwo?")
    assert said.err.count("its first 2 messages are left out") == 1


def test_a_question_that_does_not_fit_ends_nothing(talk, with_context) -> None:
    """It is refused in words about the question, the history stays, the next one is answered."""
    said = talk(f"One?\n{'long ' * 99}\nTwo?\n", answer=blue, model=with_context(SHORT))
    assert said.code == 0 and said.out == "tuned: Blue.\n" * 2
    assert "ask it in fewer words" in said.err and "row" not in said.err


def test_the_system_prompt_stands_first(talk, base_folder, tmp_path) -> None:
    """/system holds from the next question on, through /reset, until it is taken away."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        encoding="utf-8",
    )
    lines = "One?\n/system Be brief.\n/reset\nTwo?\n/system\n/reset\nThree?\n"
    said = talk(lines, "--chat_template", template, answer=blue)
    assert said.prompts[1].startswith("system: Be brief.<|endoftext|>user: Two?")
    assert said.prompts[0].startswith("user: One?") and said.prompts[2].startswith("user: Three?")


def test_a_template_without_a_place_for_system_prompts(talk, tmp_path) -> None:
    """Whether it refuses or leaves them out, /system says so and nothing changes."""
    template = tmp_path / "template.jinja"
    turns = "{{ m.role }}: {{ m.content }}{{ eos_token }}"
    for refusal in ("{{ raise_exception('no system here') }}", ""):
        template.write_text(
            f"{{% for m in messages %}}{{% if m.role == 'system' %}}{refusal}"
            f"{{% else %}}{turns}{{% endif %}}{{% endfor %}}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            encoding="utf-8",
        )
        said = talk("/system Be brief.\nOne?\n", "--chat_template", template, answer=blue)
        assert "takes no system prompt" in said.err and "Be brief" not in said.prompts[0]


def test_a_saved_conversation_is_training_data(talk, tmp_path) -> None:
    """Each /save adds one row, read back as the messages that were said; a refused one adds none."""
    path = tmp_path / "said.jsonl"
    lines = f"/save {path}\nOne?\n/save {path}\nTwo?\n/save {path}\n/save {tmp_path}/x.txt\n"
    said = talk(f"{lines}/save {tmp_path}/none/x.jsonl\nThree?\n", answer=blue)
    data = DataSettings([DatasetSource(str(path))])
    rows = [list(row.messages) for row in iter_examples(data.datasets[0], data, RejectLog(data))]
    turns = []
    for question in ("One?", "Two?"):
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Blue."},
        ]
    assert rows == [turns[:2], turns]
    assert "nothing was said yet" in said.err and "is no .jsonl file" in said.err
    assert "No such file" in said.err and said.out == "tuned: Blue.\n" * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["said.jsonl"]


def test_unknown_commands_say_what_there_is(talk) -> None:
    """A word with a stroke that is no command is not asked of the model; a path is a question."""
    said = talk("/resset\n/xyzzy\n/help\n/etc/hosts?\n", answer=blue)
    assert "did you mean '/reset'?" in said.err and len(said.prompts) == 1
    for name, command in COMMANDS.items():
        assert f"/{name}" in said.err and command.help in said.err


@pytest.fixture
def adapter_folder(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter on the base that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "adapter"
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", lora_alpha=64),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def test_the_base_of_an_adapter_is_the_model_without_it(talk, adapter_folder, base_folder) -> None:
    """`/base on` beside, `only` instead, `off` again: its answers are those of the base itself."""
    lines = "One?\n/base on\n/reset\nOne?\n/base only\n/reset\nOne?\n/base off\n/reset\nOne?\n"
    said = talk(lines, "--max_new_tokens", 8, "--json", model=adapter_folder)
    answers = [json.loads(line) for line in said.out.splitlines()]
    alone = json.loads(talk("One?\n", "--max_new_tokens", 8, "--json").out)["response"]
    tuned = answers[0]["response"]
    assert tuned != alone
    assert [(answer["model"], answer["response"]) for answer in answers] == [
        ("tuned", tuned),
        ("tuned", tuned),
        ("base", alone),
        ("base", alone),
        ("tuned", tuned),
    ]


def test_the_base_of_a_run_is_what_its_recipe_names(talk, base_folder, tmp_path) -> None:
    """A full run's base is loaded when it is asked for; where it is gone or unknown, a word says
    so and the tuned model answers on."""
    run = tmp_path / "run"
    run.mkdir()
    for file in base_folder.iterdir():
        (run / file.name).symlink_to(file)
    recipe = "dataset_name: ./rows.jsonl\noutput_dir: ./\nmodel_name_or_path: "
    (run / "recipe.yaml").write_text(f"{recipe}{base_folder}\n", encoding="utf-8")
    said = talk("/base on\nOne?\n", answer=blue, model=run)
    assert said.out == "tuned: Blue.\nbase: Blue.\n"
    (run / "recipe.yaml").write_text(f"{recipe}{tmp_path}/gone\n", encoding="utf-8")
    said = talk("/base on\nOne?\n", answer=blue, model=run)
    assert "no such folder" in said.err and "--base MODEL" in said.err
    assert said.out == "tuned: Blue.\n"
    said = talk("/base on\n/base maybe\nOne?\n", answer=blue)
    assert "the model before tuning is not known" in said.err and said.out == "tuned: Blue.\n"
    assert "expected on, only or off, got 'maybe'" in said.err


def test_a_model_that_is_not_there(talk, tmp_path) -> None:
    """A wrong base ends with code 2 before anything is asked."""
    said = talk("One?\n", "--base", tmp_path / "none")
    assert (said.code, said.out, said.prompts) == (2, "", [])


def test_an_interrupted_answer_is_remembered_as_far_as_it_was_said(talk, monkeypatch) -> None:
    """Ctrl-C ends the answer alone: its beginning stays in the conversation, which goes on. An
    answer that had not begun is forgotten with its question."""

    def interrupted(prompt: str) -> str:
        if prompt.endswith("Never?\n\n### Response:\n"):
            raise KeyboardInterrupt
        return "Blue."

    said = talk("One?\nNever?\nTwo?\n", answer=interrupted)
    assert said.out == "tuned: Blue.\ntuned:  [stopped]\ntuned: Blue.\n"
    assert "Never?" not in said.prompts[2] and said.code == 0


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(with_context) -> None:
    """The first words of an endless answer are shown before it ends; Ctrl-C ends it, the next
    line is obeyed, Ctrl-C at the prompt ends nothing, Ctrl-D leaves with code 0."""
    master, slave = pty.openpty()
    endless = str(with_context(1_000_000))
    command = [sys.executable, "-m", "sft_recipes", "chat", endless]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "100000"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    screen = Screen(master)
    try:
        screen.wait_for("> ")
        os.write(master, b"One?\n")
        screen.wait_for("tuned: ")
        os.kill(process.pid, signal.SIGINT)
        screen.wait_for("[stopped]")
        screen.wait_for("> ")
        os.kill(process.pid, signal.SIGINT)
        screen.wait_for("Ctrl-D leaves")
        os.write(master, b"/help\n")
        screen.wait_for("/temperature")
        screen.wait_for("> ")
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


@dataclass
class Screen:
    """What a program writes on its terminal."""

    master: int
    unread: str = ""

    def wait_for(self, text: str) -> None:
        """Read up to this text; a program that says nothing for a minute fails."""
        while text not in self.unread:
            assert select.select([self.master], [], [], 60)[0], f"no {text!r} in {self.unread!r}"
            self.unread += os.read(self.master, 1024).decode("utf-8", "replace")
        self.unread = self.unread.partition(text)[2]
