"""Labels: which tokens of a conversation are trained. One place of this project decides it, this one.

For every trained turn the loss covers exactly what the model has to produce when served: from the end of the
generation prompt through the content to the terminator. For assistant turn `i` of a conversation let

    G = render(messages[:i], add_generation_prompt=True)      R = render(messages[:i + 1])

Where G is a prefix of R, the span is R[len(G):end]; where the generation prompt opens a think block that R does not
repeat, it starts at the content. `end` is just after the terminator that `data/turns.py` found.

A row ends with its last trained turn. Its ids are what a server makes: those of the text before that turn, then those
of the turn as a continuation. They equal the tokenizer's ids of the whole text except where a token would join the
two (an answer that begins with a newline). A turn becomes a row of its own (`history: expand`) or stays untrained
(`mask`) where it is not served as it stands in the longer conversation: because it renders differently there (Qwen3
drops earlier reasoning), or because a token joins it there to the text before it.

Every span is verified; what cannot be verified is dropped with a reason, never guessed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sft_recipes.data.chat_templates import PROBE, ChatRenderer, begins_with_bos
from sft_recipes.data.encoding import EncodedSegments, Ids, Markers, SegmentedText, all_text
from sft_recipes.data.end_texts import EndTexts
from sft_recipes.data.fitting import fit_messages
from sft_recipes.data.labelled_rows import IGNORE_INDEX, DroppedRow, LabelledBatch, LabelledRow
from sft_recipes.data.spans import Renderings, Span, Turn, render_examples, turn_span
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings

__all__ = ["IGNORE_INDEX", "DroppedRow", "LabelledBatch", "LabelledRow", "Labeller"]

# A text of more than twice this many characters for each token that fits is looked at before it is tokenized, so many
# characters at a time.
CHARACTERS_A_TOKEN = 16
SLICE = 500_000
# `longest_text` of those who measure rows of any length: so many characters take 1 GB to tokenize.
LONGEST_MEASURED = 4_000_000


@dataclass(frozen=True, slots=True)
class _Accepted:
    """An example as it is rendered; `markers` are set where control tokens in its text were marked."""

    example: Example
    markers: Markers | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before tokenization: its text and its verified spans (none: plain text, not a conversation)."""

    example: int
    text: str
    spans: tuple[Span, ...]
    markers: Markers | None

    def segments(self) -> list[str]:
        """The text cut where trained spans begin and end: untrained, trained, untrained and so on."""
        segments: list[str] = []
        position = 0
        for span in self.spans:
            segments += [self.text[position : span.start], self.text[span.start : span.end]]
            position = span.end
        segments.append(self.text[position:])
        return segments


