"""Columns that would change what a row means, and that nobody asked for: refused by name, with settings that work.

A column that is empty is neutral, and so is one that `column_mapping` names; one that `columns` leaves out is not seen.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.reading.column_advice import preferred, setting
from sft_recipes.data.reading.column_values import (
    begins_with_answer,
    fold,
    is_empty,
    lines_path,
    names_speakers,
)
from sft_recipes.data.reading.columns import (
    COMMON_NAMES,
    CONTEXTS,
    TEXT_FORMATS,
    TheirNames,
    their_names,
)
from sft_recipes.data.reading.json_reader import RowProblem

_STEERING = frozenset(
    "labels inputids attentionmask tokentypeids positionids assistantmasks completionmask lossmask"
    " chattemplate chattemplatekwargs".split()
)
_WEIGHTS = frozenset({"weight", "weights", "sampleweight", "rowweight", "lossweight"})
_VERDICTS = frozenset({"label", "ktotag", "ktolabel"})
_WHAT_IS_PREFERRED = (
    " s response responses message messages conversation conversations"
    " output outputs answer answers completion completions text"
).split(" ")
_PREFERENCES = frozenset(
    side + what for side in ("chosen", "rejected") for what in _WHAT_IS_PREFERRED
)
_MEDIA_KINDS = ("image", "img", "picture", "video", "audio")
MEDIA = frozenset(
    kind + ending for kind in _MEDIA_KINDS for ending in ("", "s", "path", "paths", "file", "files")
)
MEDIA |= frozenset(kind + ending for kind in _MEDIA_KINDS for ending in ("url", "urls", "bytes"))
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
    """How rows are read, as far as it decides what may be passed over: format, all mappings, and the user's own."""

    format: str
    mapping: Mapping[str, TheirNames]
    explicit: Mapping[str, TheirNames]
    used: frozenset[str]

    @property
    def is_pair(self) -> bool:
        """Whether a row is a question and an answer in columns of their own."""
        return self.format in ("instruction", "prompt_completion")

    def columns(self, values: Mapping[str, Any]) -> str:
        """The setting that reads only what is read already."""
        return setting("columns", [name for name in values if name in self.used])

    def with_mapping(self, mapping: Mapping[str, TheirNames]) -> str:
        """The setting that reads these columns besides those that the user named."""
        return setting("column_mapping", {**self.explicit, **mapping})


# Finds what is wrong with a column of this name, from its value and the row.
_Check = Callable[[str, Mapping[str, Any], Reading], RowProblem | None]


def checks_for(columns: Sequence[str], reading: Reading) -> list[tuple[str, _Check]]:
    """The columns of rows of one shape that are looked at in every row, each with its check."""
    named = {
        *their_names(reading.explicit),
        *(name.partition(".")[0] for name in their_names(reading.explicit)),
    }
    checks: list[tuple[str, _Check]] = []
    for name in columns:
        if name in reading.used or name in named:
            continue
        check = _check_for(fold(name), reading, named)
        if check is not None:
            checks.append((name, check))
    return checks


def _check_for(folded: str, reading: Reading, named: set[str]) -> _Check | None:
    for names, check in ((_STEERING, _steering), (_WEIGHTS, _weight), (MEDIA, _media)):
        if folded in names:
            return check
    if reading.format in TEXT_FORMATS:
        return None
    if folded in _VERDICTS:
        return _verdict
    if folded in _ROW_FLAGS:
        return _row_flag
    if folded in _PREFERENCES:
        decided = any(fold(name).startswith(("chosen", "rejected")) for name in named)
        return None if decided else _preference
    for ours in ("system", "tools"):
        if folded in COMMON_NAMES[ours]:
            return None if ours in reading.explicit else _second
    return _check_beside_a_pair(folded, reading) if reading.is_pair else None


