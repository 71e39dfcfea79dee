"""The Modelfile beside an export says what the chat template says, or there is none."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.recipe import TemplateSettings
from sft_recipes.release.modelfile import write_modelfile
from tests.conftest import build_tokenizer
from tests.data.template_tokenizers import tokenizer_for

# Each action that a Modelfile of ours may hold, in jinja's words. In Ollama's messages there are system turns, too.
ACTIONS = {
    "if .System": "{% if system %}",
    ".System": "{{ system }}",
    "range $i, $_ := .Messages": "{% for message in messages %}",
    "$last := eq (len (slice $.Messages $i)) 1": "",
    'if eq .Role "user"': "{% if message.role == 'user' %}",
    'else if eq .Role "assistant"': "{% elif message.role == 'assistant' %}",
    ".Content": "{{ message.content }}",
    "if $last": "{% if loop.last %}",
    "if not $last": "{% if not loop.last %}",
    "else": "{% else %}",
}
ENDS = {"if": "{% endif %}", "range": "{% endfor %}"}
SHIPPED = ("instruction", "alpaca", "chatml", "chapter_chat", "deepseek_r1")
REAL = ("llama3", "gemma3", "qwen2_5", "qwen3", "phi3", "cohere", "deepseekv3", "glm4moe")
SYSTEM = {"role": "system", "content": "You are a pirate.\nAnswer in {{ rhymes }}."}
TALK = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one,\n\nplease: 1 < 2 & 3?"},
    {"role": "assistant", "content": "- Red\n- or green"},
    {"role": "user", "content": 'Thanks. A "third" one?'},
]


def commands(folder: Path) -> list[tuple[str, str]]:
    """The commands of a Modelfile with their arguments, comments left out."""
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    found = re.findall(r'^(?:#.*|([A-Z]+) (?:(\w+) )?("""[\s\S]*?"""|\S+))$', text, re.MULTILINE)
    return [(f"{name} {key}".strip(), value.strip('"')) for name, key, value in found if name]


def as_ollama(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama's language makes of these messages; an action that is not in the table is an error."""
    translated, open_blocks = [], []
    for index, part in enumerate(re.split(r"\{\{ (.*?) \}\}", template)):
        if index % 2 == 0:
            translated.append("{% raw %}" + part + "{% endraw %}")
        elif part == "end":
            translated.append(ENDS[open_blocks.pop()])
        else:
            translated.append(ACTIONS[part])
            if part.split()[0] in ENDS:
                open_blocks.append(part.split()[0])
    assert not open_blocks
    system = "\n\n".join(turn["content"] for turn in messages if turn["role"] == "system")
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string("".join(translated)).render(system=system, messages=messages)


def renderer_of(name: str) -> ChatRenderer:
    """One of our templates on a base's tokenizer, or a real model's."""
    if name in SHIPPED:
        return attach_chat_template(build_tokenizer(), TemplateSettings(name))
    return attach_chat_template(copy.deepcopy(tokenizer_for(name)), TemplateSettings())


@pytest.mark.parametrize("name", [*SHIPPED, *REAL])
def test_the_modelfile_says_what_the_template_says(name: str, tmp_path: Path) -> None:
    """One, two and three questions, with and without a system prompt: the text of the renderer, to the character."""
    renderer = renderer_of(name)
    check = write_modelfile(tmp_path, renderer, None)
    assert check.outcome == "ok", check.detail
    template = dict(commands(tmp_path))["TEMPLATE"]
    for system in ([], [SYSTEM]):
        for turns in (1, 3, 5):
            messages = [*system, *TALK[:turns]]
            expected = renderer.render(messages, add_generation_prompt=True)
            assert as_ollama(template, messages) == expected


def test_commands(tmp_path: Path) -> None:
    """The folder itself, the recipe's system prompt, and a stop for every end of turn."""
    renderer = renderer_of("llama3")
    write_modelfile(tmp_path, renderer, "Be brief.\nAlways.")
    found = commands(tmp_path)
    assert [name for name, _ in found][:2] == ["FROM", "TEMPLATE"]
    assert found[0] == ("FROM", ".")
    assert ("SYSTEM", "Be brief.\nAlways.") in found
    stops = [value for name, value in found if name == "PARAMETER stop"]
    assert stops == renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
    assert "never run" in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_a_bos_that_the_tokenizer_adds_stands_once(tmp_path: Path) -> None:
    """Where the tokenizer puts BOS before a text, the Modelfile leaves it to that."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = build_tokenizer(bos_token="<|im_start|>")
    bos = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, bos)
    renderer = attach_chat_template(tokenizer, TemplateSettings("instruction"))
    assert renderer.render(TALK[:1]).startswith("<|im_start|>###")
    assert write_modelfile(tmp_path, renderer, None).outcome == "ok"
    template = dict(commands(tmp_path))["TEMPLATE"]
    assert as_ollama(template, TALK[:1]).startswith("### Instruction:")


TURN = "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
UNSAYABLE = {
    "the system prompt before the last question": (
        "{% for m in messages %}{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}{% if m.role != 'system' %}"
        + TURN
        + "{% endif %}{% endfor %}",
        "another order",
    ),
    "numbered turns": (
        "{% for m in messages %}[{{ loop.index }}]" + TURN + "{% endfor %}",
        "5 turns otherwise",
    ),
    "the date": (
        "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}",
        "the date of the day",
    ),
    "braces": ("{{ '{{' }}{% for m in messages %}" + TURN + "{% endfor %}", "holds {{"),
    "quotes": ('"""{% for m in messages %}' + TURN + "{% endfor %}", 'holds """'),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_ollama_has_no_words_for(case: str, tmp_path: Path) -> None:
    """Such a template is named as what it is, and no file is written."""
    template, reason = UNSAYABLE[case]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    check = write_modelfile(tmp_path, ChatRenderer(tokenizer), None)
    assert check.outcome == "note"
    assert check.detail.startswith("none was written: ") and reason in check.detail
    assert not list(tmp_path.iterdir())
