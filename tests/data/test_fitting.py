"""Conversations are brought into the form that a template reads; where it reads them as they are, nothing changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.fitting import TemplateNeeds, fit_messages
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.conftest import build_tokenizer
from tests.data.template_tokenizers import template_names, tokenizer_for

TURN = "{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
CALLS = "{% for c in m.tool_calls or [] %}CALL%s{% endfor %}{{ '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def renderer_for(call: str, check: str = "") -> ChatRenderer:
    """A template that writes calls in one way, and refuses what it does not like."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        + check
        + TURN
        + CALLS.replace("%s", call)
        + "{% endfor %}"
        + PROMPT
    )
    return attach_chat_template(tokenizer, TemplateSettings())


def conversation(**call: Any) -> list[dict[str, Any]]:
    """A call, its result and the answer to it."""
    function = {"name": "look_up", "arguments": {"word": "blue", "deep": {"n": 3, "null": None}}}
    result = {"role": "tool", "content": "a colour"}
    if "id" in call:
        result["tool_call_id"] = call["id"]
    return [
        {"role": "user", "content": "What is blue?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function, **call}],
        },
        result,
        {"role": "assistant", "content": "A colour."},
    ]


def trained(renderer: ChatRenderer, messages: list[dict[str, Any]]) -> str:
    """The trained text of all rows of a conversation."""
    batch = Labeller(renderer, LabelSettings(max_length=None)).label([Example(messages, "rows", 0)])
    assert not batch.dropped
    texts = [
        renderer.tokenizer.decode([x for x in row.labels if x != IGNORE_INDEX])
        for row in batch.rows
    ]
    return "".join(texts)


NINE = (
    "{% for c in m.tool_calls or [] %}{% if not c.id or c.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{% endfor %}"
)
BOTH = "{% if m.role == 'tool' and m.tool_call_id|length != 9 %}{{ raise_exception('nine') }}{% endif %}"


@pytest.mark.parametrize(
    "call", [{}, {"id": "call_abc123"}, {"id": "abcDEF123"}, {"id": "chatcmpl-tool-0123456789"}]
)
def test_ids_fit_a_template_that_wants_nine_characters(call: dict[str, Any]) -> None:
    """The id in the call is the id in the result, nine letters and digits; one that fits already stays."""
    written = "{{ c.function | tojson }}#{{ c.id }}#"
    renderer = renderer_for(
        written, NINE + BOTH + "{% if m.tool_call_id %}#{{ m.tool_call_id }}#{% endif %}"
    )
    assert renderer.needs.short_ids
    messages = fit_messages(conversation(**call), renderer.needs)
    made = messages[1]["tool_calls"][0]["id"]
    assert messages[2]["tool_call_id"] == made and len(made) == 9 and made.isalnum()
    if call.get("id") == "abcDEF123":
        assert made == "abcDEF123"
    assert f"#{made}#" in trained(renderer, conversation(**call))


def test_parallel_calls_keep_their_results_apart() -> None:
    """Two calls without ids get different ones, and results without ids take them in order."""
    needs = TemplateNeeds(writes_calls=True, short_ids=True)
    messages = conversation()
    messages[1]["tool_calls"] = messages[1]["tool_calls"] * 2
    messages.insert(3, {"role": "tool", "content": "another"})
    fitted = fit_messages(messages, needs)
    ids = [call["id"] for call in fitted[1]["tool_calls"]]
    assert len(set(ids)) == 2 and [message["tool_call_id"] for message in fitted[2:4]] == ids


def test_arguments_are_text_where_the_template_joins_text() -> None:
    """A template that concatenates arguments gets JSON text; one that would print a Python mapping does, too."""
    for written in (
        "{{ '(' + c.function.name + c.function.arguments + ')' }}",
        "({{ c.function.name }}{{ c.function.arguments }})",
    ):
        renderer = renderer_for(written)
        assert renderer.needs.arguments_as_text
        text = trained(renderer, conversation())
        arguments = text.partition("look_up")[2].partition(")")[0]
        assert json.loads(arguments) == {"word": "blue", "deep": {"n": 3, "null": None}}


INLINE = '<tool_call>\n{"name": "look_up", "arguments": {"word": "blue"}}\n</tool_call>'


@pytest.mark.parametrize("lead", ["", "Let me see.\n"])
def test_calls_written_inline_give_the_ids_of_calls(lead: str) -> None:
    """`<tool_call>` inside the text and `tool_calls` beside it are one thing where the template writes that tag."""
    renderer = attach_chat_template(tokenizer_for("qwen2_5"), TemplateSettings())
    labeller = Labeller(renderer, LabelSettings())
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "blue"}}}
    question = {"role": "user", "content": "What is blue?"}
    result = {"role": "tool", "content": "a colour"}
    answer = {"role": "assistant", "content": "A colour."}
    apart = [
        question,
        {"role": "assistant", "content": lead.strip(), "tool_calls": [call, call]},
        result,
        answer,
    ]
    inline = [
        question,
        {"role": "assistant", "content": f"{lead}{INLINE}\n{INLINE}"},
        result,
        answer,
    ]
    wrapped = [
        *inline[:2],
        {"role": "tool", "content": "<tool_response>\na colour\n</tool_response>"},
        answer,
    ]
    rows = [
        labeller.label([Example(messages, "rows", 0)]).rows for messages in (apart, inline, wrapped)
    ]
    assert rows[0][0].input_ids == rows[1][0].input_ids == rows[2][0].input_ids
    assert rows[0][0].labels == rows[1][0].labels == rows[2][0].labels


@pytest.mark.parametrize(
    "content",
    [
        "<tool_call>\nno json\n</tool_call>",
        f"{INLINE} and more",
        '<tool_call>{"name": 1}</tool_call>',
    ],
)
def test_text_that_is_no_call_stays_text(content: str) -> None:
    """What cannot be read as a call, or goes on after one, is text like any other and is never lost."""
    renderer = attach_chat_template(tokenizer_for("qwen2_5"), TemplateSettings())
    messages = [
        {"role": "user", "content": "What is blue?"},
        {"role": "assistant", "content": content},
    ]
    assert fit_messages(messages, renderer.needs) is messages
    assert content in trained(renderer, messages)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_reasoning_is_trained_inline_or_apart(name: str, inline: bool) -> None:
    """Reasoning in its own field and in `<think>` tags is one thing where the template has a place for it."""
    renderer = attach_chat_template(tokenizer_for(name), TemplateSettings())
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "Counting up."}
    if inline:
        answer = {"role": "assistant", "content": "<think>\nCounting up.\n</think>\n\nFour."}
    text = trained(renderer, [{"role": "user", "content": "Two and two?"}, answer])
    assert text.count("Counting up.") == 1 and text.count("Four.") == 1


def test_conversations_that_fit_are_left_alone() -> None:
    """No template changes a conversation of plain text: the very same object comes back."""
    plain = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    for name in template_names():
        tokenizer = tokenizer_for(name)
        assert fit_messages(plain, ChatRenderer(tokenizer).needs) is plain
