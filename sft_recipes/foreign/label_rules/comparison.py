"""Rows of this project beside those that another tool would make of the same examples, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.inspection import TokensAndLabels
from sft_recipes.data.labelled_rows import IGNORE_INDEX, DroppedRow, LabelledBatch, LabelledRow
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    LabelRules,
    NotComputed,
    TheirOutcome,
    TheirRow,
    shared_length,
)
from sft_recipes.messages import Example

# So much of a text is shown on either side of the first character that differs.
_SHOWN = 40


@dataclass(frozen=True)
class LabelDifference:
    """An example of which another tool trains something else, and in words what.

    `ours`: of several rows, the one that holds the whole conversation.
    """

    example: Example
    ours: LabelledRow | DroppedRow
    theirs: TheirRow | DroppedThere
    words: Sequence[str]


@dataclass
class LabelComparison:
    """What came of a comparison. `not_computed`: reasons, each once."""

    same: int = 0
    differences: list[LabelDifference] = field(default_factory=list)
    not_computed: list[str] = field(default_factory=list)


def compare_labels(
    examples: Sequence[Example],
    ours: LabelledBatch,
    theirs: Sequence[TheirOutcome],
    renderer: ChatRenderer,
    rules: LabelRules,
) -> LabelComparison:
    """Compare what became of examples here and there, in their order."""
    rows: dict[int, list[LabelledRow]] = {}
    for row in ours.rows:
        rows.setdefault(row.example, []).append(row)
    dropped = {row.example: row for row in ours.dropped}
    words = _Words(renderer, rules.tool)
    comparison = LabelComparison()
    for number, their_row in enumerate(theirs):
        if isinstance(their_row, NotComputed):
            if their_row.reason not in comparison.not_computed:
                comparison.not_computed.append(their_row.reason)
            continue
        our_rows = rows.get(number, [])
        found = list(words.of(examples[number], our_rows, dropped.get(number), their_row))
        if found:
            our_row = our_rows[-1] if our_rows else dropped[number]
            difference = LabelDifference(examples[number], our_row, their_row, found)
            comparison.differences.append(difference)
        else:
            comparison.same += 1
    return comparison


@dataclass(frozen=True)
class _Trained:
    """What a row trains.

    `answers`: of each answer, whether it is trained; `turns`: the trained texts, answers as `…`.
    """

    prompt: bool
    answers: list[bool]
    end: bool
    turns: list[str]


class _Words:
    """Says how rows differ."""

    def __init__(self, renderer: ChatRenderer, tool: str) -> None:
        self._tokenizer = renderer.tokenizer
        self._special = renderer.special_tokens
        self._tool = tool

    def of(
        self,
        example: Example,
        ours: Sequence[LabelledRow],
        dropped: DroppedRow | None,
        theirs: TheirRow | DroppedThere,
    ) -> Iterator[str]:
        """What differs, one sentence each; nothing where the same is trained.

        `dropped`: why turns of the example, or all of it, are not trained here.
        """
        if isinstance(theirs, TheirRow) and max(theirs.input_ids) >= len(self._tokenizer):
            yield f"{self._tool} adds tokens to the vocabulary"
            return
        if isinstance(theirs, DroppedThere):
            if ours:
                yield f"{self._tool} makes no row of it: {theirs.reason}"
            return
        if ours:
            whole = theirs.whole or theirs
            yield from self._text_words(ours[-1], whole)
            yield from self._trained_words(example, ours, whole)
        elif dropped is not None:
            yield f"the row is dropped here, {dropped.reason}: {dropped.detail}"
        if theirs.whole is not None:
            yield from self._cut_words(theirs, theirs.whole)

    # -- the text ----------------------------------------------------------------------------------

    def _text_words(self, ours: LabelledRow, theirs: TheirRow) -> Iterator[str]:
        our_ids = ours.input_ids
        their_ids = theirs.input_ids
        if _begins_with(their_ids, our_ids) and not _is_trained(theirs.labels[len(our_ids) :]):
            return
        our_text = self._decode(our_ids)
        their_text = self._decode(their_ids)
        if our_text == their_text:
            yield (
                f"{self._tool} makes other tokens of the same text, since it encodes it in pieces "
                f"({len(their_ids)} there, {len(our_ids)} here)"
            )
            return
        bos = self._tokenizer.bos_token or "\0"
        here = _leading(bos, our_text)
        there = _leading(bos, their_text)
        if there < here:
            yield f"{self._tool} writes no {bos} before the row"
        elif there > here:
            yield f"{self._tool} writes one more {bos} before the row"
        our_text = our_text[here * len(bos) :]
        their_text = their_text[there * len(bos) :]
        if their_text.startswith(our_text) and their_text != our_text:
            yield f"{self._tool} goes on behind the last answer: {their_text[len(our_text) :]!r}"
        elif their_text != our_text:
            start = shared_length(their_text, our_text)
            theirs_there = their_text[start : start + _SHOWN]
            ours_there = our_text[start : start + _SHOWN]
            yield f"{self._tool} writes another text: {theirs_there!r} in place of {ours_there!r}"

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    # -- what is trained ---------------------------------------------------------------------------

    def _trained_words(
        self, example: Example, ours: Sequence[LabelledRow], theirs: TheirRow
    ) -> Iterator[str]:
        here = self._trained(example, ours)
        there = self._trained(example, [theirs])
        if not theirs.trained_tokens:
            yield f"{self._tool} trains nothing of the row"
            return
        if there.prompt and not here.prompt:
            extra = theirs.trained_tokens - sum(row.trained_tokens for row in ours)
            yield f"{self._tool} trains the prompt, too: {extra} tokens more than here"
        for number, (is_here, is_there) in enumerate(zip(here.answers, there.answers, strict=True)):
            if is_here and not is_there:
                yield f"{self._tool} does not train answer {number + 1}"
            elif is_there and not is_here:
                yield f"{self._tool} trains answer {number + 1}, which is not trained here"
        if here.end and not there.end:
            yield f"{self._tool} never trains the end of the answer: a model that does not stop"
        elif here.answers == there.answers and here.prompt == there.prompt:
            for their_turn, our_turn in zip(there.turns, here.turns, strict=False):
                if their_turn != our_turn:
                    yield f"{self._tool} trains {their_turn!r} of a turn, here it is {our_turn!r}"
                    break

    def _trained(self, example: Example, rows: Sequence[TokensAndLabels]) -> _Trained:
        """What is trained of each message, told by where its text stands."""
        turns: list[str] = []
        rest: list[str] = []
        for row in rows:
            turns += self._runs(row, trained=True)
            rest += self._runs(row, trained=False)
        trained_text = "\0".join(turns)
        prompt = False
        answers: list[bool] = []
        for message in example.messages:
            content = (message.get("instruction") or message["content"]).strip()
            is_trained = content in trained_text
            if message["role"] == "assistant":
                answers.append(is_trained)
                turns = [turn.replace(content, "…", 1) for turn in turns]
            elif is_trained and not any(content in text for text in rest):
                prompt = True
        # What is learned behind the last answer; all of the last run where no answer was told in it.
        tail = "".join(turns[-1:]).rpartition("…")[2]
        end = any(token in tail for token in self._special)
        return _Trained(prompt, answers, end, turns)

    def _runs(self, row: TokensAndLabels, trained: bool) -> list[str]:
        """The texts of all runs of tokens that are trained, or that are not."""
        runs: list[list[int]] = []
        continues = False
        for token, label in zip(row.input_ids, row.labels, strict=True):
            belongs = (label != IGNORE_INDEX) == trained
            if belongs and not continues:
                runs.append([])
            if belongs:
                runs[-1].append(token)
            continues = belongs
        return [self._decode(run) for run in runs]

    # -- what is cut -------------------------------------------------------------------------------

    def _cut_words(self, row: TheirRow, whole: TheirRow) -> Iterator[str]:
        length = len(row.input_ids)
        lost = whole.trained_tokens - row.trained_tokens
        lost_prompt = _before_the_end(whole.labels) - _before_the_end(row.labels)
        if not row.trained_tokens:
            yield f"{self._tool} cuts the row at {length} tokens: nothing of the answer is left"
        elif lost:
            sentence = (
                f"{self._tool} cuts the row to {length} tokens: "
                f"{lost} of {whole.trained_tokens} trained tokens are lost"
            )
            if row.labels[-1] in self._special.values():
                sentence += ", and the model learns to stop there"
            else:
                sentence += ", the end of the answer with them"
            yield sentence
        if lost_prompt > 0:
            yield f"{self._tool} cuts the prompt by {lost_prompt} tokens"


def _begins_with(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(ids[: len(beginning)]) == list(beginning)


def _is_trained(labels: Sequence[int]) -> bool:
    return any(label != IGNORE_INDEX for label in labels)


def _before_the_end(labels: Sequence[int]) -> int:
    """How many tokens before the last trained one are not trained; all where none is."""
    count = 0
    before_last = len(labels)
    for label in labels:
        count += label == IGNORE_INDEX
        if label != IGNORE_INDEX:
            before_last = count
    return before_last


def _leading(bos: str, text: str) -> int:
    """How often a text begins with BOS."""
    count = 0
    while text.startswith(bos * (count + 1)):
        count += 1
    return count
