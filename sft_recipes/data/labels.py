"""Labels: which tokens of a conversation are trained. One place of this project decides it, this one.

For every trained turn the loss covers exactly what the model has to produce when served: from the end of the
generation prompt through the content to the terminator. For assistant turn `i` of a conversation let

    G = render(messages[:i], add_generation_prompt=True)      R = render(messages[:i + 1])

Where G is a prefix of R, the span is R[len(G):end]; where the generation prompt opens a think block that R does not
repeat, it starts at the content. `end` is just after the terminator that `data/turns.py` found. A turn that stands
letter for letter in the full rendering is trained there; one that renders differently in context than as the last
turn (Qwen3 drops earlier reasoning) becomes a row of its own (`history: expand`) or stays untrained (`mask`).
Every span is verified; what cannot be verified is dropped with a reason, never guessed.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np

from sft_recipes.data.chat_templates import PROBE, ChatRenderer, begins_with_bos
from sft_recipes.data.encoding import Encoded, Ids
from sft_recipes.data.spans import Renderings, Span, render_examples, token_span, verified_span
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import LabelSettings

IGNORE_INDEX = -100

_INLINE_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no equality of their own
class LabelledRow:
    """One training row. `spans` are the positions `start:end` that are trained, in order, none overlapping.

    `example` indexes the examples that were passed in; `turns` are the message indices trained in this row.
    `lost_tokens`: trained tokens removed with whole trailing turns by `overlength: truncate`.
    `neutralized`: text that spells control tokens was tokenized as text.
    """

    example: int
    ids: Ids
    spans: Sequence[tuple[int, int]]
    turns: tuple[int, ...]
    lost_tokens: int = 0
    neutralized: bool = False

    @property
    def input_ids(self) -> list[int]:
        """`ids` as a list, as a data set's column holds them."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """The id at every trained position, -100 elsewhere."""
        labels = np.full_like(self.ids, IGNORE_INDEX)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels.tolist()

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not trained, why, and how many trained tokens went with it where that is known."""

    example: int
    reason: str
    detail: str
    trained_tokens: int = 0


@dataclass(slots=True)
class LabelledBatch:
    """What became of a batch: every example is in `rows`, in `dropped`, or in both (turns that became own rows)."""

    rows: list[LabelledRow] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)
    masked_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before tokenization: its text, its verified spans (none: `format: raw`), and whether control tokens in it
    are text.
    """

    example: int
    text: str
    spans: tuple[Span, ...]
    neutralized: bool


@dataclass(slots=True)
class _Work:
    """A batch between rendering and tokenization; `ready` holds examples with control tokens already marked."""

    batch: LabelledBatch = field(default_factory=LabelledBatch)
    ready: dict[int, Example] = field(default_factory=dict)
    neutralized: set[int] = field(default_factory=set)
    drafts: list[_Draft] = field(default_factory=list)


