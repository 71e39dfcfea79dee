"""torchtune 0.6.1: its builders of chat and instruction data sets, and the tokenizers of its recipes.

Read in its `data/_messages.py`, `datasets/_sft.py`, `models/*/_tokenizer.py` and
`modules/transforms/tokenizers/_utils.py`. It masks whole messages, so the header before an answer is
trained wherever the answer is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data.labelled_rows import IGNORE_INDEX
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    NotComputed,
    TheirOutcome,
    TheirRow,
    as_instruction,
    rules_from,
)
from sft_recipes.messages import Example

_ALPACA = ("alpaca_dataset", "alpaca_cleaned_dataset")


@dataclass(frozen=True, slots=True)
class _Message:
    """A message in pieces that are encoded one by one. `masked`: it is not trained."""

    role: str
    pieces: Sequence[str]
    masked: bool


@dataclass(slots=True)
class _Draft:
    """A row while it is written.

    `eos`: what takes the last place where the row is cut, None for nothing; `ends_masked`: it is
    then not trained, whatever stood there.
    """

    tokenizer: Any
    eos: int | None = None
    ends_masked: bool = False
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], masked: bool) -> None:
        """Append tokens."""
        self.ids += ids
        if masked:
            self.labels += [IGNORE_INDEX] * len(ids)
        else:
            self.labels += ids

    def add_token(self, token: str, masked: bool) -> None:
        """Append a control token."""
        self.add([self.tokenizer.convert_tokens_to_ids(token)], masked)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_behind(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before one."""
        return self.encode("\n" + text)[len(self.encode("\n")) :]

    def row(self, limit: int | None) -> TheirRow:
        """The row, cut where it is too long."""
        whole = TheirRow(self.ids, self.labels)
        if limit is None:
            return whole
        ids = self.ids[:limit]
        labels = self.labels[:limit]
        if self.eos is not None:
            ids[-1] = self.eos
            if labels[-1] != IGNORE_INDEX:
                labels[-1] = self.eos
            if self.ends_masked:
                labels[-1] = IGNORE_INDEX
        if len(ids) == len(self.ids):
            return TheirRow(ids, labels)
        return TheirRow(ids, labels, whole)


def _write_llama3(draft: _Draft, messages: Sequence[_Message]) -> None:
    draft.add_token("<|begin_of_text|>", masked=True)
    for message in messages:
        draft.add_token("<|start_header_id|>", message.masked)
        draft.add(draft.encode(message.role), message.masked)
        draft.add_token("<|end_header_id|>", message.masked)
        draft.add(draft.encode("\n\n"), message.masked)
        draft.add(draft.encode("".join(message.pieces).strip()), message.masked)
        draft.add_token("<|eot_id|>", message.masked)
    draft.add_token("<|end_of_text|>", masked=True)
    draft.eos = draft.ids[-1]
    draft.ends_masked = True


def _write_qwen(draft: _Draft, messages: Sequence[_Message]) -> None:
    for number, message in enumerate(messages, 1):
        draft.add_token("<|im_start|>", message.masked)
        draft.add(draft.encode(f"{message.role}\n"), message.masked)
        draft.add(draft.encode("".join(message.pieces)), message.masked)
        draft.add_token("<|im_end|>", message.masked)
        if number < len(messages):
            draft.add(draft.encode("\n"), message.masked)
    draft.eos = draft.ids[-1]
    # With a `max_seq_len` the last token is masked, cut or not: then no answer's end is trained.
    draft.ends_masked = True


def _write_plain(draft: _Draft, messages: Sequence[_Message]) -> None:
    """No control tokens but BOS before each question and EOS behind each answer."""
    draft.eos = draft.tokenizer.eos_token_id
    begins = True
    spaced = False
    for message in messages:
        if begins:
            draft.add([draft.tokenizer.bos_token_id], message.masked)
        encode = draft.encode if begins or spaced else draft.encode_behind
        for piece in message.pieces:
            draft.add(encode(piece.rstrip(" ")), message.masked)
        spaced = message.pieces[-1].endswith(" ")
        begins = message.role == "assistant"
        if begins:
            draft.add([draft.tokenizer.eos_token_id], message.masked)


def _write_phi3(draft: _Draft, messages: Sequence[_Message]) -> None:
    draft.add_token("<s>", messages[0].masked)
    newline = draft.encode("\n")
    for message in messages:
        draft.add_token(f"<|{message.role}|>", message.masked)
        draft.add(newline, message.masked)
        for piece in message.pieces:
            draft.add(draft.encode_behind(piece.rstrip(" ")), message.masked)
        draft.add_token("<|end|>", message.masked)
        draft.add(newline, message.masked)


