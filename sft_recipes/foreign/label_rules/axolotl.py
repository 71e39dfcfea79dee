"""axolotl 0.19.0: the data set types `alpaca`, `chat_template` and `completion`.

Read in its `prompt_tokenizers.py`, `prompters.py`, `prompt_strategies/chat_template.py` and
`utils/data/utils.py`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    NotComputed,
    TheirOutcome,
    TheirRow,
    as_instruction,
    cut,
    masked,
    plain_turns,
    rules_from,
    shared_length,
)
from sft_recipes.messages import Example, Message
from sft_recipes.upstream.templates import trl_chat_template

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
# Names of axolotl's templates, and TRL's file of a template that writes the same conversation.
SAME_AS_TRL = {
    "cohere": "cohere",
    "deepseek_v3": "deepseekv3",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "gemma3n": "gemma3",
    "llama3": "llama3",
    "qwen_25": "qwen2_5",
    "qwen3": "qwen3",
}
_FALLBACK = "tokenizer_default_fallback_"
_ROLES = {"human": "user", "gpt": "assistant"}
# A turn is found by what differs in the rendering when one of these stands in its place; no two
# begin or end alike.
_PROBES = ("[[dummy_message]]", "zzdummymessagezz")
# So many tokens may stand between the end of a content and the token that ends the turn.
_LONGEST_GAP = 3


@dataclass(frozen=True, slots=True)
class AxolotlRules:
    """Keys of a config and of one of its data sets; names and defaults are axolotl's."""

    type: str = "chat_template"
    chat_template: str = "tokenizer_default"
    chat_template_jinja: str | None = None
    train_on_inputs: bool = False
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: str = "turn"
    train_on_eot: str | None = None
    eot_tokens: tuple[str, ...] | None = None
    message_field_training: str | None = None
    sequence_len: int = 512
    excess_length_strategy: str = "drop"
    special_tokens: Mapping[str, Any] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], number: int = 0) -> "AxolotlRules":
        """The rules for data set `number` of a config."""
        return rules_from(cls, config["datasets"][number], config)

    @property
    def tool(self) -> str:
        """The tool's name."""
        return "axolotl"

    def prepare(self, tokenizer: Any) -> None:
        """The config's BOS and EOS take the place of the tokenizer's own."""
        for name in ("bos_token", "eos_token"):
            token = (self.special_tokens or {}).get(name)
            if token is not None:
                tokenizer.add_special_tokens({name: token})

    def row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """What axolotl makes of an example."""
        if self.type in ("alpaca", "alpaca:instruct"):
            row = self._alpaca_row(example, tokenizer)
        elif self.type == "completion":
            row = self._text_row(example, tokenizer)
        elif self.type == "chat_template":
            row = self._chat_row(example, tokenizer)
        else:
            row = NotComputed(f"axolotl's type {self.type!r} is not known here")
        if not isinstance(row, TheirRow) or len(row.input_ids) <= self.sequence_len:
            return row
        if self.excess_length_strategy == "truncate":
            return cut(row, self.sequence_len)
        return DroppedThere(f"{len(row.input_ids)} tokens, sequence_len is {self.sequence_len}")

    # -- texts -------------------------------------------------------------------------------------

    def _alpaca_row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """Prompt and answer are encoded one by one, and EOS follows the answer."""
        row = as_instruction(example)
        if row is None:
            return NotComputed("axolotl's type 'alpaca' reads an instruction and its output")
        prompt = tokenizer(row.alpaca_prompt)["input_ids"]
        answer = _ending_in_eos(row.output, tokenizer)
        if answer[0] == tokenizer.bos_token_id:
            answer = answer[1:]
        ids = prompt + answer
        begin = 0 if self.train_on_inputs else len(prompt)
        return TheirRow(ids, masked(ids, range(begin, len(ids))))

    def _text_row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        if example.text is None:
            return NotComputed("axolotl's type 'completion' reads a column of text")
        ids = _ending_in_eos(example.text, tokenizer)
        if len(ids) > self.sequence_len:
            return NotComputed(f"axolotl divides it into rows of {self.sequence_len} tokens")
        return TheirRow(ids, list(ids))

    # -- conversations -----------------------------------------------------------------------------

    def _template(self, tokenizer: Any) -> str | DroppedThere | NotComputed:
        """The text of the template."""
        name = self.chat_template
        if name.startswith(_FALLBACK):
            name = "tokenizer_default" if tokenizer.chat_template else name.removeprefix(_FALLBACK)
        if name == "jinja" and self.chat_template_jinja:
            return self.chat_template_jinja
        if name == "tokenizer_default":
            return tokenizer.chat_template or DroppedThere("the tokenizer has no chat template")
        if name == "chatml":
            return _CHATML
        if name in SAME_AS_TRL:
            return trl_chat_template(SAME_AS_TRL[name])
        return NotComputed(f"axolotl's template {name!r} is not known here")

    def _chat_row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        template = self._template(tokenizer)
        if not isinstance(template, str):
            return template
        turns = plain_turns(example)

        def render(turns: Sequence[Message]) -> str:
            return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)

        try:
            text = render(turns)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            rendered = _RenderedTurns(turns, text, encoded["offset_mapping"], render)
            ids = encoded["input_ids"]
            ends = self._ends(tokenizer, template)
            return TheirRow(ids, masked(ids, self._trained(example, rendered, ids, ends)))
        except TEMPLATE_ERRORS as error:
            return DroppedThere(f"its template refuses the row ({error})")

    def _ends(self, tokenizer: Any, template: str) -> list["_EndTokens"]:
        """Which tokens end a turn, and after which turns they are trained."""
        end_of_turn = self.eot_tokens or (tokenizer.eos_token,)
        ids: set[int] = set()
        for token in end_of_turn:
            encoded = tokenizer.encode(token, add_special_tokens=False)
            is_written = token in template or end_of_turn == (tokenizer.eos_token,)
            if is_written and len(encoded) == 1:
                ids.update(encoded)
        return [
            _EndTokens(self.train_on_eot or self.train_on_eos, ids),
            _EndTokens(self.train_on_eos, {tokenizer.eos_token_id}),
        ]

    def _trained(
        self,
        example: Example,
        rendered: "_RenderedTurns",
        ids: Sequence[int],
        ends: Sequence["_EndTokens"],
    ) -> set[int]:
        """The positions of a conversation that are trained."""
        trained: set[int] = set()
        last: dict[int, int] = {}
        for index in range(len(rendered.turns)):
            is_trained = self._trains(example, index)
            span = None
            if is_trained or any(end.option == "all" for end in ends):
                span = rendered.span(index)
            if span is None:
                continue
            if is_trained:
                trained.update(span)
            for number, end in enumerate(ends):
                position = end.find(ids, span.stop)
                if position is not None:
                    last[number] = position
                    if end.option == "all" or (end.option == "turn" and is_trained):
                        trained.add(position)
        for number, position in last.items():
            if ends[number].option == "last":
                trained.add(position)
        return trained

    def _trains(self, example: Example, index: int) -> bool:
        if self.message_field_training and example.train:
            return example.train[index]
        roles = [_ROLES.get(role, role) for role in self.roles_to_train]
        return self.train_on_inputs or example.messages[index]["role"] in roles


