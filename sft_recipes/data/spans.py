"""Trained spans of a conversation, in characters of its rendering, each verified."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.turns import TEMPLATE_ERRORS, TurnLayout
from sft_recipes.messages import Example, Message

_STAND_IN = "QZanswerZQ"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start:end` of `text` are trained for message `turn`.

    `text` is the rendering that ends with it, and `terminator` the control token at the end of the
    span.
    """

    turn: int
    start: int
    end: int
    text: str
    terminator: str

    @property
    def verified_text(self) -> str:
        """The rendering up to the end of the turn."""
        return self.text[: self.end]


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn: the example's position in the batch, and the message index."""

    example: int
    index: int


@dataclass(slots=True)
class Renderings:
    """What a batch needs, by turn.

    `prompts` end with the generation prompt before the turn, `texts` with the turn itself.
    `failed`: by position of the example, what the template refused.
    """

    prompts: dict[Turn, str] = field(default_factory=dict)
    texts: dict[Turn, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def render_examples(
    renderer: ChatRenderer,
    examples: Mapping[int, Example],
    trained_turns: Callable[[Example], Sequence[int]],
) -> Renderings:
    """Render each example before and after each of its trained turns.

    In two batched calls for each set of tools.
    """
    by_tools: dict[str, list[Turn]] = {}
    for position, example in examples.items():
        tools = ""
        if example.tools:
            tools = json.dumps(example.tools, sort_keys=True)
        turns = by_tools.setdefault(tools, [])
        for index in trained_turns(example):
            turns.append(Turn(position, index))
    renderings = Renderings()
    for turns in by_tools.values():
        _render_turns(renderer, examples, turns, renderings)
    return renderings


def _render_turns(
    renderer: ChatRenderer,
    examples: Mapping[int, Example],
    turns: Sequence[Turn],
    renderings: Renderings,
) -> None:
    """Render turns whose examples share their tools."""
    if not turns:
        return
    tools = examples[turns[0].example].tools
    before: list[Sequence[Message]] = []
    after: list[Sequence[Message]] = []
    for turn in turns:
        messages = examples[turn.example].messages
        before.append(messages[: turn.index])
        after.append(messages[: turn.index + 1])
    try:
        prompts = renderer.render_batch(before, tools, add_generation_prompt=True)
        texts = renderer.render_batch(after, tools)
    except TEMPLATE_ERRORS as error:
        if len(turns) == 1:
            refusal = f"the template refuses this row: {error}"
            renderings.failed.setdefault(turns[0].example, refusal)
            return
        # One row stopped the batch: render each alone to name it and to keep the others.
        for turn in turns:
            _render_turns(renderer, examples, [turn], renderings)
        return
    renderings.prompts.update(zip(turns, prompts, strict=True))
    renderings.texts.update(zip(turns, texts, strict=True))


def turn_span(
    renderer: ChatRenderer,
    example: Example,
    turn: int,
    prompt: str,
    text: str,
    mask_empty_think: bool,
) -> Span | str:
    """The trained span of one turn, or what could not be verified.

    `prompt` and `text`: the renderings that end just before and just after the turn. Where the
    template leaves the turn open, the span's text ends in the layout's closing.
    """
    layout = renderer.layout(example.messages[: turn + 1], example.tools)
    if layout is None:
        if example.messages[turn].get("tool_calls") and not renderer.needs.writes_calls:
            return "the template writes no tool calls; use one that does"
        return "the template gives no clear place for the answer"
    if layout.terminator.token is None:
        return "no special token ends the turn: the model would not learn to stop"
    if layout.prompt_tail is not None:
        served = _answer_behind_prompt(renderer, example, prompt, text, turn, layout.prompt_tail)
        if served is None:
            return "the template writes the conversation otherwise once it is answered"
        text = served
    return _verified_span(prompt, text, layout, example.messages[turn], turn, mask_empty_think)


def _verified_span(
    prompt: str, text: str, layout: TurnLayout, message: Message, turn: int, mask_empty_think: bool
) -> Span | str:
    terminator = layout.terminator
    start = len(prompt)
    if not text.startswith(prompt):
        start -= len(layout.prompt_rest)
        if not (prompt.endswith(layout.prompt_rest) and text.startswith(prompt[:start])):
            return "the generation prompt is not where the template put it for a turn of this shape"
        if not text.startswith(layout.header, start):
            return "the text before the answer differs from the template's"
        start += len(layout.header)
    if not text.endswith(layout.tail):
        return "the text after the answer differs from the template's"
    content_end = len(text) - len(layout.tail)
    end = content_end + terminator.stop
    if terminator.closing:
        text = text[:end] + terminator.closing
        end = len(text)
    if mask_empty_think and layout.empty_think and text.startswith(layout.empty_think, start):
        start += len(layout.empty_think)
    if start > content_end or not _holds_answer(text[start:end], message):
        return "the template rewrote the answer"
    return Span(turn, start, end, text, str(terminator.token))


def _answer_behind_prompt(
    renderer: ChatRenderer, example: Example, prompt: str, text: str, turn: int, prompt_tail: str
) -> str | None:
    """The generation prompt with the answer behind it, or None where the answer is not found.

    For a template that writes the conversation otherwise once it is answered. `prompt_tail`: what
    the prompt writes after the last text of the conversation.
    """
    stand_in: Message = {"role": "assistant", "content": _STAND_IN}
    answered = renderer.render([*example.messages[:turn], stand_in], example.tools)
    before = answered.partition(_STAND_IN)[0]
    if not (prompt.endswith(prompt_tail) and before.endswith(prompt_tail)):
        return None
    if not text.startswith(before):
        return None
    return prompt + text[len(before) :]


def _holds_answer(span: str, message: Message) -> bool:
    """Whether the message stands in the span: its content, and the name of every tool it calls.

    Allowing for trimming and for what a template does with reasoning.
    """
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in span:
            return False
    content = message.get("content") or ""
    if content in span or content.strip() in span:
        return True
    # Reasoning written inline is moved to its place by some templates and left out by others, which
    # a check says.
    parts = content.replace("<think>", "</think>").split("</think>")
    if all(part.strip() in span for part in parts):
        return True
    answer = content.partition("</think>")[2]
    return content.lstrip().startswith("<think>") and answer.strip() in span
