"""Layouts belong to a structure, not to the row they were found on."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.conftest import build_tokenizer
from tests.data.template_tokenizers import tokenizer_for

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Calls f.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def row(arguments: dict[str, Any], index: int) -> Example:
    """A conversation in which the assistant calls a tool with these arguments."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Call it."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "name": "f"},
        {"role": "assistant", "content": "It is done."},
    ]
    return Example(messages, "calls", index, tools=[TOOL])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss"])
def test_values_of_a_tool_call_do_not_leak_into_the_layout(name: str) -> None:
    """Calls of one shape with other numbers, truth values and texts are all labelled, each with its own values."""
    labeller = Labeller(
        attach_chat_template(tokenizer_for(name), TemplateSettings()),
        LabelSettings(max_length=None),
    )
    values: list[dict[str, Any]] = [
        {
            "city": "Rome",
            "days": 3,
            "deep": {"share": 0.5, "flag": True, "id": 7, "role": "host", "type": "full"},
        },
        {
            "city": "Oslo",
            "days": 41,
            "deep": {"share": 2.25, "flag": True, "id": 8, "role": "host", "type": "half"},
        },
        {
            "city": "Lima",
            "days": -7,
            "deep": {"share": 1.0, "flag": False, "id": 9, "role": "host", "type": "none"},
        },
    ]
    batch = labeller.label([row(arguments, index) for index, arguments in enumerate(values)])
    assert batch.dropped == []
    for index, arguments in enumerate(values):
        trained = [
            [x for x in one.labels if x != IGNORE_INDEX]
            for one in batch.rows
            if one.example == index
        ]
        text = "".join(labeller.renderer.tokenizer.decode(ids) for ids in trained)
        assert all(
            str(value) in text
            for value in (arguments["city"], arguments["days"], arguments["deep"]["share"])
        )
        assert "It is done." in text and "Call it." not in text


WRITES_IDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.tool_call_id }}{{ m.content }}"
    """{% for call in m.tool_calls or [] %}{{ call.function | tojson }}, "id": "{{ call.id }}"{% endfor %}"""
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_ids_of_tool_calls_do_not_leak_into_the_layout() -> None:
    """A template that writes the id of a call behind its arguments (Mistral's) trains every row's call with its id."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = WRITES_IDS
    labeller = Labeller(
        attach_chat_template(tokenizer, TemplateSettings()), LabelSettings(max_length=None)
    )
    ids = ["abcdefghi", "a1b2c3d4e", "call_4711"]
    examples = [row({"city": "Rome"}, index) for index in range(len(ids))]
    for example, name in zip(examples, ids, strict=True):
        example.messages[1]["tool_calls"][0]["id"] = example.messages[2]["tool_call_id"] = name
    batch = labeller.label(examples)
    assert batch.dropped == [] and [one.turns for one in batch.rows] == [(1, 3)] * len(ids)
    for one, name in zip(batch.rows, ids, strict=True):
        trained = tokenizer.decode([x for x in one.labels if x != IGNORE_INDEX])
        assert trained.count(name) == 1  # the call's; the tool's own message is not trained
