"""Columns that would change what a row means, unasked: refused, with settings that work.

A column that is empty is neutral, and so is one that `column_mapping` names; one that `columns`
leaves out is not seen.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from sft_recipes.data.reading.column_advice import preferred, setting
from sft_recipes.data.reading.column_values import (
    MEDIA,
    NamesInRow,
    as_list,
    begins_with_answer,
    first_step,
    fold,
    is_empty,
    lines_path,
    names_speakers,
)
from sft_recipes.data.reading.columns import COMMON_NAMES, CONTEXTS, all_names
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.known_formats import PAIR_FORMATS, TEXT_FORMATS

_STEERING = frozenset(
    "labels inputids attentionmask tokentypeids positionids assistantmasks completionmask lossmask"
    " chattemplate chattemplatekwargs".split()
)
_WEIGHTS = frozenset({"weight", "weights", "sampleweight", "rowweight", "lossweight"})
_VERDICTS = frozenset({"label", "ktotag", "ktolabel"})
_PREFERRED = (
    " s response responses message messages conversation conversations"
    " output outputs answer answers completion completions text"
).split(" ")
_PREFERENCES = frozenset(map("".join, product(("chosen", "rejected"), _PREFERRED)))
_PLACEHOLDER = re.compile(r"<(?:image|img|video|audio)(?:_\d+)?>")
# What belongs to the answer, before it or in its place.
_ANSWER_PARTS = frozenset(
    "reasoning reasoningcontent thinking thought thoughts cot chainofthought rationale"
    " reflection corrected correction correctedoutput correctedanswer".split()
)
_CHOICES = frozenset({"choices", "options", "answerchoices"})
_ROW_FLAGS = frozenset({"train", "trainable", "istrained"})
_BOOLEANS = frozenset({"true", "false"})


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read, as far as it decides which columns may be passed over.

    `mapping` has all columns read under another name, `explicit` those that the user named.
    """

    format: str
    mapping: Mapping[str, NamesInRow]
    explicit: Mapping[str, NamesInRow]
    used: frozenset[str]

    @property
    def is_pair(self) -> bool:
        """Whether a row is a question and an answer in columns of their own."""
        return self.format in PAIR_FORMATS

    @property
    def answer(self) -> str:
        """Our name of the column that holds the answer, where a row is such a pair."""
        if self.format == "instruction":
            return "output"
        return "completion"

    def columns(self, values: Mapping[str, Any]) -> str:
        """The setting that reads only what is read already."""
        return setting("columns", [name for name in values if name in self.used])

    def with_mapping(self, mapping: Mapping[str, NamesInRow]) -> str:
        """The setting that reads these columns besides those that the user named."""
        return setting("column_mapping", {**self.explicit, **mapping})


# Finds what is wrong with a column of this name, from its value and the row.
_Check = Callable[[str, Mapping[str, Any], Reading], RowProblem | None]


class CheckedColumn(NamedTuple):
    """A column that is looked at in every row, and how."""

    column: str
    check: _Check


def checks_for(columns: Sequence[str], reading: Reading) -> list[CheckedColumn]:
    """The columns of rows of one shape that are looked at in every row, each with its check."""
    paths = all_names(reading.explicit)
    named = {*paths, *map(first_step, paths)}
    checks: list[CheckedColumn] = []
    for name in columns:
        if name in reading.used or name in named:
            continue
        check = _check_for(fold(name), reading, named)
        if check is not None:
            checks.append(CheckedColumn(name, check))
    return checks


def _check_for(folded: str, reading: Reading, named: set[str]) -> _Check | None:
    if folded in _STEERING:
        return _steering
    if folded in _WEIGHTS:
        return _weight
    if folded in MEDIA:
        return _media
    if reading.format in TEXT_FORMATS:
        return None
    return _check_of_conversations(folded, reading, named)


def _check_of_conversations(folded: str, reading: Reading, named: set[str]) -> _Check | None:
    """The check of a column that says something of a conversation and is not decided yet."""
    if folded in _VERDICTS:
        return _verdict
    if folded in _ROW_FLAGS:
        return _row_flag
    if folded in _PREFERENCES:
        if any(fold(name).startswith(("chosen", "rejected")) for name in named):
            return None
        return _preference
    for column in ("system", "tools"):
        if folded in COMMON_NAMES[column]:
            if column in reading.explicit:
                return None
            return _second
    if reading.is_pair:
        return _check_beside_a_pair(folded, reading)
    return None


def _check_beside_a_pair(folded: str, reading: Reading) -> _Check | None:
    """The check of a column that may belong to the question or the answer of a pair."""
    if folded in _ANSWER_PARTS:
        if "output" in reading.explicit or "completion" in reading.explicit:
            return None
        return _answer_part
    if folded == "history" and reading.format == "prompt_completion":
        return _history
    is_context = folded in _CHOICES or folded in CONTEXTS
    if reading.format == "prompt_completion" and folded == "input":
        is_context = True
    if is_context and "input" not in reading.explicit:
        return _context
    return None


