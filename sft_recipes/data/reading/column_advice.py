"""What to say where columns cannot be read as they are: settings that work when they are copied.

Nothing is decided here; a guess at what a column may be is only offered.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sft_recipes.data.reading.column_values import (
    as_list,
    begins_with_answer,
    first_step,
    fold,
    is_empty,
    lines_path,
    names_speakers,
    text_path,
)
from sft_recipes.errors import InputError, Problem

# What chat templates write and people do not.
_RENDERED = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|</s>|<s>|<｜[^｜]+｜>")
# Columns that say something about a row and are no part of what is trained.
_ABOUT_THE_ROW = frozenset(
    "id uid uuid idx index source url link license lang language topic category categories type"
    " task split title date timestamp author model dataset origin domain subject difficulty score"
    " promptid conversationid name tags".split()
)
_LIKE_A_QUESTION = ("question", "instruct", "prompt", "query", "problem", "request", "source")
_LIKE_AN_ANSWER = (
    "answer",
    "response",
    "output",
    "completion",
    "reply",
    "solution",
    "target",
    "summary",
    "chosen",
)
# Names that say less: tried where no name above fits.
_MAYBE_A_QUESTION = ("message", "customer", "user", "frage", "pregunta", "domanda")
_MAYBE_AN_ANSWER = ("agent", "assistant", "bot", "antwort", "respuesta", "reponse", "risposta")
# An order number, a price, a key: no question and no answer while there are sentences beside it.
_LIKE_A_CODE = re.compile(r"\S*\d\S*")
_LIKE_A_CONTEXT = ("context", "article", "document", "passage", "background")


def setting(key: str, value: Any) -> str:
    """A recipe key with its value, as it is written in YAML and on the command line."""
    written = _one_line(value)
    return f"`{key}: {written}` (on the command line `--{key} {shlex.quote(written)}`)"


def _one_line(value: Any) -> str:
    written = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True
    )
    return written.removesuffix("\n").removesuffix("\n...")


def several_formats(
    values: Mapping[str, Any], required: Mapping[str, Sequence[str]], where: str
) -> InputError:
    """The error for columns that fit more than one format."""
    what = f"the columns ({', '.join(values)}) fit {' and '.join(required)}"
    choices = " or ".join(setting("format", format) for format in required)
    return InputError(Problem(where, "format", what, f"set {choices}"))


def several_candidates(
    values: Mapping[str, Any], example: Mapping[str, Any], candidates: Sequence[str], where: str
) -> InputError:
    """The error for two names that could be the same column.

    `example` is a `column_mapping` that works.
    """
    both = " and ".join(candidates)
    what = f"the columns {both} could both be meant (found: {', '.join(values)})"
    read: list[str] = []
    for names_of_column in example.values():
        for path in as_list(names_of_column):
            name = first_step(path)
            if name not in (*read, *candidates[1:]):
                read.append(name)
    mapping = setting("column_mapping", dict(example))
    columns = setting("columns", read)
    fix = f"say which is which, as in {mapping}, or leave some out, as in {columns}"
    return InputError(Problem(where, "column_mapping", what, fix))


def doubtful_text(
    values: Mapping[str, Any], example: Mapping[str, Any], name: str, where: str
) -> InputError:
    """The error for a text beside a question and an answer.

    `example` is a `column_mapping` that leaves it out.
    """
    doubt = f"{name!r} may be what the question is about, or the whole row once more"
    what = f"{doubt} (found: {', '.join(values)})"
    without = setting("column_mapping", dict(example))
    with_it = setting("column_mapping", {**example, "input": name})
    fix = f"leave it out, as in {without}, or ask it, as in {with_it}"
    return InputError(Problem(where, "column_mapping", what, fix))


def no_format(
    values: Mapping[str, Any],
    mapping: Mapping[str, Any],
    required: Mapping[str, Sequence[str]],
    other_values: Sequence[str],
    where: str,
) -> InputError:
    """The error for columns that fit no format, with the nearest way in.

    `required`: the columns of every format; `other_values`: formats that the row has the columns
    of, not the values.
    """
    if not is_empty(values.get("input_ids")):
        reason = "ids and labels are made here, from text"
        what = f"rows that are tokenized already are not taken: {reason}"
        fix = (
            "give the text, as `messages`, as `instruction` and `output`, "
            "or as `text` with `format: raw`"
        )
        return InputError(Problem(where, "input_ids", what, fix))
    if {"role", "content"} <= values.keys() or {"from", "value"} <= values.keys():
        what = "these are the turns of one conversation, not rows"
        fix = 'write each conversation as one row: {"messages": [...]}'
        return InputError(Problem(where, "", what, fix))
    if other_values:
        (format, *_) = other_values
        what = f"the columns are those of {format}, their values are not"
        fix = f"to see what is wrong with them set {setting('format', format)}"
        return InputError(Problem(where, "format", what, fix))
    known: list[str] = []
    for format, columns in required.items():
        known.append(f"{format} ({', '.join(columns)})")
    what = f"the columns ({', '.join(values)}) fit no format; known are {'; '.join(known)}"
    return InputError(Problem(where, "format", what, _way_in(values, mapping)))


def _way_in(values: Mapping[str, Any], mapping: Mapping[str, Any]) -> str:
    paths = _text_paths(values)
    chosen = preferred(values)
    if chosen is not None and not any(chosen in names for names in mapping.values()):
        return _preference_way_in(values, mapping, chosen)
    for name, value in values.items():
        if names_speakers(value):
            return f"set {setting('column_mapping', {**mapping, 'messages': name})}"
    roles = _guess_roles(paths)
    if "output" in roles and "instruction" in roles:
        return f"name the columns, as in {setting('column_mapping', {**roles, **mapping})}"
    if len(paths) == 1:
        (name,) = paths
        return raw_way_in(name, values[name])
    if "instruction" in roles:
        example = setting("column_mapping", {**roles, "output": "ANSWER"})
        return f"no column seems to hold the answer: add one, say ANSWER, and set {example}"
    if len(paths) > 1:
        first, second = list(paths.values())[:2]
        pair = setting("column_mapping", {"instruction": first, "output": second})
        name = next(iter(paths))
        guess = "say which column is the question and which the answer"
        return f"{guess}: {pair} if it is these two; or, {raw_way_in(name, values[name])}"
    return "write the rows in one of these formats; no column holds text"


def preferred(values: Mapping[str, Any]) -> str | None:
    """The column that holds the preferred answer of preference data, or None."""
    for name, value in values.items():
        if fold(name).startswith("chosen") and isinstance(value, str | list | dict):
            return name
    return None


def _preference_way_in(values: Mapping[str, Any], mapping: Mapping[str, Any], chosen: str) -> str:
    what = "to train the preferred answer of preference data set"
    questions = [name for name in values if _is_like(name, _LIKE_A_QUESTION)]
    is_whole = names_speakers(values[chosen]) and not begins_with_answer(values[chosen])
    if is_whole:
        return f"{what} {setting('column_mapping', {**mapping, 'messages': chosen})}"
    if "prompt" in values:
        return f"{what} {setting('column_mapping', {**mapping, 'completion': chosen})}"
    if "instruction" in values or "instruction" in mapping:
        return f"{what} {setting('column_mapping', {**mapping, 'output': chosen})}"
    if questions:
        pair = {"instruction": questions[0], "output": chosen}
        return f"{what} {setting('column_mapping', {**mapping, **pair})}"
    return f"{what} {setting('format', 'raw')} and {setting('column_mapping', {'text': chosen})}"


def raw_way_in(name: str, value: Any) -> str:
    """How to train the only text of a row, or its lines, as they stand."""
    format = "raw"
    reason = "to train the text as it stands"
    if isinstance(value, str) and _RENDERED.search(value):
        format = "rendered"
        reason = "a chat template rendered this text already"
    if name == "text":
        return f"{reason}: set {setting('format', format)}"
    mapping = _one_line({"text": lines_path(name, value)})
    keys = f"`format: {format}` and `column_mapping: {mapping}`"
    options = f"`--format {format} --column_mapping {shlex.quote(mapping)}`"
    return f"{reason}: set {keys} (on the command line {options})"


def first_text(values: Mapping[str, Any]) -> str | None:
    """A path to the first text of a row that is no remark about it, or None."""
    return next(iter(_text_paths(values).values()), None)


def _text_paths(values: Mapping[str, Any]) -> dict[str, str]:
    """The columns that hold text, each with the path to it.

    Those that say something about the row are left out.
    """
    paths: dict[str, str] = {}
    about = _ABOUT_THE_ROW
    if any(fold(name) == "target" for name in values):
        about -= {"source"}  # beside a target it is what is translated, not where the row is from
    for name, value in values.items():
        path = text_path(name, value)
        if path is not None and fold(name) not in about and not is_empty(value):
            paths[name] = path
    sentences = [name for name in paths if not _is_code(values[name])]
    if len(sentences) > 1:
        return {name: paths[name] for name in sentences}
    return paths


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and _LIKE_A_CODE.fullmatch(value.strip()) is not None


def likely_columns(values: Mapping[str, Any]) -> dict[str, str]:
    """For a person to confirm: the columns of an instruction by their names, else by their place.

    Of two texts whose names say nothing the first is the question.
    """
    paths = _text_paths(values)
    likely = _guess_roles(paths)
    unnamed = [path for path in paths.values() if path not in likely.values()]
    for column in ("instruction", "output"):
        if column not in likely and unnamed:
            likely[column] = unnamed.pop(0)
    return likely


def _guess_roles(paths: Mapping[str, str]) -> dict[str, str]:
    """For the columns of an instruction the first path whose name sounds like it."""
    roles: dict[str, str] = {}
    for name, path in paths.items():
        if _is_like(name, _LIKE_A_QUESTION):
            roles.setdefault("instruction", path)
        elif _is_like(name, _LIKE_AN_ANSWER):
            roles.setdefault("output", path)
        elif _is_like(name, _LIKE_A_CONTEXT):
            roles.setdefault("input", path)
    unnamed = {name: path for name, path in paths.items() if path not in roles.values()}
    for name, path in unnamed.items():
        if "output" not in roles and _is_like(name, _MAYBE_AN_ANSWER):
            roles["output"] = path
        elif "instruction" not in roles and _is_like(name, _MAYBE_A_QUESTION):
            roles["instruction"] = path
    return {
        column: roles[column] for column in ("instruction", "input", "output") if column in roles
    }


def _is_like(name: str, parts: Sequence[str]) -> bool:
    return any(part in fold(name) for part in parts)