class Labeller:
    """Turns examples into labelled rows through one renderer.

    Raises CheckFailed when created if the template verifies nothing.
    """

    def __init__(self, renderer: ChatRenderer, settings: LabelSettings) -> None:
        self.renderer = renderer
        self.settings = settings
        self._special_ids = set(renderer.special_tokens.values())
        tokenizer = renderer.tokenizer
        self._raw_start = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        # Some models use one token for both ends; then it stands after every turn and says nothing about BOS.
        self._bos_id: Any = None if tokenizer.bos_token_id in renderer.stop_ids else tokenizer.bos_token_id
        self._check_template()

    def _check_template(self) -> None:
        work = _Work(ready={0: Example(messages=PROBE, source="probe", row=0)})
        self._draft(work)
        encodings = self._encode(work.drafts)
        alone = self.renderer.tokenizer([draft.text for draft in work.drafts], add_special_tokens=False)["input_ids"]
        if [encoded.ids.tolist() for encoded in encodings] != alone:
            what = "its tokenizer gives other ids in a batch than alone"
            raise CheckFailed(str(Problem("recipe", "model_name_or_path", what, "report this tokenizer")))
        found = map(self._spans, work.drafts, encodings)
        if lost := [*work.batch.dropped, *(one for one in found if isinstance(one, DroppedRow))]:
            what = f"the template verifies nothing: {lost[0].detail}"
            fix = "use another chat_template; `sft-recipes inspect` shows the rendering"
            raise CheckFailed(str(Problem("recipe", "chat_template", what, fix)))

    def label(self, examples: Sequence[Example]) -> LabelledBatch:
        """Label a batch. Rows keep the order of their examples; nothing is lost without a DroppedRow."""
        work = self._begin(examples)
        return self._finish(work, self._encode(work.drafts))

    def label_batches(self, batches: Iterable[Sequence[Example]]) -> Iterator[tuple[Sequence[Example], LabelledBatch]]:
        """Label batch after batch; the tokenizer (Rust, all cores) works on one while others are rendered or joined."""
        with ThreadPoolExecutor(max_workers=2) as pool:

            def begun() -> Iterator[Any]:
                for examples in batches:
                    work = self._begin(examples)
                    yield examples, work, pool.submit(self._encode, work.drafts)

            for (examples, work, encoded), _ in pairwise(chain(begun(), [None])):
                yield examples, self._finish(work, encoded.result())

    def _begin(self, examples: Sequence[Example]) -> _Work:
        """Everything before tokenization: policies, renderings, verified spans."""
        work = _Work()
        for index, original in enumerate(examples):
            example = self.for_template(original)
            if example.text is None and not self._trained_turns(example):
                detail = "no assistant turn of this row may be trained"
                work.batch.dropped.append(DroppedRow(index, "no_trained_turn", detail))
            elif not self.renderer.control_tokens.occur_in((example.messages, example.tools, example.text)):
                work.ready[index] = example
            elif self._may_neutralize(work.batch, example, index):
                mark = self.renderer.control_tokens.mark
                texts = {name: mark(getattr(example, name)) for name in ("messages", "tools", "text")}
                work.ready[index] = dataclasses.replace(example, **texts)
                work.neutralized.add(index)
        self._draft(work)
        return work

    def _finish(self, work: _Work, encoded: Sequence[Encoded]) -> LabelledBatch:
        """Ids and labels of the drafts, over-long rows dealt with."""
        batch = work.batch
        for draft, ids in zip(work.drafts, encoded, strict=True):
            self._add(batch, draft, ids, work.ready[draft.example])
        batch.rows.sort(key=lambda row: (row.example, row.turns))
        return batch

    def _may_neutralize(self, batch: LabelledBatch, example: Example, index: int) -> bool:
        """Apply the recipe's `control_tokens` to a row whose text spells one."""
        policy = self.settings.control_tokens
        if policy == "error":
            fix = "clean the row, or set control_tokens to neutralize (the text stays, as text) or drop"
            raise InputError(Problem(example.where, "messages", "the text spells control tokens", fix))
        if policy == "drop":
            batch.dropped.append(DroppedRow(index, "control_tokens", "the text spells control tokens"))
        return policy == "neutralize"

    def for_template(self, example: Example) -> Example:
        """The example as it is rendered: the recipe's system prompt first unless it brings its own, and reasoning
        written inline as `<think>...</think>` in its own field where the template has a place for it.
        """
        messages, train, prompt = example.messages, example.train, self.settings.system_prompt
        if "reasoning_content" in self.renderer.template_text:
            messages = [_reasoning_apart(message) for message in messages]
        if prompt and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": prompt}, *messages]
            train = (False, *train) if train else ()
        elif messages is example.messages:
            return example
        return dataclasses.replace(example, messages=messages, train=train)

    def _trained_turns(self, example: Example) -> list[int]:
        turns = [index for index in range(len(example.messages)) if example.is_trainable(index)]
        return turns[-1:] if self.settings.train_on == "last_assistant" else turns

    # -- drafts: texts with verified spans ---------------------------------------------------------------------------

    def _draft(self, work: _Work) -> None:
        chats = {index: example for index, example in work.ready.items() if example.text is None}
        renderings = render_examples(self.renderer, chats, self._trained_turns)
        for index, example in work.ready.items():
            if index in renderings.failed:
                work.batch.dropped.append(DroppedRow(index, "template_error", renderings.failed[index]))
                continue
            rows = self._draft_one(example, index, renderings, work.batch)
            work.drafts += [_Draft(index, text, spans, index in work.neutralized) for text, spans in rows]

    def _draft_one(
        self, example: Example, index: int, renderings: Renderings, batch: LabelledBatch
    ) -> list[tuple[str, tuple[Span, ...]]]:
        """Text and spans of every row that one example becomes."""
        if example.text is not None:
            return [(example.text, ())]
        spans: list[Span] = []
        mask_empty_think = self.settings.empty_think == "mask"
        for turn in self._trained_turns(example):
            layout = self.renderer.layout(example.messages[: turn + 1], example.tools)
            prompt, text = renderings.prompts[index, turn], renderings.texts[index, turn + 1]
            span = verified_span(prompt, text, layout, example.messages[turn], turn, mask_empty_think)
            if isinstance(span, str):
                batch.dropped.append(DroppedRow(index, "unverified", f"messages[{turn}]: {span}"))
            else:
                spans.append(span)
        last_is_trained = bool(spans) and spans[-1].turn == len(example.messages) - 1
        full = spans[-1].text if last_is_trained else renderings.texts[index, len(example.messages)]
        shared = tuple(span for span in spans if full.startswith(span.text[: span.end]))
        alone = [span for span in spans if span not in shared]
        if self.settings.history == "mask":
            batch.masked_turns += len(alone)
            if spans and not shared:
                detail = "every turn renders differently as the last turn"
                batch.dropped.append(DroppedRow(index, "no_trained_turn", detail))
            alone = []
        rows: list[tuple[str, tuple[Span, ...]]] = [(span.text, (span,)) for span in alone]
        return [*rows, (full, shared)] if shared else rows

    # -- from texts to ids -------------------------------------------------------------------------------------------

    def _encode(self, drafts: Sequence[_Draft]) -> list[Encoded]:
        places = [[place for span in draft.spans for place in (span.start, span.end - 1)] for draft in drafts]
        return self.renderer.control_tokens.encode([draft.text for draft in drafts], places)

    def _spans(self, draft: _Draft, encoded: Encoded) -> list[tuple[int, int]] | DroppedRow:
        """Token spans of a draft, or why it is dropped."""
        spans: list[tuple[int, int]] = []
        for span in draft.spans:
            if (tokens := token_span(encoded, span, self._special_ids)) is None:
                detail = f"messages[{span.turn}]: a token joins the prompt and the answer"
                return DroppedRow(draft.example, "token_boundary", detail)
            spans.append(tokens)
        if self._bos_id is not None and np.count_nonzero(encoded.ids == self._bos_id) > 1:
            return DroppedRow(draft.example, "unverified", "more than one BOS token")
        return spans

    def _add(self, batch: LabelledBatch, draft: _Draft, encoded: Encoded, example: Example) -> None:
        """Put the draft's row into the batch, cut or dropped if it is too long."""
        spans = self._spans(draft, encoded)
        if isinstance(spans, DroppedRow):
            batch.dropped.append(spans)
            return
        row, limit, policy = self._row(draft, encoded.ids, spans), self.settings.max_length, self.settings.overlength
        if limit is None or len(row.ids) <= limit:
            batch.rows.append(row)
            return
        detail = f"{len(row.ids)} tokens, max_length is {limit}"
        if policy == "error":
            fix = f"raise max_length to {len(row.ids)}, or set overlength to drop or truncate"
            raise InputError(Problem(example.where, "max_length", detail, fix))
        fitting = [span for span, (_, end) in zip(draft.spans, spans, strict=True) if end <= limit]
        if policy == "truncate" and (shorter := self._cut_turns(row, draft, fitting, limit)):
            batch.rows.append(shorter)
        else:
            batch.dropped.append(DroppedRow(row.example, "overlength", detail, row.trained_tokens))

    def _row(self, draft: _Draft, ids: Ids, spans: Sequence[tuple[int, int]]) -> LabelledRow:
        if not draft.spans:  # raw text: every token is trained, from BOS, where the model knows one, to EOS
            eos_id = self.renderer.tokenizer.eos_token_id
            ids = np.array([*self._raw_start, *ids, *([eos_id] if ids[-1:].tolist() != [eos_id] else [])], np.int32)
        if not draft.spans or self.settings.train_on == "all":
            spans = [(0, len(ids))]
        turns = tuple(span.turn for span in draft.spans)
        return LabelledRow(draft.example, ids, spans, turns, neutralized=draft.neutralized)

    def _cut_turns(self, row: LabelledRow, draft: _Draft, fitting: list[Span], limit: int) -> LabelledRow | None:
        """The same conversation without its last turns, so that it fits; an answer is never cut."""
        for count in range(len(fitting), 0, -1):
            # The rendering that ends with the last turn that fits holds all earlier spans at the same places.
            shorter = dataclasses.replace(draft, text=fitting[count - 1].text, spans=tuple(fitting[:count]))
            encoded = self._encode([shorter])[0]
            spans = self._spans(shorter, encoded)
            if not isinstance(spans, DroppedRow) and len(encoded.ids) <= limit:
                kept = self._row(shorter, encoded.ids, spans)
                return dataclasses.replace(kept, lost_tokens=row.trained_tokens - kept.trained_tokens)
        return None


def _reasoning_apart(message: Message) -> Message:
    """The message with its inline reasoning in `reasoning_content`.

    Left inline its tags would be text of a message like any other, never the control tokens a reasoning model writes.
    """
    found = _INLINE_REASONING.fullmatch(message.get("content") or "") if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "reasoning_content": found[1].strip("\n"), "content": found[2].lstrip("\n")}