def _ending_in_eos(text: str, tokenizer: Any) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


@dataclass(frozen=True, slots=True)
class _EndTokens:
    """Ids that end a turn.

    `option`: they are trained after `all` turns, each `turn` that is trained, the `last`, or `none`.
    """

    option: str
    ids: set[int]

    def find(self, ids: Sequence[int], start: int) -> int | None:
        """Where the first of them stands at most a few places behind `start`, or None."""
        for position in range(start, min(start + _LONGEST_GAP + 1, len(ids))):
            if ids[position] in self.ids:
                return position
        return None


@dataclass(frozen=True, slots=True)
class _RenderedTurns:
    """A conversation as text. `offsets`: where each token begins and ends in it."""

    turns: Sequence[Message]
    text: str
    offsets: Sequence[tuple[int, int]]
    render: Callable[[Sequence[Message]], str]

    def span(self, index: int) -> range | None:
        """The tokens of turn `index`: what another content in its place changes."""
        start = len(self.text)
        end = 0
        for probe in _PROBES:
            probed = {"role": self.turns[index]["role"], "content": probe}
            other = self.render([*self.turns[:index], probed, *self.turns[index + 1 :]])
            prefix = shared_length(self.text, other)
            suffix = shared_length(self.text[prefix:][::-1], other[prefix:][::-1])
            start = min(start, prefix)
            end = max(end, len(self.text) - suffix)
        first = bisect_right([token_end for _, token_end in self.offsets], start)
        stop = bisect_left([token_start for token_start, _ in self.offsets], end)
        if end <= start or stop <= first:
            return None
        return range(first, stop)
