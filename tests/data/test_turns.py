"""Layouts belong to a structure, not to the row they were found on."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.template_tokenizers import tokenizer_for

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Calls f.", "parameters": {"type": "object", "properties": {}}},
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
    labeller = Labeller(attach_chat_template(tokenizer_for(name), TemplateSettings()), LabelSettings(max_length=None))
    values: list[dict[str, Any]] = [
        {"city": "Rome", "days": 3, "deep": {"share": 0.5, "flag": True}},
        {"city": "Oslo", "days": 41, "deep": {"share": 2.25, "flag": True}},
        {"city": "Lima", "days": -7, "deep": {"share": 1.0, "flag": False}},
    ]
    batch = labeller.label([row(arguments, index) for index, arguments in enumerate(values)])
    assert batch.dropped == []
    for index, arguments in enumerate(values):
        trained = [[x for x in one.labels if x != IGNORE_INDEX] for one in batch.rows if one.example == index]
        text = "".join(labeller.renderer.tokenizer.decode(ids) for ids in trained)
        assert all(str(value) in text for value in (arguments["city"], arguments["days"], arguments["deep"]["share"]))
        assert "It is done." in text and "Call it." not in text
