"""Whether an answer makes the tool calls of its reference, however the chat template writes calls.

Templates write calls as JSON between markers, as bare JSON, as XML, or as Python. Nothing here
knows those formats: the reference's calls are rendered by the template itself, and the answer has
to hold the same words, JSON compared by value. Arguments may stand in any order: they are rendered
in the one in which the answer names them.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.data.fitting import fit_messages
from sft_recipes.data.spans import turn_span
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.response_patterns import literal_pattern

_NAME = re.compile(r"\w+")
# A bracket that may open JSON, or everything up to the next one or to white space.
_PIECE = re.compile(r"[{\[]|[^\s{\[]+")


def answer_text(renderer: Any, example: Example, answer: Message) -> str:
    """What the model has to generate to give `answer` in the last place, without its end.

    `renderer` is the `ChatRenderer` of training. Raises InputError where the template has no clear
    place for it.
    """
    answer = fit_messages([answer], renderer.needs)[0]
    messages = [*example.messages[:-1], answer]
    turn = len(example.messages) - 1
    try:
        prompt = renderer.render(messages[:-1], example.tools, True)
        text = renderer.render(messages, example.tools)
        asked = dataclasses.replace(example, messages=messages)
        span = turn_span(renderer, asked, turn, prompt, text, mask_empty_think=True)
    except TEMPLATE_ERRORS as error:
        span = f"the template refuses this row: {error}"
    if isinstance(span, str):
        fix = "evaluate with a template that has a place for tool calls, or remove the row"
        raise InputError(Problem(example.where, f"messages[{turn}].tool_calls", span, fix))
    return span.text[span.start : span.end].removesuffix(span.terminator)


def calls_match(
    renderer: Any, example: Example, response: str, control_tokens: Sequence[str]
) -> bool | None:
    """Whether `response` makes exactly the tool calls of the example's last message.

    None where that makes none. What stands around the calls does not count, unless it begins as a
    call does. Raises as `answer_text`.
    """
    calls = example.messages[-1].get("tool_calls")
    if not calls:
        return None
    answer = {"role": "assistant", "content": "", "tool_calls": _ordered_as(response, calls)}
    expected = _words(answer_text(renderer, example, answer), control_tokens)
    given = _words(response, control_tokens)
    beginnings = list(map(_beginning, given))
    first = _beginning(expected[0])
    if beginnings.count(first) != list(map(_beginning, expected)).count(first):
        return False
    start = beginnings.index(first) if first in beginnings else 0
    return given[start : start + len(expected)] == expected


def _ordered_as(response: str, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls with their arguments in the order in which the response names them."""
    ordered = []
    names = _NAME.findall(response)
    for call in calls:
        function = call["function"]
        # A call's arguments stand behind its name.
        if function["name"] in names:
            names = names[names.index(function["name"]) + 1 :]
        arguments = function["arguments"]
        if isinstance(arguments, str):  # the form that some templates need
            arguments = json.loads(arguments)
        # An argument that the answer does not name comes last: the answer is wrong anyway.
        position = {name: at for at, name in reversed(list(enumerate(names)))}
        keys = sorted(arguments, key=lambda name: position.get(name, len(names)))
        sorted_arguments = {name: arguments[name] for name in keys}
        ordered.append({**call, "function": {**function, "arguments": sorted_arguments}})
    return ordered


def _words(text: str, control_tokens: Sequence[str]) -> list[str]:
    """The words, control tokens and JSON objects and lists of a text, JSON written in one way."""
    text = literal_pattern(control_tokens).sub(r" \g<0> ", text)
    words = []
    match = _PIECE.search(text)
    while match:
        word, end = _word_at(text, match)
        words.append(word)
        match = _PIECE.search(text, end)
    return words


def _word_at(text: str, match: re.Match[str]) -> tuple[str, int]:
    """The JSON value that begins at a match, or the word that it is, and where that ends."""
    if match.group() in ("{", "["):
        try:
            value, end = json.JSONDecoder().raw_decode(text, match.start())
            return json.dumps(value, sort_keys=True), end
        except (ValueError, RecursionError):
            pass  # a bracket that opens no JSON is a word like any other
    return match.group(), match.end()


def _beginning(word: str) -> str:
    """What tells where a call begins: a bracket without what follows, or the whole word."""
    return word[0] if word[0] in "{[" else word
