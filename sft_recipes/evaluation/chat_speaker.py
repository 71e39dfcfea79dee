"""A model that talks: with its own history, its words shown as they come, within its context."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from sft_recipes.data.labels import Labeller
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.generation import generation_mode
from sft_recipes.messages import Example, Message

# What a tokenizer makes of the first bytes of a character whose last bytes are still to come.
_UNFINISHED = "\ufffd"


@dataclass
class AnswerSettings:
    """How answers are made. `temperature` 0 is greedy; `seed` draws the words above it."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    system: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. `stop_reason`: `eos`, `length`, or `stopped` by Ctrl-C."""

    text: str
    stop_reason: str


class _Words(BaseStreamer):
    """The text of an answer as it grows; `show` is given every new piece once."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], show: Callable[[str], None]):
        self.text = ""
        self.stop_reason = "length"
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._show = show
        self._ids: list[int] = []
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; the first call brings the prompt, a row of a batch."""
        if value.dim() > 1:
            return
        token = int(value[0])
        if token in self._stop_ids:
            self.stop_reason = "eos"
            return
        self._ids.append(token)
        # All ids anew: what a token says may depend on the one before it.
        self.text = self._tokenizer.decode(
            self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self._show_up_to(len(self.text.rstrip(_UNFINISHED)))

    def end(self) -> None:
        """Show what was held back."""
        self._show_up_to(len(self.text))

    def _show_up_to(self, length: int) -> None:
        if length > self._shown:
            self._show(self.text[self._shown : length])
            self._shown = length


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model is asked it, and how many of the first messages had no room."""

    question: Message
    ids: list[int]
    left_out: int


@dataclass
class Speaker:
    """A model with its own history. `is_bare`: its adapter is switched off while it answers."""

    name: str
    model: Any
    labeller: Labeller
    is_bare: bool = False
    history: list[Message] = field(default_factory=list)

    def prompt(self, question: str, settings: AnswerSettings) -> Prompt:
        """The conversation with this question, without its oldest turns where it is too long.

        Raises InputError for a question that is too long by itself.
        """
        asked: Message = {"role": "user", "content": question}
        context = _context(self.model)
        # A short context is not given to the answer alone.
        room = min(settings.max_new_tokens, context // 4)
        left_out = 0
        ids = self._ids([*self.history, asked], settings.system)
        while left_out < len(self.history) and len(ids) + room > context:
            left_out += 2  # a question and its answer
            ids = self._ids([*self.history[left_out:], asked], settings.system)
        if len(ids) >= context:
            what = f"{len(ids)} tokens leave no room for an answer in the model's {context}"
            raise InputError(Problem("chat", "", what, "ask it in fewer words"))
        return Prompt(asked, ids, left_out)

    def answer(
        self, prompt: Prompt, settings: AnswerSettings, show: Callable[[str], None]
    ) -> Answer:
        """Answer, and remember question and answer; `show` is given the text as it comes.

        Ctrl-C ends the answer, and what was said until then is remembered.
        """
        renderer = self.labeller.renderer
        words = _Words(renderer.tokenizer, renderer.stop_ids, show)
        try:
            self._generate(prompt.ids, settings, words)
        except KeyboardInterrupt:
            words.end()
            words.stop_reason = "stopped"
        if words.text or words.stop_reason != "stopped":
            self.history += [prompt.question, {"role": "assistant", "content": words.text}]
        return Answer(words.text, words.stop_reason)

    def _ids(self, messages: Sequence[Message], system: str) -> list[int]:
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        example = self.labeller.for_template(Example(messages, "chat", 0))
        return self.labeller.renderer.prompt_ids(example.messages)

    def _generate(self, ids: list[int], settings: AnswerSettings, words: _Words) -> None:
        stop_ids = list(self.labeller.renderer.stop_ids)
        config = GenerationConfig(
            max_new_tokens=min(settings.max_new_tokens, _context(self.model) - len(ids)),
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            do_sample=settings.temperature > 0,
        )
        if settings.temperature > 0:
            config.temperature = settings.temperature
            config.top_k = 0  # all words, not transformers' 50 likeliest
        prompt = torch.tensor([ids], device=self.model.device)
        adapter = self.model.disable_adapter() if self.is_bare else contextlib.nullcontext()
        with generation_mode(self.model, config), adapter:
            torch.manual_seed(settings.seed)
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=words,
            )


def _context(model: Any) -> int:
    """The positions that a model has; no end of them where it names none."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
