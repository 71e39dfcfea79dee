"""Named checks of labels: of training rows, by their ids and by renderings.

They ask for no layouts, the code that found the labels: what both got wrong would pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sft_recipes.data.chat_templates import PROBE, ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, LabelledRow, Labeller
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.messages import Example, Message

# `not looked at`: nothing in the rows to look at.
Outcome = Literal["ok", "note", "failed", "not looked at"]

# With a system message of its own a conversation brings none of the template's.
_EXCHANGE: Sequence[Message] = (
    {"role": "system", "content": "QZsystemZQ"},
    {"role": "user", "content": "QZaskZQ"},
    {"role": "assistant", "content": "QZanswerZQ"},
    {"role": "user", "content": "QZnextZQ"},
    {"role": "assistant", "content": "QZlaterZQ"},
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says."""

    outcome: Outcome
    detail: str


class TrainedRun(NamedTuple):
    """Positions `start:end` of neighbouring trained tokens."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A training row with its example, as it came and as it is rendered."""

    row: LabelledRow
    original: Example
    example: Example

    def trained_runs(self) -> Iterator[TrainedRun]:
        """The runs of neighbouring trained tokens, in order."""
        labels = self.row.labels
        start = 0
        for position, label in enumerate([*labels, IGNORE_INDEX]):
            before = labels[position - 1] if position else IGNORE_INDEX
            if label != IGNORE_INDEX and before == IGNORE_INDEX:
                start = position
            if label == IGNORE_INDEX and before != IGNORE_INDEX:
                yield TrainedRun(start, position)


def _all_trained(labeller: Labeller) -> Verdict | None:
    if labeller.settings.train_on == "all":
        return Verdict("note", "train_on: all trains headers and user text, as asked")
    return None


def _count(rows: Sequence[CheckedRow]) -> str:
    return f"checked {len(rows)} rows"


def stop_token_trained(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """Every trained turn ends in one terminator at which generation stops.

    Which tokens open a turn is read off a rendered exchange, token by token: none of them may be
    trained as an end.
    """
    all_trained = _all_trained(labeller)
    if all_trained is not None:
        return all_trained
    openers = _opening_ids(renderer)
    for checked in rows:
        runs = list(checked.trained_runs())
        where = checked.example.where
        if len(runs) != len(checked.row.turns):
            counts = f"{len(checked.row.turns)} trained turns, {len(runs)} trained stretches"
            return Verdict("failed", f"{where}: {counts}: a turn runs into the next one")
        for run in runs:
            problem = _turn_problem(renderer, checked.row.input_ids[run.start : run.end], openers)
            if problem is not None:
                return Verdict("failed", f"{where}: {problem}")
    stops = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
    return Verdict("ok", f"stops at {', '.join(map(repr, stops))}; {_count(rows)}")


def _turn_problem(renderer: ChatRenderer, ids: Sequence[int], openers: set[int]) -> str | None:
    """What is wrong with how the ids of a trained turn end, or None."""
    last = ids[-1]
    text = renderer.tokenizer.convert_ids_to_tokens(last)
    if last not in renderer.special_tokens.values() or last not in renderer.stop_ids:
        what = f"{text!r} is the last trained token of a turn, and generation does not stop at it"
        return f"{what}: the model would not learn to stop"
    inside = _stops_before_end(renderer, ids[:-1])
    if inside is not None:
        return f"generation would stop at {inside!r}, inside a trained turn"
    if last in openers:
        return f"{text!r} is trained as the end of a turn, and it opens every turn"
    return None


def _stops_before_end(renderer: ChatRenderer, ids: Sequence[int]) -> str | None:
    """A token before a turn's last one at which generation would stop.

    A run of them at the end is one terminator.
    """
    special = set(renderer.special_tokens.values())
    body = list(ids)
    while body and body[-1] in special:
        body.pop()
    for token in body:
        if token in renderer.stop_ids:
            return str(renderer.tokenizer.convert_ids_to_tokens(token))
    return None


def _opening_ids(renderer: ChatRenderer) -> set[int]:
    """Ids of the control tokens that open the assistant's turn, and every turn."""
    special = set(renderer.special_tokens.values())
    closed = renderer.text_ids(renderer.render(PROBE[:1]))
    opened = renderer.text_ids(renderer.render(PROBE[:1], add_generation_prompt=True))
    if len(opened) > len(closed) and opened[: len(closed)] == closed:
        # What the generation prompt adds opens the assistant's turn.
        return special.intersection(opened[len(closed) :])
    # The template opens the turn whatever is asked, or has no header. The tokens before the first
    # text of an exchange that stand again before the next question, but not first there: the first
    # one ends the answer.
    for exchange in (_EXCHANGE, _EXCHANGE[1:]):
        try:
            text = renderer.render(exchange)
        except TEMPLATE_ERRORS:
            continue
        before_first = text.partition(exchange[0]["content"])[0]
        before_next = text.partition("QZanswerZQ")[2].partition("QZnextZQ")[0]
        next_ids = [token for token in renderer.text_ids(before_next) if token in special]
        return special.intersection(renderer.text_ids(before_first)).intersection(next_ids[1:])
    return set()


def header_not_trained(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """Nothing of the generation prompt and no text of another role carries a label."""
    all_trained = _all_trained(labeller)
    if all_trained is not None:
        return all_trained
    for checked in rows:
        first_turn = checked.row.turns[0]
        prompt = renderer.prompt_ids(checked.example.messages[:first_turn], checked.example.tools)
        end_of_first = next(checked.trained_runs()).start + 1
        if checked.row.input_ids[:end_of_first] == prompt[:end_of_first]:
            what = "the trained span begins inside the prompt"
            return Verdict("failed", f"{checked.example.where}: {what}")
    return Verdict("ok", _count(rows))


def ids_as_served(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """A row begins with the ids that a server makes of the prompt.

    It is the tokenizer's own encoding of the text where no token joins the answer to the prompt.
    """
    compared = 0
    joined = 0
    for checked in rows:
        if checked.row.neutralized:
            continue  # compared with transformers' own encoding in the tests
        compared += 1
        joined += checked.row.joined
        if not _is_as_served(renderer, checked):
            what = "the ids are not those that a server makes of the row"
            return Verdict("failed", f"{checked.example.where}: {what}")
    if not compared:
        return Verdict("not looked at", "every row looked at spells control tokens")
    answers = f"{joined} with an answer that a token would join"
    return Verdict("ok", f"checked {compared} rows, {answers}")


def _is_as_served(renderer: ChatRenderer, checked: CheckedRow) -> bool:
    """Whether the ids of a row are those that a server would make of it."""
    example = checked.example
    last_turn = checked.row.turns[-1]
    ids = checked.row.input_ids
    whole = renderer.text_ids(renderer.render(example.messages[: last_turn + 1], example.tools))
    # Where the template leaves the last turn open, the token that closes it is ours.
    if ids == whole or ids[:-1] == whole[: len(ids) - 1]:
        return True
    prompt = renderer.prompt_ids(example.messages[:last_turn], example.tools)
    if not checked.row.joined and whole[: len(prompt) - 1] == prompt[:-1]:
        return False
    # A token joins the answer, or the template writes the conversation otherwise once it is
    # answered: then the row begins with what a server makes, or where the prompt is no beginning of
    # the text, with the tokenizer's own ids of what stands before the answer.
    if ids[: len(prompt)] == prompt:
        return True
    *_, last_run = checked.trained_runs()
    before = ids[: last_run.start]
    text = renderer.tokenizer.decode(before, clean_up_tokenization_spaces=False)
    return before == renderer.text_ids(text)
