"""An Ollama Modelfile for an exported folder: its chat template in the words that Ollama has.

Ollama's own template language knows a system prompt, questions and answers. What a template writes
around these is read off renderings with markers in place of the texts; a template that is no more
than that is written down, any other is named as what it is. Nothing here was run under Ollama.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft_recipes.data.chat_templates import ChatRenderer, begins_with_bos
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.data.turn_markers import marker
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.messages import Message

MODELFILE = "Modelfile"
CHECK = "Ollama Modelfile"
_SHOW_SYSTEM = "{{ .System }}"
_EACH_MESSAGE = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
_ROLES = ("user", "assistant", "user", "assistant", "user")
_SYSTEM: Message = {"role": "system", "content": marker(9, 0)}
_TALK: Sequence[Message] = [
    {"role": role, "content": marker(index, 0)} for index, role in enumerate(_ROLES)
]


class _NotInOllama(Exception):
    """Ollama has no words for this."""


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around the texts of a conversation that waits for an answer.

    `opening` stands before the first question. Under a system prompt `system_begin` and
    `system_end` stand around that instead; both are None in a template without a place for one.
    `to_answer` leads from a question to its answer, `to_question` on to the next question, `prompt`
    from the last question to where the model answers.
    """

    opening: str
    to_answer: str
    to_question: str
    prompt: str
    system_begin: str | None = None
    system_end: str | None = None

    def as_ollama(self) -> str:
        """A template of Ollama's that writes the same."""
        opening = self.opening
        if self.system_begin is not None:
            system = f"{self.system_begin}{_SHOW_SYSTEM}{self.system_end}"
            opening = "{{ if .System }}" + system + "{{ else }}" + opening + "{{ end }}"
        after_question = (
            "{{ if $last }}" + self.prompt + "{{ else }}" + self.to_answer + "{{ end }}"
        )
        after_answer = "{{ if not $last }}" + self.to_question + "{{ end }}"
        question = '{{ if eq .Role "user" }}{{ .Content }}' + after_question
        answer = '{{ else if eq .Role "assistant" }}{{ .Content }}' + after_answer
        return opening + _EACH_MESSAGE + question + answer + "{{ end }}{{ end }}"

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama is to make of a conversation that ends in a question."""
        text = self.opening
        after = {"user": self.to_answer, "assistant": self.to_question}
        for message in messages:
            if message["role"] == "system":
                text = f"{self.system_begin}{message['content']}{self.system_end}"
            else:
                text += message["content"] + after[message["role"]]
        return text.removesuffix(self.to_answer) + self.prompt


def write_modelfile(
    folder: Path, renderer: ChatRenderer, system_prompt: str | None
) -> TemplateCheck:
    """Write the Modelfile of a saved folder, or say in the check what Ollama has no words for."""
    try:
        texts = _find_texts(renderer)
        compared = _require_same(texts, renderer)
        lines = [
            "# Written by sft-recipes for `ollama create NAME` in this folder; never run under Ollama.",
            f"# Compared with the chat template itself in {compared} conversations; tools, images and",
            "# reasoning are not in it.",
            "FROM .",
            f"TEMPLATE {_quoted(texts.as_ollama())}",
        ]
        if system_prompt:
            lines.append(f"SYSTEM {_quoted(system_prompt)}")
        for stop_id in renderer.stop_ids:
            token = renderer.tokenizer.convert_ids_to_tokens(stop_id)
            lines.append(f"PARAMETER stop {_quoted(token)}")
    except _NotInOllama as reason:
        return TemplateCheck(CHECK, "note", f"none was written: {reason}")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TemplateCheck(CHECK, "ok", f"the same text in {compared} conversations; never run")


def _find_texts(renderer: ChatRenderer) -> TurnTexts:
    """What the template writes around two questions and an answer, and around a system prompt."""
    if "strftime_now" in renderer.template_text:
        raise _NotInOllama("the template writes the date of the day")
    texts = TurnTexts(*_around(renderer, _TALK[:3]))
    if not _has_system(renderer):
        return texts
    system_begin, system_end, *_ = _around(renderer, [_SYSTEM, *_TALK[:3]])
    return replace(texts, system_begin=system_begin, system_end=system_end)


def _has_system(renderer: ChatRenderer) -> bool:
    """Whether the template has a place for a system prompt."""
    try:
        return _SYSTEM["content"] in _prompt(renderer, [_SYSTEM, _TALK[0]])
    except TEMPLATE_ERRORS:
        return False


def _prompt(renderer: ChatRenderer, messages: Sequence[Message]) -> str:
    """The text that waits for an answer, without the BOS that the tokenizer adds by itself."""
    text = renderer.render(messages, add_generation_prompt=True)
    if "{{" in text:
        raise _NotInOllama("the template's text holds {{")
    if begins_with_bos(renderer.tokenizer):
        text = text.removeprefix(renderer.tokenizer.bos_token)
    return text


def _around(renderer: ChatRenderer, messages: Sequence[Message]) -> list[str]:
    """The template's own text before, between and after the contents."""
    rest = _prompt(renderer, messages)
    texts = []
    for message in messages:
        before, content, rest = rest.partition(message["content"])
        if not content:
            raise _NotInOllama("the template writes a conversation in another order")
        texts.append(before)
    return [*texts, rest]


def _require_same(texts: TurnTexts, renderer: ChatRenderer) -> int:
    """The number of conversations compared, of one to three questions. Raises _NotInOllama where
    the template writes one otherwise.
    """
    systems: list[list[Message]] = [[]]
    if texts.system_begin is not None:
        systems.append([_SYSTEM])
    compared = 0
    for system in systems:
        for turns in (1, 3, 5):
            conversation = [*system, *_TALK[:turns]]
            if texts.render(conversation) != _prompt(renderer, conversation):
                with_system = " under a system prompt" if system else ""
                what = f"the template writes {turns} turns{with_system} otherwise"
                raise _NotInOllama(f"{what} than as texts around each turn")
            compared += 1
    return compared


def _quoted(text: str) -> str:
    """A text as a Modelfile holds it."""
    if '"""' in text:
        raise _NotInOllama('a text holds """')
    return f'"""{text}"""'
