"""Trained spans of a conversation in characters of its rendering, each verified before anything is tokenized."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.encoding import Encoded
from sft_recipes.data.turns import TEMPLATE_ERRORS, TurnLayout
from sft_recipes.messages import Example, Message


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start:end` of `text` are trained for message `turn`; `text` is the rendering that ends with it."""

    turn: int
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Renderings:
    """What a batch of examples needs, by (position in the batch, number of messages): `prompts` end with the
    generation prompt, `texts` with the last of the messages. `failed`: by position, what the template refused.
    """

    prompts: Mapping[tuple[int, int], str]
    texts: Mapping[tuple[int, int], str]
    failed: Mapping[int, str]


def render_examples(
    renderer: ChatRenderer, examples: Mapping[int, Example], trained_turns: Callable[[Example], Sequence[int]]
) -> Renderings:
    """Render each example whole, and up to each of its trained turns, in two batched calls per set of tools."""
    prompts: list[tuple[int, int]] = []
    texts: list[tuple[int, int]] = []
    for index, example in examples.items():
        turns = trained_turns(example)
        prompts += [(index, turn) for turn in turns]
        texts += [(index, length) for length in {*[turn + 1 for turn in turns], len(example.messages)}]
    failed: dict[int, str] = {}
    before = _render_all(renderer, examples, prompts, True, failed)
    after = _render_all(renderer, examples, texts, False, failed)
    return Renderings(before, after, failed)


def _render_all(
    renderer: ChatRenderer,
    examples: Mapping[int, Example],
    wanted: Sequence[tuple[int, int]],
    add_generation_prompt: bool,
    failed: dict[int, str],
) -> dict[tuple[int, int], str]:
    """Render the first `length` messages of example `index` for each (index, length), batched by tools."""
    by_tools: dict[str, list[tuple[int, int]]] = {}
    for index, length in wanted:
        tools = examples[index].tools
        by_tools.setdefault(json.dumps(tools, sort_keys=True) if tools else "", []).append((index, length))
    rendered: dict[tuple[int, int], str] = {}
    for group in by_tools.values():
        tools = examples[group[0][0]].tools
        conversations = [examples[index].messages[:length] for index, length in group]
        try:
            rendered |= zip(group, renderer.render_batch(conversations, tools, add_generation_prompt), strict=True)
        except TEMPLATE_ERRORS:
            # One row stopped the batch: render one by one to name it and to keep the others.
            for key, conversation in zip(group, conversations, strict=True):
                try:
                    rendered[key] = renderer.render(conversation, tools, add_generation_prompt)
                except TEMPLATE_ERRORS as error:
                    failed.setdefault(key[0], f"the template refuses this row: {error}")
    return rendered


def verified_span(
    prompt: str, text: str, layout: TurnLayout | None, message: Message, turn: int, mask_empty_think: bool
) -> Span | str:
    """The trained span of one turn, or what could not be verified.

    `prompt` and `text`: the renderings that end just before and just after the turn. The span lies in
    `text + layout.closing`, which the returned `Span.text` holds.
    """
    if layout is None:
        return "the template gives no clear place for the answer"
    if layout.terminator is None:
        return "no special token ends the turn: the model would not learn to stop"
    cut = len(prompt) - len(layout.prompt_rest)
    if not (prompt.endswith(layout.prompt_rest) and text.startswith(prompt[:cut])):
        return "the generation prompt is not where the template put it for a turn of this shape"
    if not text.startswith(layout.header, cut):
        return "the text before the answer differs from the template's"
    if not text.endswith(layout.tail):
        return "the text after the answer differs from the template's"
    start = cut + len(layout.header)
    content_end = len(text) - len(layout.tail)
    text += layout.closing
    end = content_end + layout.stop + len(layout.closing)
    if mask_empty_think and layout.empty_think and text.startswith(layout.empty_think, start):
        start += len(layout.empty_think)
    if start > content_end or not _holds_answer(text[start:end], message):
        return "the template rewrote the answer"
    return Span(turn, start, end, text)


def _holds_answer(span: str, message: Message) -> bool:
    """Whether the message stands in the span: the name of every tool it calls, and its content, allowing for trimming
    and for reasoning moved to its place.
    """
    if any(call["function"]["name"] not in span for call in message.get("tool_calls") or ()):
        return False
    content = message.get("content") or ""
    if content in span or content.strip() in span:
        return True
    # Reasoning written inline is taken out of the content and put back in the template's own way.
    parts = [part.strip() for part in content.replace("<think>", "</think>").split("</think>")]
    return all(part in span for part in parts)


def token_span(encoded: Encoded, span: Span, special_ids: set[int]) -> tuple[int, int] | None:
    """Token positions `start:end` of a character span, or None if a token straddles its beginning or its end."""
    start, last = encoded.token_at(span.start), encoded.token_at(span.end - 1)
    if start is None or last is None or last < start or encoded.first_char(start) != span.start:
        return None
    # A special token may swallow the whitespace after it (Phi-3), so where it ends is not compared.
    return (start, last + 1) if int(encoded.ids[last]) in special_ids else None
