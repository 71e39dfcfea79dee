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

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data.chat_templates import PROBE, TEMPLATE_ERRORS, ChatRenderer
from sft_recipes.data.spans import Renderings, Span, render_examples, token_span, verified_span
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import LabelSettings

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One training row. `labels[k]` is `input_ids[k]` where trained, else -100.

    `example` indexes the examples that were passed in; `turns` are the message indices trained in this row.
    `lost_tokens`: trained tokens removed with whole trailing turns by `overlength: truncate`.
    `neutralized`: text that spells control tokens was tokenized as text.
    """

    example: int
    input_ids: list[int]
    labels: list[int]
    turns: tuple[int, ...]
    lost_tokens: int = 0
    neutralized: bool = False

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not trained, why, and how many tokens (all, trained) went with it where that is known."""

    example: int
    reason: str
    detail: str
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(slots=True)
class LabelledBatch:
    """What became of a batch: every example is in `rows`, in `dropped`, or in both (turns that became own rows)."""

    rows: list[LabelledRow] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)
    masked_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before tokenization: its text and its verified spans."""

    example: int
    text: str
    spans: tuple[Span, ...]


class Labeller:
    """Turns examples into labelled rows through one renderer.

    Raises CheckFailed when created if the template verifies nothing.
    """

    def __init__(self, renderer: ChatRenderer, settings: LabelSettings) -> None:
        self.renderer = renderer
        self.settings = settings
        self._special_ids = set(renderer.special_tokens.values())
        self._backend = renderer.tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._check_template()

    def _check_template(self) -> None:
        batch = LabelledBatch()
        drafts = self._draft({0: Example(messages=PROBE, source="probe", row=0)}, batch)
        encodings = self._encode(drafts)
        if (
            encodings
            and encodings[0].ids != self.renderer.tokenizer(drafts[0].text, add_special_tokens=False)["input_ids"]
        ):
            what = "its tokenizer gives other ids in a batch than alone"
            raise CheckFailed(str(Problem("recipe", "model_name_or_path", what, "report this tokenizer")))
        if not encodings or not self._spans(batch, drafts[0], encodings[0]):
            what = f"the template verifies nothing: {batch.dropped[0].detail}"
            fix = "use another chat_template; `sft-recipes inspect` shows the rendering"
            raise CheckFailed(str(Problem("recipe", "chat_template", what, fix)))

    def label(self, examples: Sequence[Example]) -> LabelledBatch:
        """Label a batch. Rows keep the order of their examples; nothing is lost without a DroppedRow."""
        batch = LabelledBatch()
        plain: dict[int, Example] = {}
        for index, original in enumerate(examples):
            example = self.with_system_prompt(original)
            if example.text is not None:
                self._add_raw(batch, example, index)
            elif not self._trained_turns(example):
                batch.dropped.append(
                    DroppedRow(index, "no_trained_turn", "no assistant turn of this row may be trained")
                )
            elif self.renderer.spells_control_tokens(example.messages, example.tools):
                self._add_hostile(batch, example, index)
            else:
                plain[index] = example
        drafts = self._draft(plain, batch)
        for draft, encoding in zip(drafts, self._encode(drafts), strict=True):
            self._add(batch, plain[draft.example], draft, encoding)
        batch.rows.sort(key=lambda row: (row.example, row.turns))
        return batch

    def with_system_prompt(self, example: Example) -> Example:
        """The example with the recipe's system prompt first, unless it brings its own."""
        prompt = self.settings.system_prompt
        if not prompt or example.text is not None or example.messages[0]["role"] == "system":
            return example
        messages: list[Message] = [{"role": "system", "content": prompt}, *example.messages]
        train = (False, *example.train) if example.train else ()
        return dataclasses.replace(example, messages=messages, train=train)

    def _trained_turns(self, example: Example) -> list[int]:
        turns = [index for index in range(len(example.messages)) if example.is_trainable(index)]
        return turns[-1:] if self.settings.train_on == "last_assistant" else turns

    # -- drafts: texts with verified spans ---------------------------------------------------------------------------

    def _draft(self, examples: Mapping[int, Example], batch: LabelledBatch) -> list[_Draft]:
        renderings = render_examples(self.renderer, examples, self._trained_turns)
        for index, detail in renderings.failed.items():
            batch.dropped.append(DroppedRow(index, "template_error", detail))
        drafts: list[_Draft] = []
        for index, example in examples.items():
            if index not in renderings.failed:
                drafts += self._draft_one(example, index, renderings, batch)
        return drafts

    def _draft_one(self, example: Example, index: int, renderings: Renderings, batch: LabelledBatch) -> list[_Draft]:
        spans: list[Span] = []
        mask_empty_think = self.settings.empty_think == "mask"
        for turn in self._trained_turns(example):
            layout = self.renderer.layouts.find(example.messages[: turn + 1], example.tools)
            rendering = renderings.turns[index, turn]
            span = verified_span(rendering, layout, example.messages[turn], turn, mask_empty_think)
            if isinstance(span, str):
                batch.dropped.append(DroppedRow(index, "unverified", f"messages[{turn}]: {span}"))
            else:
                spans.append(span)
        last_is_trained = bool(spans) and spans[-1].turn == len(example.messages) - 1
        full = spans[-1].text if last_is_trained else renderings.full[index]
        shared = tuple(span for span in spans if full.startswith(span.text[: span.end]))
        alone = [span for span in spans if span not in shared]
        if self.settings.history == "mask":
            batch.masked_turns += len(alone)
            if spans and not shared:
                detail = "every turn renders differently as the last turn"
                batch.dropped.append(DroppedRow(index, "no_trained_turn", detail))
            alone = []
        drafts = [_Draft(index, span.text, (span,)) for span in alone]
        return [*drafts, _Draft(index, full, shared)] if shared else drafts

    # -- from texts to ids -------------------------------------------------------------------------------------------

    def _encode(self, drafts: Sequence[_Draft]) -> list[Any]:
        return self._backend.encode_batch([draft.text for draft in drafts], add_special_tokens=False) if drafts else []

    def _spans(self, batch: LabelledBatch, draft: _Draft, encoding: Any) -> list[tuple[int, int]] | None:
        """Token spans of a draft, or None with the reason in `batch.dropped`."""
        spans: list[tuple[int, int]] = []
        for span in draft.spans:
            tokens = token_span(encoding, span, self._special_ids)
            if tokens is None:
                detail = f"messages[{span.turn}]: a token joins the prompt and the answer"
                batch.dropped.append(DroppedRow(draft.example, "token_boundary", detail, len(encoding.ids)))
                return None
            spans.append(tokens)
        if self._has_second_bos(encoding.ids):
            batch.dropped.append(DroppedRow(draft.example, "unverified", "more than one BOS token", len(encoding.ids)))
            return None
        return spans

    def _has_second_bos(self, ids: list[int]) -> bool:
        tokenizer = self.renderer.tokenizer
        bos = tokenizer.bos_token_id
        # Some models use one token for both ends; then it stands after every turn and says nothing about BOS.
        return bos is not None and bos not in self.renderer.stop_ids and ids.count(bos) > 1

    def _add(self, batch: LabelledBatch, example: Example, draft: _Draft, encoding: Any) -> None:
        spans = self._spans(batch, draft, encoding)
        if spans is None:
            return
        row = self._row(draft.example, encoding.ids, spans, tuple(span.turn for span in draft.spans))
        limit = self.settings.max_length
        if limit is None or len(row.input_ids) <= limit:
            batch.rows.append(row)
            return
        fitting = [span for span, (_, end) in zip(draft.spans, spans, strict=True) if end <= limit]
        shorter = self._cut_turns(row, fitting, limit) if self.settings.overlength == "truncate" else None
        if shorter is not None:
            batch.rows.append(shorter)
        else:
            self._drop_overlength(batch, example, row)

    def _row(
        self, example: int, ids: list[int], spans: Sequence[tuple[int, int]], turns: tuple[int, ...]
    ) -> LabelledRow:
        if self.settings.train_on == "all":
            return LabelledRow(example, ids, list(ids), turns)
        labels = [IGNORE_INDEX] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return LabelledRow(example, ids, labels, turns)

    def _cut_turns(self, row: LabelledRow, fitting: list[Span], limit: int) -> LabelledRow | None:
        """The same conversation without its last turns, so that it fits; an answer is never cut."""
        while fitting:
            # The rendering that ends with the last turn that fits holds all earlier spans at the same places.
            draft = _Draft(row.example, fitting[-1].text, tuple(fitting))
            encoding = self._encode([draft])[0]
            spans = self._spans(LabelledBatch(), draft, encoding)
            if spans is not None and len(encoding.ids) <= limit:
                kept = self._row(row.example, encoding.ids, spans, tuple(span.turn for span in fitting))
                return dataclasses.replace(kept, lost_tokens=row.trained_tokens - kept.trained_tokens)
            fitting = fitting[:-1]
        return None

    def _drop_overlength(self, batch: LabelledBatch, example: Example, row: LabelledRow) -> None:
        detail = f"{len(row.input_ids)} tokens, max_length is {self.settings.max_length}"
        if self.settings.overlength == "error":
            fix = f"raise max_length to {len(row.input_ids)}, or set overlength to drop or truncate"
            raise InputError(Problem(example.where, "max_length", detail, fix))
        dropped = DroppedRow(row.example, "overlength", detail, len(row.input_ids), row.trained_tokens)
        batch.dropped.append(dropped)

    # -- rows whose text spells control tokens, and raw text --------------------------------------------------------

    def _add_hostile(self, batch: LabelledBatch, example: Example, index: int) -> None:
        policy = self.settings.control_tokens
        if policy == "error":
            fix = "clean the row, or set control_tokens to neutralize (the text stays, as text) or drop"
            raise InputError(Problem(example.where, "messages", "the text spells control tokens", fix))
        if policy == "drop":
            batch.dropped.append(DroppedRow(index, "control_tokens", "the text spells control tokens"))
            return
        try:
            self._add_neutralized(batch, example, index)
        except TEMPLATE_ERRORS as error:
            batch.dropped.append(DroppedRow(index, "template_error", f"the template refuses this row: {error}"))

    def _add_neutralized(self, batch: LabelledBatch, example: Example, index: int) -> None:
        """The same contract on ids: `sanitize_control_tokens` gives the ids, prefixes of ids give the spans."""
        last = len(example.messages) - 1
        turns: dict[int, tuple[list[int], int, int]] = {}
        for turn in self._trained_turns(example):
            found = self._neutralized_turn(example, turn)
            if isinstance(found, str):
                batch.dropped.append(DroppedRow(index, "unverified", f"messages[{turn}]: {found}"))
            else:
                turns[turn] = found
        full = turns[last][0] if last in turns else self.renderer.sanitized_ids(example.messages, example.tools)
        shared = {turn: span for turn, span in turns.items() if full[: span[2]] == span[0][: span[2]]}
        alone = {turn: span for turn, span in turns.items() if turn not in shared}
        if self.settings.history == "mask":
            batch.masked_turns += len(alone)
            alone = {}
        rows = [self._row(index, ids, [(start, end)], (turn,)) for turn, (ids, start, end) in alone.items()]
        if shared:
            spans = [(start, end) for _, start, end in shared.values()]
            rows.append(self._row(index, full, spans, tuple(shared)))
        for row in rows:
            if self.settings.max_length is not None and len(row.input_ids) > self.settings.max_length:
                self._drop_overlength(batch, example, row)
            else:
                batch.rows.append(dataclasses.replace(row, neutralized=True))

    def _neutralized_turn(self, example: Example, turn: int) -> tuple[list[int], int, int] | str:
        """(ids that end with the turn, start, end) in tokens, or what could not be verified."""
        messages, tools = example.messages, example.tools
        layout = self.renderer.layouts.find(messages[: turn + 1], tools)
        if layout is None or layout.terminator is None:
            return "the template gives no clear place for the answer"
        tokenizer = self.renderer.tokenizer
        prompt = self.renderer.sanitized_ids(messages[:turn], tools, add_generation_prompt=True)
        ids = self.renderer.sanitized_ids(messages[: turn + 1], tools)
        rest, header, think, closing = (
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            for text in (layout.prompt_rest, layout.header, layout.empty_think, layout.closing)
        )
        ids = ids + closing
        cut = len(prompt) - len(rest)
        if prompt[cut:] != rest or ids[:cut] != prompt[:cut] or ids[cut : cut + len(header)] != header:
            return "the generation prompt is not where the template put it for a turn of this shape"
        start = cut + len(header)
        if self.settings.empty_think == "mask" and think and ids[start : start + len(think)] == think:
            start += len(think)
        terminator = self.renderer.special_tokens[layout.terminator]
        # Text can no longer spell the terminator, so its last occurrence is the template's own.
        end = len(ids) - ids[::-1].index(terminator) if terminator in ids[start:] else start
        answer = "".join(str(messages[turn].get("content") or "").split())
        if end <= start or answer not in "".join(tokenizer.decode(ids[start:end]).split()):
            return "the template rewrote the answer"
        return ids, start, end

    def _add_raw(self, batch: LabelledBatch, example: Example, index: int) -> None:
        """`format: raw`: the text as it stands plus EOS, every token trained."""
        tokenizer = self.renderer.tokenizer
        ids = tokenizer(example.text, split_special_tokens=self.settings.control_tokens == "neutralize")["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        row = LabelledRow(index, ids, list(ids), ())
        if self.settings.max_length is not None and len(ids) > self.settings.max_length:
            self._drop_overlength(batch, example, row)
        else:
            batch.rows.append(row)
