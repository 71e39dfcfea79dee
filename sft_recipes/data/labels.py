"""Labels: which tokens of a conversation are trained.

One place of this project decides it, this one.

For every trained turn the loss covers exactly what the model has to produce when served: from the
end of the generation prompt through the content to the terminator. For assistant turn `i` of a
conversation let

    G = render(messages[:i], add_generation_prompt=True)      R = render(messages[:i + 1])

Where G is a prefix of R, the span is R[len(G):end]; where the generation prompt opens a think block
that R does not repeat, it starts at the content. `end` is just after the terminator that
`data/turns.py` found.

A row ends with its last trained turn. Its ids are what a server makes: those of the text before
that turn, then those of the turn as a continuation. They equal the tokenizer's ids of the whole
text except where a token would join the two (an answer that begins with a newline). A turn becomes
a row of its own (`history: expand`) or stays untrained (`mask`) where it is not served as it stands
in the longer conversation: because it renders differently there (Qwen3 drops earlier reasoning), or
because a token joins it there to the text before it.

Every span is verified; what cannot be verified is dropped with a reason, never guessed.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_recipes.data.admission import Admission, AdmittedRow
from sft_recipes.data.chat_templates import PROBE, ChatRenderer, begins_with_bos
from sft_recipes.data.encoding import EncodedSegments, Ids, SegmentedText
from sft_recipes.data.end_texts import EndTexts
from sft_recipes.data.labelled_rows import IGNORE_INDEX, DroppedRow, LabelledBatch, LabelledRow
from sft_recipes.data.spans import Renderings, Span, Turn, render_examples, turn_span
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings

__all__ = ["IGNORE_INDEX", "DroppedRow", "LabelledBatch", "LabelledRow", "Labeller"]

# A text of more than twice this many characters for each token that fits is looked at before it is
# tokenized, so many characters at a time.
CHARACTERS_A_TOKEN = 16
SLICE = 500_000
# A cut through a text may make a few tokens of one; this many are taken off for it.
TOKENS_OF_A_CUT = 16
# `longest_text` of those who measure rows of any length: so many characters take 1 GB to tokenize.
LONGEST_MEASURED = 4_000_000


@dataclass(frozen=True, slots=True)
class _Draft:
    """A training row before tokenization: its text and its verified spans, in order.

    Without spans it is plain text, not a conversation.
    """

    source: AdmittedRow
    text: str
    spans: tuple[Span, ...] = ()

    def segments(self) -> list[str]:
        """The text cut where spans begin and end: untrained, trained, untrained and so on."""
        segments: list[str] = []
        position = 0
        for span in self.spans:
            segments.append(self.text[position : span.start])
            segments.append(self.text[span.start : span.end])
            position = span.end
        segments.append(self.text[position:])
        return segments


@dataclass(frozen=True, slots=True)
class _EncodedDraft:
    """A draft with the ids of its segments: segment 2k + 1 is span k, others are untrained."""

    draft: _Draft
    segments: EncodedSegments

    def is_joined(self, number: int) -> bool:
        """Whether a token would join span `number` to the text before it."""
        return self.segments.joined[2 * number + 1]


class Labeller:
    """Turns examples into labelled rows through one renderer.

    `longest_text`: characters of a rendered row above which it is dropped as over-long unseen,
    whatever the settings. Raises CheckFailed when created if the template verifies nothing.
    """

    def __init__(
        self, renderer: ChatRenderer, settings: LabelSettings, longest_text: int | None = None
    ) -> None:
        self.renderer = renderer
        self.settings = settings
        self.longest_text = longest_text
        self._admission = Admission(renderer, settings)
        self._begins_with_bos = begins_with_bos(renderer.tokenizer)
        self._check_template()

    def _check_template(self) -> None:
        batch = LabelledBatch()
        probe = AdmittedRow(0, Example(PROBE, "probe", 0))
        if not self._draft([probe], batch):
            what = f"the template verifies nothing: {batch.dropped[0].detail}"
            fix = "use another chat_template; `sft-recipes inspect` shows the rendering"
            raise CheckFailed(str(Problem("recipe", "chat_template", what, fix)))

    @property
    def end_texts(self) -> EndTexts:
        """The texts of end tokens, by which answers are checked and, where asked, stripped."""
        return self._admission.end_texts

    def for_template(self, example: Example) -> Example:
        """The example as it is rendered, see `Admission`."""
        return self._admission.for_template(example)

    def label(self, examples: Sequence[Example]) -> LabelledBatch:
        """Label a batch. Rows keep the order of their examples.

        Nothing is lost without a DroppedRow. Each step takes the whole batch: one call that renders
        or tokenizes many texts is faster than many calls.
        """
        batch = LabelledBatch()
        admitted = self._admission.admit(examples, batch)
        drafts = self._draft(admitted, batch)
        drafts = self._without_huge(drafts, batch)
        for encoded in self._encode(drafts, batch):
            self._add(encoded, batch)
        batch.rows.sort(key=lambda row: (row.example, row.turns))
        return batch

    # -- drafts: texts with verified spans ---------------------------------------------------------

    def _draft(self, admitted: Sequence[AdmittedRow], batch: LabelledBatch) -> list[_Draft]:
        """The training rows that the examples become, as texts."""
        chats = {row.position: row.example for row in admitted if row.example.text is None}
        renderings = render_examples(self.renderer, chats, self._admission.trained_turns)
        drafts: list[_Draft] = []
        for row in admitted:
            refused = renderings.failed.get(row.position)
            if row.example.text is not None:
                drafts.append(_Draft(row, row.example.text))
            elif refused is not None:
                batch.dropped.append(DroppedRow(row.position, "template_error", refused))
            else:
                spans = self._verified_spans(row, renderings, batch)
                drafts += self._as_drafts(row, spans, batch)
        return drafts

    def _verified_spans(
        self, row: AdmittedRow, renderings: Renderings, batch: LabelledBatch
    ) -> list[Span]:
        """The spans of the trained turns; a turn that cannot be verified is dropped."""
        spans: list[Span] = []
        mask_empty_think = self.settings.empty_think == "mask"
        for turn in self._admission.trained_turns(row.example):
            key = Turn(row.position, turn)
            prompt = renderings.prompts[key]
            text = renderings.texts[key]
            span = turn_span(self.renderer, row.example, turn, prompt, text, mask_empty_think)
            if isinstance(span, str):
                detail = f"messages[{turn}]: {span}"
                batch.dropped.append(DroppedRow(row.position, "unverified", detail))
            else:
                spans.append(span)
        return spans

    def _as_drafts(
        self, row: AdmittedRow, spans: Sequence[Span], batch: LabelledBatch
    ) -> list[_Draft]:
        """The row that ends with the last span, and rows for turns that differ in it."""
        if not spans:
            return []
        whole = spans[-1].text
        shared: list[Span] = []
        differing: list[Span] = []
        for span in spans:
            if whole.startswith(span.verified_text):
                shared.append(span)
            else:
                differing.append(span)
        return [_Draft(row, whole, tuple(shared)), *self._own_rows(row, differing, batch)]

    def _own_rows(
        self, row: AdmittedRow, spans: Sequence[Span], batch: LabelledBatch
    ) -> list[_Draft]:
        """A row for each of these turns, or none where `history: mask` leaves them untrained."""
        if self.settings.history == "mask":
            batch.masked_turns += len(spans)
            return []
        return [_Draft(row, span.text, (span,)) for span in spans]

    # -- from texts to ids -------------------------------------------------------------------------

    def _encode(self, drafts: Sequence[_Draft], batch: LabelledBatch) -> list[_EncodedDraft]:
        """Ids of the drafts; turns that a token joins to the text before them leave their rows."""
        whole: list[_EncodedDraft] = []
        divided: list[_Draft] = []
        for encoded in self._encode_segments(drafts):
            draft = encoded.draft
            joined: list[Span] = []
            # The last span is a continuation by definition.
            for number, span in enumerate(draft.spans[:-1]):
                if encoded.is_joined(number):
                    joined.append(span)
            if joined:
                rest = tuple(span for span in draft.spans if span not in joined)
                divided.append(dataclasses.replace(draft, spans=rest))
                divided += self._own_rows(draft.source, joined, batch)
            else:
                whole.append(encoded)
        return [*whole, *self._encode_segments(divided)]

    def _encode_segments(self, drafts: Sequence[_Draft]) -> list[_EncodedDraft]:
        texts = [SegmentedText(draft.segments(), draft.source.markers) for draft in drafts]
        encoded = self.renderer.encoder.encode(texts)
        return list(map(_EncodedDraft, drafts, encoded))

    def _row(self, encoded: _EncodedDraft) -> LabelledRow:
        """The training row of a draft, however long it is."""
        draft = encoded.draft
        segments = encoded.segments
        position = draft.source.position
        if not draft.spans:
            ids = self._text_ids(draft, segments.ids[0])
            return LabelledRow(position, ids, [(0, len(ids))], ())
        spans: list[tuple[int, int]] = []
        end = 0
        for number, segment in enumerate(segments.ids):
            start = end
            end += len(segment)
            if number % 2:
                spans.append((start, end))
        if self.settings.train_on == "all":
            spans = [(0, end)]
        return LabelledRow(
            position,
            np.concatenate(segments.ids),
            spans,
            tuple(span.turn for span in draft.spans),
            neutralized=draft.source.markers is not None,
            joined=encoded.is_joined(len(draft.spans) - 1),
        )

    def _text_ids(self, draft: _Draft, ids: Ids) -> Ids:
        """Plain text is trained whole: from BOS, where the model knows one, to EOS.

        Rendered text brings its own.
        """
        tokenizer = self.renderer.tokenizer
        ends: tuple[str, ...] = (tokenizer.eos_token,)
        if draft.source.example.rendered:
            ends = tuple(self.renderer.special_tokens)
        parts: list[Ids] = [ids]
        if self._begins_with_bos and ids[:1].tolist() != [tokenizer.bos_token_id]:
            parts.insert(0, np.array([tokenizer.bos_token_id], np.int32))
        if not draft.text.rstrip().endswith(ends):
            parts.append(np.array([tokenizer.eos_token_id], np.int32))
        return np.concatenate(parts)

    # -- rows that are too long --------------------------------------------------------------------

    def _add(self, encoded: _EncodedDraft, batch: LabelledBatch) -> None:
        """Put the draft's row into the batch, cut or dropped if it is too long."""
        row = self._row(encoded)
        limit = self.settings.max_length
        if limit is None or len(row.ids) <= limit:
            batch.rows.append(row)
        else:
            self._too_long(encoded.draft, str(len(row.ids)), row.trained_tokens, batch)

    def _without_huge(self, drafts: Sequence[_Draft], batch: LabelledBatch) -> list[_Draft]:
        """The drafts less those that are too long for certain.

        A line of 50 MB would take 9 GB to tokenize.
        """
        measurable: list[_Draft] = []
        for draft in drafts:
            length = self._length_if_huge(draft.text)
            if length is None:
                measurable.append(draft)
            else:
                trained_characters = sum(span.end - span.start for span in draft.spans)
                trained_tokens = round(trained_characters / len(draft.text) * length)
                self._too_long(draft, f"about {length}", trained_tokens, batch)
        return measurable

    def _length_if_huge(self, text: str) -> int | None:
        """About how many tokens a text has that is too long for certain, else None.

        The text is not tokenized whole.
        """
        limit = self.settings.max_length
        if self.longest_text is not None and len(text) > self.longest_text:
            limit = 0
        if limit is None or len(text) <= 2 * CHARACTERS_A_TOKEN * limit:
            return None
        count = 0
        for start in range(0, CHARACTERS_A_TOKEN * limit + 1, SLICE):
            ids = self.renderer.text_ids(text[start : start + SLICE])
            count += max(0, len(ids) - TOKENS_OF_A_CUT)
            if count > limit:
                return round(count * len(text) / (start + SLICE))
        return None

    def _too_long(
        self, draft: _Draft, length: str, trained_tokens: int, batch: LabelledBatch
    ) -> None:
        """Cut or drop a row, or refuse it. `length`: how many tokens it has, in words."""
        limit = self.settings.max_length
        detail = f"{length} tokens, max_length is {limit}"
        if not limit:
            detail = f"{length} tokens, too many to be measured"
        if self.settings.overlength == "error":
            fix = "raise max_length to that, or set overlength to drop or truncate"
            where = draft.source.example.where
            raise InputError(Problem(where, "max_length", detail, fix))
        shorter = None
        if self.settings.overlength == "truncate":
            shorter = self._cut_turns(draft, trained_tokens)
        if shorter is not None:
            batch.rows.append(shorter)
        else:
            position = draft.source.position
            batch.dropped.append(DroppedRow(position, "overlength", detail, trained_tokens))

    def _cut_turns(self, draft: _Draft, trained_tokens: int) -> LabelledRow | None:
        """The same conversation without its last turns, so that it fits; an answer is never cut."""
        limit = self.settings.max_length or 0
        for count in range(len(draft.spans) - 1, 0, -1):
            # The rendering that ends with an earlier turn holds the turns before it at the same
            # places.
            spans = draft.spans[:count]
            shorter = dataclasses.replace(draft, text=spans[-1].text, spans=spans)
            if self._length_if_huge(shorter.text) is not None:
                continue
            (encoded,) = self._encode_segments([shorter])
            row = self._row(encoded)
            if len(row.ids) <= limit:
                return dataclasses.replace(row, lost_tokens=trained_tokens - row.trained_tokens)
        return None
