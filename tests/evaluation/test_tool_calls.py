"""Tool calls compared as the template writes them: JSON, XML and Python, on trl's copies of real
templates."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.data.chat_templates import LOOK_UP, ChatRenderer, load_chat_template
from sft_recipes.errors import InputError
from sft_recipes.evaluation.answering import control_tokens
from sft_recipes.evaluation.evaluator import evaluate
from sft_recipes.evaluation.tool_calls import answer_text, calls_match
from sft_recipes.messages import Example
from tests.data.template_tokenizers import tokenizer_for

TEMPLATES = [
    "deepseekv3",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "nemotron_3_nano",
    "glm4moe",
    "lfm2_v2",
    "gemma4",
    "llama3_1",
    "gptoss",
]
# These have no place for a text beside the call, or for two calls.
ONE_CALL_ONLY = ("llama3_1", "gptoss")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALL = call("look_up", word="blue sky", n=3, options={"b": 1, "a": [1, 2]})
OTHER_ORDER = call("look_up", options={"a": [1, 2], "b": 1}, n=3, word="blue sky")
WRONG = {
    "value": call("look_up", word="blue", n=3, options={"b": 1, "a": [1, 2]}),
    "number": call("look_up", word="blue sky", n=4, options={"b": 1, "a": [1, 2]}),
    "nested": call("look_up", word="blue sky", n=3, options={"b": 1, "a": [2, 1]}),
    "name": call("look_down", word="blue sky", n=3, options={"b": 1, "a": [1, 2]}),
    "missing": call("look_up", word="blue sky", options={"b": 1, "a": [1, 2]}),
    "extra": call("look_up", word="blue sky", n=3, options={"b": 1, "a": [1, 2]}, m=1),
}


def example(*calls: dict[str, Any], content: str = "") -> Example:
    answer = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return Example(
        [{"role": "user", "content": "What is it?"}, answer], "a.jsonl", 0, line=1, tools=[LOOK_UP]
    )


def matches(renderer: ChatRenderer, reference: Example, response: str) -> bool | None:
    return calls_match(renderer, reference, response, control_tokens(renderer.tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_compared_in_the_templates_own_format(name: str) -> None:
    """The same call matches with its arguments in any order; another name, value, type or number of
    them does not."""
    renderer, reference = ChatRenderer(tokenizer_for(name)), example(CALL)

    def said(*calls: dict[str, Any], content: str = "") -> str:
        return answer_text(renderer, reference, example(*calls, content=content).messages[-1])

    assert CALL["function"]["name"] in said(CALL) and "3" in said(CALL)
    assert matches(renderer, reference, said(CALL)) is True
    assert matches(renderer, reference, said(OTHER_ORDER)) is True
    assert {
        kind: matches(renderer, reference, said(wrong)) for kind, wrong in WRONG.items()
    } == dict.fromkeys(WRONG, False)
    assert matches(renderer, reference, "It is blue.") is False
    assert matches(renderer, reference, "") is False
    assert matches(renderer, reference, said(CALL) + " It is blue.") is True
    if name not in ONE_CALL_ONLY:
        assert matches(renderer, reference, said(CALL, content="Let me look.")) is True
        assert matches(renderer, reference, said(CALL, CALL)) is False
        assert (
            matches(renderer, example(CALL, WRONG["name"]), said(OTHER_ORDER, WRONG["name"]))
            is True
        )
        assert matches(renderer, example(CALL, WRONG["name"]), said(CALL)) is False


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (
            '<tool_call>\n{"name": "look_up", "arguments": {"word": "sky", "n": 1}}\n</tool_call>',
            True,
        ),
        ('<tool_call>{"arguments":{"n":1,"word":"sky"},"name":"look_up"}</tool_call>', True),
        (
            '<think>{"n": 2}?</think>\n<tool_call>{"name":"look_up","arguments":{"word":"sky","n":1}}</tool_call>',
            True,
        ),
        (
            '<tool_call>\n{"name": "look_up", "arguments": {"word": "sky", "n": "1"}}\n</tool_call>',
            False,
        ),
        ('<tool_call>\n{"name": "look_up", "arguments": {"word": "sky", "n": 1}}', False),
        ('{"name": "look_up", "arguments": {"word": "sky", "n": 1}}', False),
        (
            '<tool_call>\n{"name": "look_up", "arguments": {"word": "sky", "n": 1}\n</tool_call>',
            False,
        ),
        ("<tool_call>" + "[" * 5000, False),
        (
            '<tool_call>{"name":"look_up","arguments":{"word":"sky","n":1}}</tool_call><tool_call>',
            False,
        ),
    ],
)
def test_qwens_format_by_hand(response: str, match: bool) -> None:
    """Spaces and key order are free; types, both markers and well-formed JSON are not; thoughts
    before do not count."""
    assert (
        matches(
            ChatRenderer(tokenizer_for("qwen3")),
            example(call("look_up", word="sky", n=1)),
            response,
        )
        is match
    )


def test_rows_without_calls_have_no_verdict() -> None:
    """None where the reference makes no call, whatever the answer does."""
    row = Example(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a.jsonl", 0
    )
    assert calls_match(None, row, "<tool_call>{}</tool_call>", []) is None


def without_tools() -> ChatRenderer:
    """A renderer whose template has no place for tools."""
    tokenizer = tokenizer_for("qwen2_5")
    tokenizer.chat_template = load_chat_template("chatml")
    return ChatRenderer(tokenizer)


def test_templates_without_a_place_for_calls_are_refused_by_row() -> None:
    """Where the template refuses the turn, or training could not verify it, the row is named."""
    message = r"^a\.jsonl:1: messages\[1\]\.tool_calls: the template refuses this row: .* Fix: "
    with pytest.raises(InputError, match=message):
        answer_text(without_tools(), example(CALL), example(CALL).messages[-1])
    llama, beside = ChatRenderer(tokenizer_for("llama3_1")), example(CALL, content="Let me look.")
    with pytest.raises(InputError, match=r"the template rewrote the answer"):
        answer_text(llama, beside, beside.messages[-1])


def test_calls_reach_the_evaluation(make_model) -> None:
    """The reference is the call as the template writes it: an equal answer matches exactly and
    leaks nothing."""
    tokenizer = tokenizer_for("qwen2_5")
    renderer = ChatRenderer(tokenizer)
    text = '<tool_call>\n{"name": "look_up", "arguments": {"word": "sky"}}\n</tool_call>'
    plain = Example(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "a.jsonl",
        1,
        line=2,
    )
    model = make_model(max_position_embeddings=4096)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model.generate = lambda input_ids, **_: input_ids.new_tensor(
        [[*row, *ids] for row in input_ids.tolist()]
    )
    settings: dict[str, Any] = {"max_new_tokens": 99, "batch_size": 1, "progress": False}
    first, second = evaluate(
        model, renderer, [example(call("look_up", word="sky")), plain], **settings
    ).rows
    assert (first["reference"], first["response"]) == (text, text)
    assert (
        first["tool_call_exact"],
        first["exact_match"],
        first["length_ratio"],
        first["flags"],
    ) == (
        True,
        True,
        1.0,
        [],
    )
    assert (second["tool_call_exact"], second["flags"]) == (None, ["special_token_leak"])


def test_reasoning_before_a_call_is_not_part_of_the_reference(make_model) -> None:
    """A reasoning model that thinks otherwise and makes the same call gives the reference's
    answer."""
    tokenizer = tokenizer_for("qwen3")
    thought = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "One.",
        "tool_calls": [call("look_up", word="sky")],
    }
    reference = Example([{"role": "user", "content": "a"}, thought], "a.jsonl", 0, tools=[LOOK_UP])
    text = '<tool_call>\n{"name": "look_up", "arguments": {"word": "sky"}}\n</tool_call>'
    ids = [*tokenizer("<think>\nTwo.\n</think>\n\n" + text)["input_ids"], tokenizer.eos_token_id]
    model = make_model(max_position_embeddings=4096)
    model.generate = lambda input_ids, **_: input_ids.new_tensor(
        [[*row, *ids] for row in input_ids.tolist()]
    )
    settings: dict[str, Any] = {"max_new_tokens": 99, "batch_size": 1, "progress": False}
    (row,) = evaluate(model, ChatRenderer(tokenizer), [reference], **settings).rows
    assert (row["reference"], row["response"], row["flags"]) == (text, text, [])
    assert (row["tool_call_exact"], row["exact_match"]) == (True, True)


def test_all_rows_that_cannot_be_compared_are_named_before_anything_is_generated() -> None:
    """Two bad rows are two problems of one error, and the model is not asked."""
    renderer, raw = without_tools(), Example([], "raw.txt", 0, line=7, text="once")
    with pytest.raises(InputError) as error:
        evaluate(None, renderer, [example(CALL), raw], max_new_tokens=4, batch_size=1)
    assert [problem.where for problem in error.value.problems] == ["a.jsonl:1", "raw.txt:7"]
