"""Talk to a run, beside its base if asked for: rendered and decoded as in an evaluation."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sft_recipes import models
from sft_recipes.data.labels import Labeller
from sft_recipes.errors import InputError
from sft_recipes.evaluation.generation import Generation, generate
from sft_recipes.evaluation.open_run import base_model, open_run
from sft_recipes.messages import Example, Message, visible


@dataclass
class _Speaker:
    """A model with its own history."""

    name: str
    model: Any
    history: list[Message] = field(default_factory=list)


def chat(
    run: str, base: str | None, chat_template: str | None, max_new_tokens: int, as_json: bool
) -> None:
    """Let run and base answer each line of the standard input until `/quit`.

    `/reset` forgets what was said. Every model has its own history. With `as_json` one object per
    answer. A question that does not fit into the model any more is refused and forgotten.
    """
    loaded = models.load_for_inference(run)
    labeller = open_run(run, loaded.tokenizer, chat_template).labeller
    speakers = [_Speaker("tuned", loaded.model)]
    if base:
        speakers.append(_Speaker("base", base_model(base, labeller.renderer.tokenizer)))
    for question in _lines(as_json):
        if question == "/reset":
            for speaker in speakers:
                speaker.history = []
            continue
        for speaker in speakers:
            try:
                answer = _answer(speaker, labeller, question, max_new_tokens)
            except InputError as error:
                print(error, file=sys.stderr)
                break
            print(_as_text(speaker.name, question, answer, as_json))


def _lines(as_json: bool) -> Iterator[str]:
    """What was typed, without empty lines, up to `/quit` or the end."""
    mark = ""
    if sys.stdin.isatty() and not as_json:
        mark = "> "
        print("/reset starts a new conversation, /quit ends")
    while True:
        try:
            line = input(mark).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def _answer(
    speaker: _Speaker, labeller: Labeller, question: str, max_new_tokens: int
) -> Generation:
    """The speaker's answer, which becomes part of its history."""
    renderer = labeller.renderer
    messages = [*speaker.history, {"role": "user", "content": question}]
    asked = labeller.for_template(Example(messages, "chat", 0))
    answers = generate(
        speaker.model,
        renderer.tokenizer,
        [renderer.prompt_ids(asked.messages)],
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=1,
        names=["chat"],
        progress=False,
    )
    speaker.history = [*messages, {"role": "assistant", "content": answers[0].text}]
    return answers[0]


def _as_text(name: str, question: str, answer: Generation, as_json: bool) -> str:
    if as_json:
        content = {
            "model": name,
            "prompt": question,
            "response": answer.text,
            "stop_reason": answer.stop_reason,
        }
        return json.dumps(content, ensure_ascii=False)
    cut = " [cut at max_new_tokens]" if answer.stop_reason == "length" else ""
    return f"{name}: {visible(answer.text)}{cut}"
