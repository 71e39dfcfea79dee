"""LLaMA-Factory 0.9.5: `stage: sft`.

Read in its `data/template.py`, `data/converter.py`, `data/processor/supervised.py` and
`data/processor/processor_utils.py`. Its templates stand in `llamafactory_templates.yaml`.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sft_recipes.data.labelled_rows import IGNORE_INDEX
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    NotComputed,
    TheirOutcome,
    TheirRow,
    rules_from,
)
from sft_recipes.messages import Example

Pieces = Sequence[str | Mapping[str, str]]
_TEXT: Pieces = ("{content}",)
_NO_THINKING = "detailed thinking off"
_THINK = ("<think>\n", "\n</think>\n\n")


@dataclass(frozen=True, slots=True)
class Template:
    """One entry of `llamafactory_templates.yaml`, which says what the fields mean."""

    user: Pieces = _TEXT
    assistant: Pieces = ()
    system: Pieces = _TEXT
    prefix: Pieces = ()
    default_system: str = ""
    stop_words: Sequence[str] = ()
    efficient_eos: bool = False
    replace_eos: bool = False
    kind: str = ""

    @property
    def answer(self) -> Pieces:
        """What is written for an answer."""
        if self.assistant or self.efficient_eos:
            return self.assistant or _TEXT
        return (*_TEXT, {"id": "eos_token"})


@cache
def templates() -> Mapping[str, Template]:
    """The templates by name."""
    path = Path(__file__).with_name("llamafactory_templates.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Template(**fields) for name, fields in content.items()}


class _Pair(NamedTuple):
    """The ids of a question and of its answer."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class LlamaFactoryRules:
    """Keys of a config; names and defaults are LLaMA-Factory's.

    `formatting`: of the data set, from `dataset_info.json`.
    """

    template: str | None = None
    formatting: str = "alpaca"
    cutoff_len: int = 2048
    train_on_prompt: bool = False
    mask_history: bool = False
    packing: bool = False
    neat_packing: bool = False
    default_system: str | None = None
    enable_thinking: bool = True
    preserve_thinking: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], number: int = 0) -> "LlamaFactoryRules":
        """The rules of a config, the same for all of its data sets."""
        return rules_from(cls, config)

    @property
    def tool(self) -> str:
        """The tool's name."""
        return "LLaMA-Factory"

    def prepare(self, tokenizer: Any) -> None:
        """Stop words become special tokens, and where the template says so the first becomes EOS."""
        template = templates().get(self.template or "", Template())
        stop_words = list(template.stop_words)
        if template.replace_eos:
            tokenizer.add_special_tokens({"eos_token": stop_words.pop(0)})
        elif tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        if stop_words:
            tokenizer.add_tokens(stop_words, special_tokens=True)

    def row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """What LLaMA-Factory makes of an example."""
        template = templates().get(self.template or "")
        if template is None:
            name = self.template or "(taken from the tokenizer)"
            return NotComputed(f"LLaMA-Factory's template {name} is not known here")
        if self.train_on_prompt and template.efficient_eos:
            return DroppedThere(f"template {self.template} refuses train_on_prompt")
        conversation = _conversation(example)
        if conversation is None:
            return DroppedThere("its turns are not questions and answers in alternation")
        system = conversation.system
        if self.formatting == "openai" and "detailed thinking o" not in system:
            # Its converter of this format writes it into every row that has no tools.
            system = f"{system}\n{_NO_THINKING}".lstrip("\n")
        pairs = _Encoding(self, template, tokenizer).pairs(system, conversation.texts)
        limit = self.cutoff_len
        if self.packing or self.neat_packing:
            limit -= 1
        eos = tokenizer.eos_token_id if template.efficient_eos else None
        whole = self._joined(pairs, sys.maxsize, eos)
        row = self._joined(pairs, limit, eos)
        if row == whole:
            return row
        return TheirRow(row.input_ids, row.labels, whole)

    def _joined(self, pairs: Sequence[_Pair], limit: int, eos: int | None) -> TheirRow:
        """The turns as one row of at most `limit` tokens.

        `eos`: what ends the row, and is learned behind each answer, where no answer holds it.
        """
        parts: list[TheirRow] = []
        room = limit
        if eos is not None:
            room -= 1
        # Under `mask_history` the last turns come first, since they are to be kept.
        order = pairs
        if self.mask_history:
            order = pairs[::-1]
        for pair in order:
            if room <= 0:
                break
            pair = _shortened(pair, room)
            room -= len(pair.question) + len(pair.answer)
            labels = self._labels(pair, not parts, eos)
            parts.append(TheirRow(pair.question + pair.answer, labels))
        if self.mask_history:
            parts.reverse()
        if eos is not None:
            parts.append(TheirRow([eos], [eos]))
        ids: list[int] = []
        labels = []
        for part in parts:
            ids += part.input_ids
            labels += part.labels
        return TheirRow(ids, labels)

    def _labels(self, pair: _Pair, is_first: bool, eos: int | None) -> list[int]:
        """The labels of a question and its answer; `is_first`: no other pair was written yet."""
        question = [IGNORE_INDEX] * len(pair.question)
        answer = pair.answer
        if self.train_on_prompt:
            question = pair.question
        elif eos is not None and not is_first:
            question = [eos, *question[1:]]
        if self.mask_history and not is_first:
            answer = [IGNORE_INDEX] * len(pair.answer)
        return question + answer