class Labeller:
    """Turns examples into labelled rows through one renderer.

    `longest_text`: characters of a rendered row above which it is dropped as over-long unseen, whatever the settings.
    Raises CheckFailed when created if the template verifies nothing.
    """

    def __init__(
        self, renderer: ChatRenderer, settings: LabelSettings, longest_text: int | None = None
    ) -> None:
        self.renderer = renderer
        self.settings = settings
        self.longest_text = longest_text
        self.end_texts = EndTexts(renderer)
        self._strips_ends = settings.control_tokens == "strip_end"
        self._begins_with_bos = begins_with_bos(renderer.tokenizer)
        self._check_template()

    def _check_template(self) -> None:
        batch = LabelledBatch()
        drafts = self._draft({0: _Accepted(Example(PROBE, "probe", 0))}, batch)
        if not drafts:
            what = f"the template verifies nothing: {batch.dropped[0].detail}"
            fix = "use another chat_template; `sft-recipes inspect` shows the rendering"
            raise CheckFailed(str(Problem("recipe", "chat_template", what, fix)))

    def label(self, examples: Sequence[Example]) -> LabelledBatch:
        """Label a batch. Rows keep the order of their examples; nothing is lost without a DroppedRow."""
        batch = LabelledBatch()
        accepted = self._accept(examples, batch)
        drafts = self._draft(accepted, batch)
        drafts = self._without_huge(drafts, accepted, batch)
        for draft, encoded in self._encode(drafts, batch):
            self._add(draft, encoded, accepted[draft.example].example, batch)
        batch.rows.sort(key=lambda row: (row.example, row.turns))
        return batch

    # -- which rows, and as what -------------------------------------------------------------------------------------

    def _accept(self, examples: Sequence[Example], batch: LabelledBatch) -> dict[int, _Accepted]:
        """The examples that may be trained, as they are rendered."""
        accepted: dict[int, _Accepted] = {}
        for index, original in enumerate(examples):
            example = self.for_template(original)
            if self._strips_ends and self.end_texts.strip_answers(original) is not original:
                batch.stripped.add(index)
            refusal = self._refusal(example, index in batch.stripped)
            if refusal is not None:
                batch.dropped.append(dataclasses.replace(refusal, example=index))
                continue
            text = all_text(example.messages, example.tools, example.text)
            token = None if example.rendered else self.renderer.encoder.first_control_token(text)
            if token is None:
                accepted[index] = _Accepted(example)
            elif self._may_neutralize(example, token, index, batch):
                accepted[index] = self._marked(example, self.renderer.encoder.markers_for(text))
        return accepted

    def _refusal(self, example: Example, is_stripped: bool) -> DroppedRow | None:
        """Why the data or the recipe keeps this row from being trained, or None."""
        if example.text is not None:
            return None
        if not self._trained_turns(example):
            return DroppedRow(0, "no_trained_turn", "no assistant turn of this row may be trained")
        asked = example.asks_to_train_others
        if asked is not None and self.settings.train_on != "all":
            role = example.messages[asked]["role"]
            detail = f"messages[{asked}].train asks to train a {role} turn; set train_on: all, or remove the flag"
            return DroppedRow(0, "asks_to_train_others", detail)
        if is_stripped:
            for index in self._trained_turns(example):
                message = example.messages[index]
                if not message["content"] and not message.get("tool_calls"):
                    return DroppedRow(
                        0,
                        "empty_answer",
                        f"messages[{index}] is nothing but the text of an end token",
                    )
        return None

    def _may_neutralize(
        self, example: Example, token: str, index: int, batch: LabelledBatch
    ) -> bool:
        """Apply the recipe's `control_tokens` to a row whose text spells one."""
        policy = self.settings.control_tokens
        if policy == "error":
            what = f"the text spells the control token {token!r}"
            fix = "clean the row, or set control_tokens to neutralize (the text stays, as text) or drop"
            raise InputError(Problem(example.where, "messages", what, fix))
        detail = f"the text spells the control token {token!r}"
        if policy == "drop":
            batch.dropped.append(DroppedRow(index, "control_tokens", detail))
            return False
        if example.text is not None:
            # Raw text with control tokens is either rendered already or broken; as pieces it would teach neither.
            detail += "; if a chat template rendered it already, set `format: rendered`, else control_tokens: drop"
            batch.dropped.append(DroppedRow(index, "control_tokens", detail))
            return False
        return True

    def _marked(self, example: Example, markers: Markers) -> _Accepted:
        encoder = self.renderer.encoder
        messages = encoder.mark(example.messages, markers)
        tools = encoder.mark(example.tools, markers)
        return _Accepted(dataclasses.replace(example, messages=messages, tools=tools), markers)

    def for_template(self, example: Example) -> Example:
        """The example as it is rendered: the recipe's system prompt first unless it brings its own, reasoning and calls
        in the form that the template needs, and where the recipe says so no text of an end token behind an answer.
        """
        if self._strips_ends:
            example = self.end_texts.strip_answers(example)
        if example.text is not None:
            return example
        messages = fit_messages(example.messages, self.renderer.needs)
        train = example.train
        prompt = self.settings.system_prompt
        if prompt and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": prompt}, *messages]
            train = (False, *train) if train else ()
        if messages is example.messages:
            return example
        return dataclasses.replace(example, messages=messages, train=train)

    def _trained_turns(self, example: Example) -> list[int]:
        turns = [index for index in range(len(example.messages)) if example.is_trainable(index)]
        return turns[-1:] if self.settings.train_on == "last_assistant" else turns

    # -- drafts: texts with verified spans ---------------------------------------------------------------------------

    def _draft(self, accepted: Mapping[int, _Accepted], batch: LabelledBatch) -> list[_Draft]:
        chats = {index: row.example for index, row in accepted.items() if row.example.text is None}
        renderings = render_examples(self.renderer, chats, self._trained_turns)
        drafts: list[_Draft] = []
        for index, row in accepted.items():
            if row.example.text is not None:
                drafts.append(_Draft(index, row.example.text, (), None))
            elif index in renderings.failed:
                batch.dropped.append(DroppedRow(index, "template_error", renderings.failed[index]))
            else:
                spans = self._verified_spans(row.example, index, renderings, batch)
                drafts += self._as_drafts(index, spans, row.markers, batch)
        return drafts

    def _verified_spans(
        self, example: Example, index: int, renderings: Renderings, batch: LabelledBatch
    ) -> list[Span]:
        spans: list[Span] = []
        mask_empty_think = self.settings.empty_think == "mask"
        for turn in self._trained_turns(example):
            key = Turn(index, turn)
            prompt, text = renderings.prompts[key], renderings.texts[key]
            span = turn_span(self.renderer, example, turn, prompt, text, mask_empty_think)
            if isinstance(span, str):
                batch.dropped.append(DroppedRow(index, "unverified", f"messages[{turn}]: {span}"))
            else:
                spans.append(span)
        return spans

    def _as_drafts(
        self, index: int, spans: Sequence[Span], markers: Markers | None, batch: LabelledBatch
    ) -> list[_Draft]:
        """The row that ends with the last span, and a row of its own for each turn that renders differently there."""
        if not spans:
            return []
        full = spans[-1].text
        shared = tuple(span for span in spans if full.startswith(span.verified_text))
        apart = [span for span in spans if span not in shared]
        return [_Draft(index, full, shared, markers), *self._own_rows(index, apart, markers, batch)]

    def _own_rows(
        self, index: int, spans: Sequence[Span], markers: Markers | None, batch: LabelledBatch
    ) -> list[_Draft]:
        """A row for each of these turns, or none where `history: mask` leaves them untrained."""
        if self.settings.history == "mask":
            batch.masked_turns += len(spans)
            return []
        return [_Draft(index, span.text, (span,), markers) for span in spans]

    # -- from texts to ids -------------------------------------------------------------------------------------------

    def _encode(
        self, drafts: Sequence[_Draft], batch: LabelledBatch
    ) -> list[tuple[_Draft, EncodedSegments]]:
        """Ids of the drafts; earlier turns that a token joins to the text before them have left their rows."""
        encoded = self._encode_segments(drafts)
        whole: list[tuple[_Draft, EncodedSegments]] = []
        again: list[_Draft] = []
        for draft, segments in zip(drafts, encoded, strict=True):
            # Segment 2k + 1 is span k. The last span is a continuation by definition.
            joined = [
                span
                for number, span in enumerate(draft.spans[:-1])
                if segments.joined[2 * number + 1]
            ]
            if not joined:
                whole.append((draft, segments))
                continue
            kept = tuple(span for span in draft.spans if span not in joined)
            again += [dataclasses.replace(draft, spans=kept)]
            again += self._own_rows(draft.example, joined, draft.markers, batch)
        return [*whole, *zip(again, self._encode_segments(again), strict=True)]

    def _encode_segments(self, drafts: Sequence[_Draft]) -> list[EncodedSegments]:
        return self.renderer.encoder.encode(
            [SegmentedText(draft.segments(), draft.markers) for draft in drafts]
        )

    def _without_huge(
        self, drafts: Sequence[_Draft], accepted: Mapping[int, _Accepted], batch: LabelledBatch
    ) -> list[_Draft]:
        """The drafts less those that are too long for certain: a line of 50 MB would take 9 GB to tokenize."""
        kept: list[_Draft] = []
        for draft in drafts:
            length = self._length_if_huge(draft.text)
            if length is None:
                kept.append(draft)
            else:
                share = sum(span.end - span.start for span in draft.spans) / len(draft.text)
                self._too_long(
                    draft,
                    f"about {length}",
                    round(share * length),
                    accepted[draft.example].example,
                    batch,
                )
        return kept

    def _length_if_huge(self, text: str) -> int | None:
        """About how many tokens a text has that is too long for certain, without tokenizing it whole, else None."""
        limit = self.settings.max_length
        if self.longest_text is not None and len(text) > self.longest_text:
            limit = 0
        if limit is None or len(text) <= 2 * CHARACTERS_A_TOKEN * limit:
            return None
        count = 0
        for start in range(0, CHARACTERS_A_TOKEN * limit + 1, SLICE):
            # A cut may make a few tokens of one.
            count += max(0, len(self.renderer.text_ids(text[start : start + SLICE])) - 16)
            if count > limit:
                return round(count * len(text) / (start + SLICE))
        return None

    def _add(
        self, draft: _Draft, encoded: EncodedSegments, example: Example, batch: LabelledBatch
    ) -> None:
        """Put the draft's row into the batch, cut or dropped if it is too long."""
        row = self._row(draft, encoded, example)
        limit = self.settings.max_length
        if limit is None or len(row.ids) <= limit:
            batch.rows.append(row)
            return
        self._too_long(draft, str(len(row.ids)), row.trained_tokens, example, batch)

    def _too_long(
        self,
        draft: _Draft,
        length: str,
        trained_tokens: int,
        example: Example,
        batch: LabelledBatch,
    ) -> None:
        """Cut or drop a row, or refuse it. `length`: how many tokens it has, in words."""
        limit = self.settings.max_length
        detail = (
            f"{length} tokens, max_length is {limit}"
            if limit
            else f"{length} tokens, too many to be measured"
        )
        if self.settings.overlength == "error":
            fix = "raise max_length to that, or set overlength to drop or truncate"
            raise InputError(Problem(example.where, "max_length", detail, fix))
        shorter = None
        if self.settings.overlength == "truncate":
            shorter = self._cut_turns(draft, trained_tokens, example)
        if shorter is not None:
            batch.rows.append(shorter)
        else:
            batch.dropped.append(DroppedRow(draft.example, "overlength", detail, trained_tokens))

    def _row(self, draft: _Draft, encoded: EncodedSegments, example: Example) -> LabelledRow:
        if not draft.spans:
            ids = self._text_ids(draft.text, encoded.ids[0], example.rendered)
            return LabelledRow(draft.example, ids, [(0, len(ids))], ())
        ends = np.cumsum([len(ids) for ids in encoded.ids]).tolist()
        spans = [(ends[2 * number], ends[2 * number + 1]) for number in range(len(draft.spans))]
        if self.settings.train_on == "all":
            spans = [(0, ends[-1])]
        return LabelledRow(
            draft.example,
            np.concatenate(encoded.ids),
            spans,
            tuple(span.turn for span in draft.spans),
            neutralized=draft.markers is not None,
            joined=encoded.joined[2 * len(draft.spans) - 1],
        )

    def _text_ids(self, text: str, ids: Ids, is_rendered: bool) -> Ids:
        """Plain text is trained whole: from BOS, where the model knows one, to EOS. Rendered text brings its own."""
        tokenizer = self.renderer.tokenizer
        ends = tuple(self.renderer.special_tokens) if is_rendered else (tokenizer.eos_token,)
        parts: list[Ids] = [ids]
        if self._begins_with_bos and ids[:1].tolist() != [tokenizer.bos_token_id]:
            parts.insert(0, np.array([tokenizer.bos_token_id], np.int32))
        if not text.rstrip().endswith(ends):
            parts.append(np.array([tokenizer.eos_token_id], np.int32))
        return np.concatenate(parts)

    def _cut_turns(
        self, draft: _Draft, trained_tokens: int, example: Example
    ) -> LabelledRow | None:
        """The same conversation without its last turns, so that it fits; an answer is never cut."""
        limit = self.settings.max_length or 0
        for count in range(len(draft.spans) - 1, 0, -1):
            # The rendering that ends with an earlier turn holds the turns before it at the same places.
            spans = draft.spans[:count]
            shorter = dataclasses.replace(draft, text=spans[-1].text, spans=spans)
            if self._length_if_huge(shorter.text) is not None:
                continue
            kept = self._row(shorter, self._encode_segments([shorter])[0], example)
            if len(kept.ids) <= limit:
                return dataclasses.replace(kept, lost_tokens=trained_tokens - kept.trained_tokens)
        return None