def _check_beside_a_pair(folded: str, reading: Reading) -> _Check | None:
    """The check of a column that may belong to a question or to an answer in columns of their own."""
    if folded in _ANSWER_PARTS:
        is_decided = "output" in reading.explicit or "completion" in reading.explicit
        return None if is_decided else _answer_part
    if folded == "history" and reading.format == "prompt_completion":
        return _history
    is_context = folded in _CHOICES or folded in CONTEXTS
    if reading.format == "prompt_completion" and folded == "input":
        is_context = True
    return _context if is_context and "input" not in reading.explicit else None


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
    fix = f"write rows of one weight into a data set of their own, with `weight`, or set {reading.columns(row)}"
    return RowProblem(name, what, fix)


def _media(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]):
        return None
    what = "this row comes with images, video or sound, and only text is trained"
    return RowProblem(
        name, what, f"remove such rows, or train the text alone: set {reading.columns(row)}"
    )


def _verdict(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    value = row[name]
    if not isinstance(value, bool) and not (isinstance(value, str) and value.lower() in _BOOLEANS):
        return None
    what = f"{value!r} says whether the answer is a good one, and every answer would be trained"
    return RowProblem(
        name, what, f"remove the rows with bad answers, then set {reading.columns(row)}"
    )


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
        answer = {"instruction": "output", "prompt_completion": "completion"}.get(
            reading.format, "messages"
        )
        if names_speakers(row[chosen]) and not begins_with_answer(row[chosen]):
            answer = "messages"
        fix += f"; or train the preferred answer: set {reading.with_mapping({answer: chosen})}"
    return RowProblem(name, "preference data are no answers to train one by one", fix)


def _second(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    """A second column with a system prompt or with tools; the same once more is fine."""
    ours = "system" if fold(name) in COMMON_NAMES["system"] else "tools"
    used = reading.mapping.get(ours, ours)
    if is_empty(row[name]) or not isinstance(used, str) or row.get(used) == row[name]:
        return None
    what = f"{used!r} is read as {ours}, and this column would be passed over"
    asked = reading.with_mapping({ours: name})
    return RowProblem(
        name, what, f"choose: set {asked}, or leave it out: set {reading.columns(row)}"
    )


def _answer_part(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    if is_empty(row[name]) or not isinstance(row[name], str):
        return None
    ours = "output" if reading.format == "instruction" else "completion"
    parts = [column for column in row if fold(column) in _ANSWER_PARTS]
    if not any(fold(part).startswith("correct") for part in parts):
        answer = reading.mapping.get(ours, ours)
        parts += [answer] if isinstance(answer, str) else answer
    what = "this column changes what the answer is, and would be passed over"
    join = reading.with_mapping({ours: parts})
    return RowProblem(
        name,
        what,
        f"train the parts as one answer: set {join}, or leave it out: set {reading.columns(row)}",
    )


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
    return RowProblem(
        name, what, f"read them: set {asked}, or leave them out: set {reading.columns(row)}"
    )


def _context(name: str, row: Mapping[str, Any], reading: Reading) -> RowProblem | None:
    path = lines_path(name, row[name])
    if is_empty(row[name]) or path is None:
        return None
    mapping: dict[str, TheirNames] = {}
    for ours, theirs in reading.explicit.items():
        if ours not in ("prompt", "completion"):
            mapping[ours] = theirs
    if reading.format == "prompt_completion":
        mapping["instruction"] = reading.mapping.get("prompt", "prompt")
        mapping["output"] = reading.mapping.get("completion", "completion")
    before = reading.mapping.get("input", "input")
    has_input = (
        reading.format == "instruction"
        and isinstance(before, str)
        and not is_empty(row.get(before))
    )
    mapping["input"] = [str(before), path] if has_input else path
    what = "this column belongs to the question, and would be passed over"
    asked = setting("column_mapping", mapping)
    return RowProblem(
        name, what, f"ask it as well: set {asked}, or leave it out: set {reading.columns(row)}"
    )


def refuse_placeholders(text: str, field: str, row: Mapping[str, Any], reading: Reading) -> None:
    """Raise RowProblem for a text that shows where an image belongs, in a row that has a column for it."""
    match = _PLACEHOLDER.search(text)
    if match is not None:
        what = (
            f"{match.group()} stands for what a column of the row holds, and only text is trained"
        )
        raise RowProblem(
            field, what, f"remove such rows, or train the text alone: set {reading.columns(row)}"
        )
