"""Whether an answer makes the tool calls of its reference, in whatever way the chat template writes calls.

Templates write calls as JSON between markers, as bare JSON, as XML, or as Python. Nothing here knows those formats: the
reference's calls are rendered by the template itself, and the answer has to hold the same words, JSON compared by
value. Arguments may stand in any order: they are rendered in the one in which the answer names them.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sft_recipes.data.fitting import fit_messages
from sft_recipes.data.spans import turn_span
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.response_patterns import literal_pattern


def answer_text(renderer: Any, example: Example, answer: Message) -> str:
    """The text that the model has to generate to give `answer` in the last place of the conversation, without its end.

    `renderer` is the `ChatRenderer` of training. Raises InputError where the template has no clear place for it.
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
    """Whether `response` makes exactly the tool calls of the example's last message; None where that makes none.

    What stands around the calls does not count, unless it begins as a call does. Raises as `answer_text`.
    """
    if not (calls := example.messages[-1].get("tool_calls")):
        return None
    ordered, words = [], re.findall(r"\w+", response)
    for call in calls:
        function = call["function"]
        if function["name"] in words:
            words = words[words.index(function["name"]) + 1 :]
        # An argument that the answer does not name may come last: the answer is wrong anyway.
        arguments = function["arguments"]
        if isinstance(arguments, str):  # the form that some templates need
            arguments = json.loads(arguments)
        arguments = sorted(arguments.items(), key=lambda item: (*words, item[0]).index(item[0]))
        ordered.append({**call, "function": {**function, "arguments": dict(arguments)}})
    wanted = answer_text(
        renderer, example, {"role": "assistant", "content": "", "tool_calls": ordered}
    )
    expected, given = (_words(text, control_tokens) for text in (wanted, response))
    kinds, opening = list(map(_kind, given)), _kind(expected[0])
    start = kinds.index(opening) if opening in kinds else 0
    as_many = kinds.count(opening) == list(map(_kind, expected)).count(opening)
    return as_many and given[start : start + len(expected)] == expected


def _words(text: str, control_tokens: Sequence[str]) -> list[str]:
    """The words, control tokens and JSON objects and lists of a text, JSON written in one way."""
    text = literal_pattern(control_tokens).sub(r" \g<0> ", text)
    found, position = [], 0
    while match := re.compile(r"[{\[]|[^\s{\[]+").search(text, position):
        piece, position = match.group(), match.end()
        if piece in "{[":
            with suppress(
                ValueError, RecursionError
            ):  # a bracket that opens no JSON is a word like any other
                value, position = json.JSONDecoder().raw_decode(text, match.start())
                piece = json.dumps(value, sort_keys=True)
        found.append(piece)
    return found


def _kind(word: str) -> str:
    return word[0] if word[0] in "{[" else word
