"""The table of row formats: which columns a format has, and how they become messages.

To add one, write a function that makes messages of a row's fields, and a record in `FORMATS` that
names it. Everything else reads this table: detection, settings, errors, `inspect`, `audit` and
training. `docs/how-to/add-a-format.md` goes through it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.reading.calls import expect, text_of
from sft_recipes.data.reading.column_values import is_conversation
from sft_recipes.data.reading.conversations import join_turns, read_turns
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.row_fields import RowFields, new_turn
from sft_recipes.messages import Message


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of a format look, and how they are read.

    `required` and `optional` are its columns, without `system` and `tools`, which may stand beside
    every conversation. `messages` makes the turns of a row, or is None where the column `text` is
    trained as it stands; such a format is never recognised unasked.

    `fits` tells the rows of a format by their values, given by required column, where its columns
    alone may mean something else: a row that does not fit is read as if the format did not exist.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    messages: Callable[[RowFields], list[Message]] | None = None
    fits: Callable[[Mapping[str, Any]], bool] | None = None

    @property
    def other_columns(self) -> tuple[str, ...]:
        """The columns that a row may have beside the required ones."""
        if self.messages is None:
            return self.optional
        return (*self.optional, "system", "tools")


def _instruction(fields: RowFields) -> list[Message]:
    messages = _history(fields)
    instruction = fields.text("instruction")
    context = fields.optional_text("input")
    texts = [text for text in (instruction, context) if text]
    question = new_turn("user", "\n\n".join(texts), "instruction")
    # Some sets keep the whole prompt in `input`; an empty instruction section would teach nothing.
    if instruction:
        question["instruction"] = instruction
        if context:
            question["input"] = context
    return [*messages, question, new_turn("assistant", fields.text("output"), "output")]


def _history(fields: RowFields) -> list[Message]:
    """The turns before the instruction: messages, or pairs of a question and its answer."""
    value = fields.values.get("history")
    if value and is_conversation(value):
        return read_turns(value, "history", fields.keys)
    messages: list[Message] = []
    pairs = expect(list, value or [], "history", "a list of [question, answer] pairs")
    for index, pair in enumerate(pairs):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(place, "not a [question, answer] pair", "write two strings")
        messages.append(new_turn("user", text_of(pair[0], place), place))
        messages.append(new_turn("assistant", text_of(pair[1], place), place))
    return messages


def _prompt_completion(fields: RowFields) -> list[Message]:
    prompt = fields.turns_or_text("prompt", "user")
    completion = fields.turns_or_text("completion", "assistant")
    for message in prompt:
        # Only the completion is trained, unless the data says so of a turn before it.
        if message["train"] is None:
            message["train"] = False
    return join_turns(prompt, completion, fields.keys)


def _messages(fields: RowFields) -> list[Message]:
    return fields.turns("messages")


def _sharegpt(fields: RowFields) -> list[Message]:
    return fields.turns("conversations")


FORMATS: Mapping[str, Format] = {
    # `history`: messages, or pairs of texts.
    "instruction": Format(
        required=("instruction", "output"),
        optional=("input", "history"),
        messages=_instruction,
    ),
    # OpenAI's {role, content}, with tool_calls, reasoning_content, train, weight.
    "messages": Format(
        required=("messages",),
        messages=_messages,
    ),
    # {from, value}, with function_call and observation turns.
    "sharegpt": Format(
        required=("conversations",),
        messages=_sharegpt,
    ),
    # Each side is text or messages; only the completion is trained.
    "prompt_completion": Format(
        required=("prompt", "completion"),
        messages=_prompt_completion,
    ),
    "raw": Format(required=("text",)),
    # What a chat template rendered already: its control tokens are control tokens.
    "rendered": Format(required=("text",)),
}
# Text as it stands: never assumed, always asked for.
TEXT_FORMATS = tuple(name for name, format in FORMATS.items() if format.messages is None)
# A question and an answer in columns of their own.
PAIR_FORMATS = ("instruction", "prompt_completion")
