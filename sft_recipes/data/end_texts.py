"""Answers that end in the text of an end token, as data sets of other tools do.

Trained as they stand they teach a model to write that text before it stops. `control_tokens:
strip_end` takes it off, the one edit of a text in this project.
"""

import dataclasses
from collections.abc import Sequence

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.messages import Example, Message
from sft_recipes.response_patterns import PATTERNS


class EndTexts:
    """The texts of end tokens: the known ones, and those of a renderer's own stop tokens."""

    def __init__(self, renderer: ChatRenderer) -> None:
        own = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
        self._texts: Sequence[str] = tuple(dict.fromkeys([*PATTERNS["end_texts"], *own]))

    def at_end_of(self, text: str) -> str | None:
        """The end token's text with which a text ends, whitespace after it aside, or None."""
        stripped = text.rstrip()
        for token in self._texts:
            if stripped.endswith(token):
                return token
        return None

    def strip(self, text: str) -> str:
        """The text without any of them at its end."""
        token = self.at_end_of(text)
        while token is not None:
            text = text.rstrip().removesuffix(token)
            token = self.at_end_of(text)
        return text

    def strip_answers(self, example: Example) -> Example:
        """The example without them at the end of its answers.

        The same object where there are none.
        """
        if example.text is not None:
            text = self.strip(example.text)
            if text == example.text:
                return example
            return dataclasses.replace(example, text=text)
        messages: list[Message] = []
        is_changed = False
        for message in example.messages:
            content = message.get("content")
            if message["role"] == "assistant" and content and self.at_end_of(content) is not None:
                message = {**message, "content": self.strip(content)}
                is_changed = True
            messages.append(message)
        if not is_changed:
            return example
        return dataclasses.replace(example, messages=messages)