def _write_phi4(draft: _Draft, messages: Sequence[_Message]) -> None:
    """No answer ends in a token: `add_eos` is false by default, and no recipe sets it."""
    for message in messages:
        draft.add_token("<|im_start|>", message.masked)
        draft.add(draft.encode(message.role), message.masked)
        draft.add_token("<|im_sep|>", message.masked)
        for piece in message.pieces:
            draft.add(draft.encode(piece.rstrip(" ")), message.masked)
        if message.role != "assistant":
            draft.add_token("<|im_end|>", message.masked)


# By the name of the tokenizer's builder.
_WRITERS: Mapping[str, Callable[[_Draft, Sequence[_Message]], None]] = {
    "gemma_tokenizer": _write_plain,
    "llama2_tokenizer": _write_plain,
    "llama3_tokenizer": _write_llama3,
    "mistral_tokenizer": _write_plain,
    "phi3_mini_tokenizer": _write_phi3,
    "phi4_tokenizer": _write_phi4,
    "qwen2_tokenizer": _write_qwen,
    "qwen2_5_tokenizer": _write_qwen,
}
# Their prompt template is set by default.
_IN_INST = ("llama2_tokenizer", "mistral_tokenizer")


@dataclass(frozen=True, slots=True)
class TorchtuneRules:
    """Keys of a config's `dataset` and `tokenizer`; `dataset` and `tokenizer` name their components."""

    dataset: str
    tokenizer: str
    train_on_input: bool | None = None
    new_system_prompt: str | None = None
    max_seq_len: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], number: int = 0) -> "TorchtuneRules":
        """The rules for data set `number` of a config; most configs have one, which is no list."""
        dataset = config["dataset"]
        if isinstance(dataset, list):
            dataset = dataset[number]
        names = {"dataset": _component(dataset), "tokenizer": _component(config["tokenizer"])}
        return rules_from(cls, names, dataset, config["tokenizer"])

    @property
    def tool(self) -> str:
        """The tool's name."""
        return "torchtune"

    def prepare(self, tokenizer: Any) -> None:
        """Nothing: torchtune has tokenizers of its own, over the same vocabularies."""

    def row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """What torchtune makes of an example."""
        write = _WRITERS.get(self.tokenizer)
        if write is None:
            return NotComputed(f"torchtune's tokenizer {self.tokenizer!r} is not known here")
        if self.dataset in _ALPACA:
            messages = self._alpaca_messages(example)
        elif self.dataset in ("chat_dataset", "instruct_dataset"):
            messages = self._messages(example)
        else:
            return NotComputed(f"torchtune's data set {self.dataset!r} is not known here")
        if messages is None:
            return NotComputed(f"torchtune's {self.dataset} reads an instruction and its output")
        if any(message.role == "system" for message in messages[1:]):
            return DroppedThere("it stops at a system message that is not the first")
        if self.tokenizer in _IN_INST:
            if messages[0].role == "system" and self.tokenizer == "mistral_tokenizer":
                return DroppedThere("it stops, Mistral's template takes no system message")
            messages = _in_inst(messages)
        draft = _Draft(tokenizer)
        write(draft, messages)
        return draft.row(self.max_seq_len)

    def _alpaca_messages(self, example: Example) -> list[_Message] | None:
        """The Alpaca prompt as the user's message; it is trained unless `train_on_input` is false."""
        row = as_instruction(example)
        if row is None:
            return None
        masked = self.train_on_input is False
        return [
            _Message("user", [row.alpaca_prompt], masked),
            _Message("assistant", [row.output], masked=False),
        ]

    def _messages(self, example: Example) -> list[_Message]:
        messages: list[_Message] = []
        if self.new_system_prompt is not None:
            messages.append(_Message("system", [self.new_system_prompt], masked=True))
        for message in example.messages:
            masked = message["role"] != "assistant" and not self.train_on_input
            if message["role"] != "system" or self.new_system_prompt is None:
                messages.append(_Message(message["role"], [message["content"]], masked))
        return messages


def _component(config: Mapping[str, Any]) -> str:
    """The last name of `_component_`."""
    return str(config.get("_component_", "")).rpartition(".")[2]


def _in_inst(messages: Sequence[_Message]) -> list[_Message]:
    """The messages in the tags of Llama 2; a system message stands in every question after it."""
    system: list[str] = []
    written: list[_Message] = []
    for message in messages:
        if message.role == "system":
            system = ["<<SYS>>\n", *message.pieces, "\n<</SYS>>\n\n"]
        elif message.role == "user":
            pieces = ["[INST] ", *system, *message.pieces, " [/INST] "]
            written.append(_Message("user", pieces, message.masked))
        else:
            written.append(message)
    return written