class _Conversation(NamedTuple):
    """A system prompt or "", and questions and answers in alternation."""

    system: str
    texts: list[str]


def _conversation(example: Example) -> _Conversation | None:
    """The conversation of an example, or None where it is none that is taken.

    Instruction and input are joined by one line break.
    """
    messages = list(example.messages)
    system = ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    texts: list[str] = []
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            return None
        text = message["content"]
        if message.get("input"):
            text = message["instruction"] + "\n" + message["input"]
        texts.append(text)
    if not texts or len(texts) % 2:
        return None
    return _Conversation(system, texts)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Writes conversations by a template, turn by turn."""

    rules: LlamaFactoryRules
    template: Template
    tokenizer: Any

    def pairs(self, system: str, texts: Sequence[str]) -> list[_Pair]:
        """The ids of each question with its answer."""
        default = self.rules.default_system
        system = system or (self.template.default_system if default is None else default)
        texts = self._with_reasoning(texts)
        pairs: list[_Pair] = []
        for index in range(0, len(texts), 2):
            question: list[int] = []
            text = texts[index]
            if index == 0:
                question += self._ids(self.template.prefix)
                if system and self.template.kind == "llama2":
                    text = _filled(self.template.system[0], system) + text
                elif system:
                    question += self._ids(self.template.system, system)
            question += self._ids(self.template.user, text)
            answer = self._ids(self.template.answer, texts[index + 1])
            is_last = index == len(texts) - 2
            if self._gets_empty_block(texts[index + 1], is_last):
                block = self._ids(["".join(_THINK)])
                if self.rules.enable_thinking:
                    answer = block + answer
                else:
                    question += block
            pairs.append(_Pair(question, answer))
        return pairs

    @property
    def _discards_history(self) -> bool:
        return self.rules.mask_history and not self.rules.preserve_thinking

    def _with_reasoning(self, texts: Sequence[str]) -> list[str]:
        """The texts without the reasoning that is not to be learned."""
        kept = list(texts)
        if self.template.kind != "reasoning":
            return kept
        for index in range(1, len(kept), 2):
            is_history = index < len(kept) - 1
            if not self.rules.enable_thinking or (is_history and self._discards_history):
                kept[index] = _without_reasoning(kept[index])
        return kept

    def _gets_empty_block(self, answer: str, is_last: bool) -> bool:
        """Whether an empty think block is written before an answer."""
        if self.template.kind != "reasoning" or any(tag.strip() in answer for tag in _THINK):
            return False
        return is_last or not self._discards_history

    def _ids(self, pieces: Pieces, text: str = "") -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                filled = _filled(piece, text)
                if filled:
                    ids += self.tokenizer.encode(filled, add_special_tokens=False)
            else:
                token = getattr(self.tokenizer, f"{piece['id']}_id")
                if token is not None:
                    ids.append(token)
        return ids


def _filled(piece: str | Mapping[str, str], text: str) -> str:
    """A piece with the text in its place."""
    assert isinstance(piece, str)
    return piece.replace("{content}", text, 1)


def _without_reasoning(answer: str) -> str:
    """An answer without its think blocks, and without line breaks before the rest."""
    block = ".*?".join(map(re.escape, _THINK))
    return re.sub(block, "", answer, flags=re.DOTALL).lstrip("\n")


def _shortened(pair: _Pair, room: int) -> _Pair:
    """The question and the answer cut at their ends so that both fit into `room` tokens.

    An answer shorter than half of the room is kept, else a question shorter than half, else both
    lose the same share.
    """
    asked = len(pair.question)
    answered = len(pair.answer)
    if answered * 2 < room:
        longest_answer = room
    elif asked * 2 < room:
        longest_answer = room - asked
    else:
        longest_answer = int(room * (answered / (asked + answered)))
    answer = pair.answer[:longest_answer]
    return _Pair(pair.question[: max(room - len(answer), 0)], answer)
