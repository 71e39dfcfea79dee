"""TRL 1.16.0: `SFTTrainer`, as handbook, open-r1 and TRL's own scripts use it.

Read in its `trainer/sft_trainer.py` (`_prepare_dataset`). What older versions do differently is not
followed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    NotComputed,
    TheirOutcome,
    TheirRow,
    cut,
    masked,
    plain_turns,
    rules_from,
    shared_length,
)
from sft_recipes.messages import Example


@dataclass(frozen=True, slots=True)
class TrlRules:
    """Keys of a config; names and defaults are TRL's.

    `format`: that of the rows in this project's words, since TRL decides by their columns; their
    `turns` where prompt and completion are lists of messages, not texts. `chat_template`: its text.
    """

    format: str = "messages"
    turns: bool = False
    chat_template: str | None = None
    eos_token: str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    max_length: int | None = 1024

    @classmethod
    def from_config(cls, config: Mapping[str, Any], number: int = 0) -> "TrlRules":
        """The rules of a config, the same for all of its data sets."""
        rules = rules_from(cls, config)
        # Its name in older versions.
        length = config.get("max_length", config.get("max_seq_length", rules.max_length))
        return replace(rules, max_length=length)

    @property
    def tool(self) -> str:
        """The tool's name."""
        return "TRL"

    def prepare(self, tokenizer: Any) -> None:
        """The config's EOS and, where it holds one as text, its chat template."""
        if self.eos_token is not None:
            tokenizer.eos_token = self.eos_token
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template

    def row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """What TRL makes of an example."""
        if self.assistant_only_loss and self.format in ("raw", "rendered"):
            return DroppedThere("assistant_only_loss takes conversations")
        try:
            row = self._whole_row(example, tokenizer)
        except TEMPLATE_ERRORS as error:
            return DroppedThere(f"it stops ({str(error).partition('. ')[0]})")
        if isinstance(row, TheirRow):
            row = cut(row, self.max_length)
            if not row.trained_tokens:
                return DroppedThere(f"nothing of it is trained within max_length {self.max_length}")
        return row

    def _whole_row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        if example.text is not None:
            ids = tokenizer(_with_eos(example.text, tokenizer))["input_ids"]
            return TheirRow(ids, list(ids))
        if self.format == "prompt_completion" and not self.turns:
            prompt, completion = (message["content"] for message in example.messages)
            ids = tokenizer(prompt + _with_eos(completion, tokenizer))["input_ids"]
            return self._with_labels(ids, tokenizer(prompt)["input_ids"])
        if self.format in ("messages", "prompt_completion"):
            return self._conversation(example, tokenizer)
        if self.format == "sharegpt":
            return NotComputed("TRL hands `human` and `gpt` to the template as they stand")
        return NotComputed(f"TRL reads no rows of the format {self.format!r} by itself")

    def _conversation(self, example: Example, tokenizer: Any) -> TheirRow:
        """A conversation, all of it trained unless the settings say otherwise."""
        turns = plain_turns(example)
        template = None
        if self.assistant_only_loss:
            template = _training_template(tokenizer)
        rendered = tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=self.assistant_only_loss,
        )
        prompt: list[int] = []
        if self.format == "prompt_completion":
            completion = next(i for i in range(len(turns)) if example.is_trainable(i))
            prompt = tokenizer.apply_chat_template(
                turns[:completion],
                chat_template=template,
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        return self._with_labels(rendered["input_ids"], prompt, rendered.get("assistant_masks"))

    def _with_labels(
        self, ids: list[int], prompt: Sequence[int], mask: Sequence[int] | None = None
    ) -> TheirRow:
        """A row whose prompt is not trained, unless `completion_only_loss` is false.

        `mask`: 1 for each token of the assistant's, None where all are trained.
        """
        begin = 0
        if self.completion_only_loss is not False:
            begin = shared_length(prompt, ids)
        trained = [p for p in range(begin, len(ids)) if mask is None or mask[p]]
        return TheirRow(ids, masked(ids, trained))


def _training_template(tokenizer: Any) -> str | None:
    """The template by which TRL tells the assistant's tokens; raises ValueError where it has none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    return get_training_chat_template(tokenizer)


def _with_eos(text: str, tokenizer: Any) -> str:
    if text.endswith(tokenizer.eos_token):
        return text
    return text + tokenizer.eos_token
