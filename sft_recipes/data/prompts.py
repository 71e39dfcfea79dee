"""The questions of a data set, whatever it holds of answers: system prompt and first user turn."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.reading.column_values import fold, is_empty, names_speakers, role_key
from sft_recipes.data.reading.columns import ANSWERS, QUESTIONS
from sft_recipes.messages import ROLE_ALIASES, Example
from sft_recipes.recipe import DatasetSource, DataSettings

# Stands where a row has no answer: rows are read by the rules for training, which ask for one.
_OPEN = "..."


def read_questions(
    source: DatasetSource, settings: DataSettings, rejects: RejectLog
) -> Iterator[Example]:
    """Each row of a source up to its first user turn; no messages where it has none.

    Turns hold role and content only, as they are going to stand in a row of messages. Raises as
    `iter_examples` does.
    """
    for example in iter_examples(source, settings, rejects, complete=_with_answer):
        yield replace(example, messages=_question(example), train=())


def _question(example: Example) -> list[dict[str, Any]]:
    turns = []
    for message in example.messages:
        turns.append({"role": message["role"], "content": message["content"]})
        if message["role"] == "user":
            return turns
    return []


def _with_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with something in the place of an answer that it lacks."""
    row = dict(row)
    for name, value in row.items():
        is_turns = isinstance(value, list) and names_speakers(value)
        if is_turns and fold(name) not in QUESTIONS:
            row[name] = _answered(value)
            return row
    names = {fold(name): name for name in row}
    answers = [name for folded, name in names.items() if folded in ANSWERS]
    for name in answers:
        if is_empty(row[name]):
            row[name] = _OPEN
    if not answers and "prompt" in row:
        row["completion"] = _OPEN
    elif not answers and QUESTIONS & names.keys():
        row["output"] = _OPEN
    return row


def _answered(turns: list[Any]) -> list[Any]:
    """The turns, with one of the assistant behind a user's that is the last."""
    last = turns[-1]
    key = role_key(last) if isinstance(last, dict) else None
    if key is None or ROLE_ALIASES.get(str(last[key]), last[key]) != "user":
        return turns
    answer = {name: _OPEN for name, value in last.items() if isinstance(value, str)}
    answer[key] = "assistant"
    return [*turns, answer]
