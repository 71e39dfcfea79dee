"""Which examples may be trained, and in what form they are rendered."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.encoding import Markers, all_text
from sft_recipes.data.end_texts import EndTexts
from sft_recipes.data.fitting import fit_messages
from sft_recipes.data.labelled_rows import DroppedRow, LabelledBatch
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings


@dataclass(frozen=True, slots=True)
class AdmittedRow:
    """An example as it is rendered, and its position in the batch.

    `markers` are set where control tokens in its text were marked.
    """

    position: int
    example: Example
    markers: Markers | None = None


class Admission:
    """Admits the examples that may be trained, in the form that the template needs."""

    def __init__(self, renderer: ChatRenderer, settings: LabelSettings) -> None:
        self.end_texts = EndTexts(renderer)
        self._renderer = renderer
        self._settings = settings
        self._strips_ends = settings.control_tokens == "strip_end"

    def admit(self, examples: Sequence[Example], batch: LabelledBatch) -> list[AdmittedRow]:
        """The examples that may be trained, in their order; the others go to `batch.dropped`."""
        admitted: list[AdmittedRow] = []
        for position, original in enumerate(examples):
            if self._strips_ends and self.end_texts.strip_answers(original) is not original:
                batch.stripped.add(position)
            example = self.for_template(original)
            row = self._admit(position, example, is_stripped=position in batch.stripped)
            if isinstance(row, DroppedRow):
                batch.dropped.append(row)
            else:
                admitted.append(row)
        return admitted

    def for_template(self, example: Example) -> Example:
        """The example as it is rendered.

        The recipe's system prompt comes first unless the example brings its own, reasoning and
        calls have the form that the template needs, and where the recipe says so no text of an end
        token stands behind an answer.
        """
        if self._strips_ends:
            example = self.end_texts.strip_answers(example)
        if example.text is not None:
            return example
        messages = fit_messages(example.messages, self._renderer.needs)
        train = example.train
        prompt = self._settings.system_prompt
        if prompt and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": prompt}, *messages]
            if train:
                train = (False, *train)
        if messages is example.messages:
            return example
        return dataclasses.replace(example, messages=messages, train=train)

    def trained_turns(self, example: Example) -> list[int]:
        """The indices of the assistant messages that are trained."""
        turns = [index for index in range(len(example.messages)) if example.is_trainable(index)]
        if self._settings.train_on == "last_assistant":
            return turns[-1:]
        return turns

    def _admit(
        self, position: int, example: Example, is_stripped: bool
    ) -> AdmittedRow | DroppedRow:
        if example.text is None:
            refusal = self._refusal(position, example, is_stripped)
            if refusal is not None:
                return refusal
        if example.rendered:
            return AdmittedRow(position, example)
        text = all_text(example.messages, example.tools, example.text)
        token = self._renderer.encoder.first_control_token(text)
        if token is None:
            return AdmittedRow(position, example)
        return self._with_control_token(position, example, token, text)

    def _refusal(self, position: int, example: Example, is_stripped: bool) -> DroppedRow | None:
        """Why the data or the recipe keeps a conversation from being trained, or None."""
        turns = self.trained_turns(example)
        if not turns:
            detail = "no assistant turn of this row may be trained"
            return DroppedRow(position, "no_trained_turn", detail)
        asked = example.asks_to_train_others
        if asked is not None and self._settings.train_on != "all":
            what = f"messages[{asked}].train asks to train a {example.messages[asked]['role']} turn"
            detail = f"{what}; set train_on: all, or remove the flag"
            return DroppedRow(position, "asks_to_train_others", detail)
        if is_stripped:
            for index in turns:
                message = example.messages[index]
                if not message["content"] and not message.get("tool_calls"):
                    detail = f"messages[{index}] is nothing but the text of an end token"
                    return DroppedRow(position, "empty_answer", detail)
        return None

    def _with_control_token(
        self, position: int, example: Example, token: str, text: str
    ) -> AdmittedRow | DroppedRow:
        """What the recipe's `control_tokens` makes of a row whose text spells such a token."""
        policy = self._settings.control_tokens
        detail = f"the text spells the control token {token!r}"
        if policy == "error":
            fix = (
                "clean the row, or set control_tokens to neutralize (the text stays, as text) "
                "or drop"
            )
            raise InputError(Problem(example.where, "messages", detail, fix))
        if policy == "drop":
            return DroppedRow(position, "control_tokens", detail)
        if example.text is not None:
            # Raw text with control tokens is either rendered already or broken; cut at marks it
            # would teach neither.
            fix = (
                "if a chat template rendered it already, set `format: rendered`, "
                "else control_tokens: drop"
            )
            return DroppedRow(position, "control_tokens", f"{detail}; {fix}")
        encoder = self._renderer.encoder
        markers = encoder.markers_for(text)
        marked = dataclasses.replace(
            example,
            messages=encoder.mark(example.messages, markers),
            tools=encoder.mark(example.tools, markers),
        )
        return AdmittedRow(position, marked, markers)