def _steering(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]):
        return None
    what = "this column is refused because labels and templates are made here, not taken from rows"
    return RowProblem(name, what, f"remove the column, or set {reading.columns(row)}")


def _weight(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    value = row[name]
    if is_empty(value):
        return None
    if not isinstance(value, list):
        try:
            if float(value) == 1:
                return None
        except (TypeError, ValueError):
            return None  # no number, so it weighs nothing
    what = f"this row asks for the weight {value!r}, and rows are not weighed one by one"
    own_set = "write rows of one weight into a data set of their own, with `weight`"
    return RowProblem(name, what, f"{own_set}, or set {reading.columns(row)}")


def _media(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]):
        return None
    what = "this row comes with images, video or sound, and only text is trained"
    fix = f"remove such rows, or train the text alone: set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _verdict(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    value = row[name]
    is_verdict = isinstance(value, bool)
    if isinstance(value, str):
        is_verdict = value.lower() in _BOOLEANS
    if not is_verdict:
        return None
    what = f"{value!r} says whether the answer is a good one, and every answer would be trained"
    fix = f"remove the rows with bad answers, then set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _row_flag(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if row[name] is not False and str(row[name]).lower() != "false":
        return None
    what = "this row says that it is not to be trained"
    return RowProblem(name, what, f"remove such rows, or train them: set {reading.columns(row)}")


def _preference(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    value = row[name]
    if is_empty(value) or not isinstance(value, str | list | dict):
        return None
    fix = f"train what is read already: set {reading.columns(row)}"
    chosen = preferred(row)
    if chosen is not None:
        is_whole = names_speakers(row[chosen]) and not begins_with_answer(row[chosen])
        answer = "messages"
        if reading.is_pair and not is_whole:
            answer = reading.answer
        fix += f"; or train the preferred answer: set {reading.with_mapping({answer: chosen})}"
    return RowProblem(name, "preference data are no answers to train one by one", fix)


def _second(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    """A second column with a system prompt or with tools; the same once more is fine."""
    column = "tools"
    if fold(name) in COMMON_NAMES["system"]:
        column = "system"
    used = reading.mapping.get(column, column)
    if is_empty(row[name]) or not isinstance(used, str) or row.get(used) == row[name]:
        return None
    what = f"{used!r} is read as {column}, and this column would be passed over"
    asked = reading.with_mapping({column: name})
    fix = f"choose: set {asked}, or leave it out: set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _answer_part(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]) or not isinstance(row[name], str):
        return None
    answer = reading.answer
    parts = [other for other in row if fold(other) in _ANSWER_PARTS]
    if not any(fold(part).startswith("correct") for part in parts):
        parts += as_list(reading.mapping.get(answer, answer))
    what = "this column changes what the answer is, and would be passed over"
    join = reading.with_mapping({answer: parts})
    fix = f"train the parts as one answer: set {join}, or leave it out: set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _history(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]):
        return None
    mapping = {
        "instruction": reading.mapping.get("prompt", "prompt"),
        "output": reading.mapping.get("completion", "completion"),
        "history": name,
    }
    what = "the turns before the prompt would be passed over"
    asked = setting("column_mapping", mapping)
    fix = f"read them: set {asked}, or leave them out: set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _context(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    path = lines_path(name, row[name])
    if is_empty(row[name]) or path is None:
        return None
    mapping: dict[str, NamesInRow] = {}
    for column, names in reading.explicit.items():
        if column not in ("prompt", "completion"):
            mapping[column] = names
    if reading.format == "prompt_completion":
        mapping["instruction"] = reading.mapping.get("prompt", "prompt")
        mapping["output"] = reading.mapping.get("completion", "completion")
    mapping["input"] = path
    before = reading.mapping.get("input", "input")
    if (
        reading.format == "instruction"
        and isinstance(before, str)
        and not is_empty(row.get(before))
    ):
        mapping["input"] = [before, path]
    what = "this column belongs to the question, and would be passed over"
    asked = setting("column_mapping", mapping)
    fix = f"ask it as well: set {asked}, or leave it out: set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def refuse_placeholders(text: str, field: str, row: Mapping[str, Any], reading: Reading) -> None:
    """Raise RowProblem for a text that shows where an image of the row belongs."""
    match = _PLACEHOLDER.search(text)
    if match is not None:
        shown = match.group()
        what = f"{shown} stands for what a column of the row holds, and only text is trained"
        fix = f"remove such rows, or train the text alone: set {reading.columns(row)}"
        raise RowProblem(field, what, fix)
