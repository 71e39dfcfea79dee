"""The table of row formats: what holds for every format in it. A new one gets a row in `EXAMPLES`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.formats import RowFormat, convert_row, detect_format
from sft_recipes.data.reading import columns as columns_module
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.known_formats import FORMATS, TEXT_FORMATS
from sft_recipes.errors import InputError
from sft_recipes.messages import Example

DOCS = Path(__file__).parents[2] / "docs"
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@dataclass(frozen=True)
class FormatExample:
    """A row of a format, and the (role, content) of the turns that it becomes.

    `refused`: values of single columns with which the row is refused, and a part of what is said.
    """

    row: Mapping[str, Any]
    turns: list[tuple[str, str]]
    refused: tuple[tuple[str, Any, str], ...] = ()


EXAMPLES: Mapping[str, FormatExample] = {
    "instruction": FormatExample(
        row={"instruction": "Greet.", "input": "Bob", "output": "Hi Bob"},
        turns=[("user", "Greet.\n\nBob"), ("assistant", "Hi Bob")],
        refused=(("output", "", "the answer is empty"),),
    ),
    "messages": FormatExample(
        row={"messages": CHAT},
        turns=[("user", "q"), ("assistant", "a")],
        refused=(("messages", CHAT[:1], "there is no assistant turn"),),
    ),
    "sharegpt": FormatExample(
        row={"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        turns=[("user", "q"), ("assistant", "a")],
        refused=(("conversations", [], "the conversation is empty"),),
    ),
    "prompt_completion": FormatExample(
        row={"prompt": "q", "completion": "a"},
        turns=[("user", "q"), ("assistant", "a")],
        refused=(("prompt", " ", "the prompt is empty"),),
    ),
    "raw": FormatExample(row={"text": "t"}, turns=[], refused=(("text", " ", "empty"),)),
    "rendered": FormatExample(row={"text": "t"}, turns=[], refused=(("text", " ", "empty"),)),
}
# (format, as what its rows would be read by names in common use): here our own name decides, and
# did so from the beginning.
RELATIVES = {
    ("sharegpt", "messages"),
    ("prompt_completion", "instruction"),
    ("instruction", "prompt_completion"),
}
# Values of the kinds that columns of other data sets hold.
KINDS: tuple[Any, ...] = (
    "text",
    CHAT,
    json.dumps(CHAT),
    {"role": ["user", "assistant"], "content": ["q", "a"]},
    ["one", "two"],
    [["q", "a"]],
    None,
)


def example_of(name: str) -> FormatExample:
    """The example of a format, which every format needs."""
    if name not in EXAMPLES:
        pytest.fail(f"add {name!r} to EXAMPLES in {__file__}: a row, and the turns it becomes")
    return EXAMPLES[name]


def convert(row: Mapping[str, Any], name: str) -> Example:
    """The row as an example, read in this format."""
    return convert_row(row, RowFormat(name, {}), "rows.jsonl", 0, 1)


def detected(row: Mapping[str, Any]) -> str | None:
    """The format that a row is recognised as, None where it is refused."""
    try:
        return detect_format(row, {}, "rows.jsonl:1")
    except InputError:
        return None


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_its_turns(name: str) -> None:
    """The example of each format has the turns that it is meant to have; text stays text."""
    example = example_of(name)
    converted = convert(example.row, name)
    assert [(turn["role"], turn["content"]) for turn in converted.messages] == example.turns
    if name in TEXT_FORMATS:
        assert converted.text == example.row["text"]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in TEXT_FORMATS])
def test_a_row_is_recognised_unasked(name: str) -> None:
    """The example of each format is taken for no other, and each format's for that one."""
    assert detected(example_of(name).row) == name


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in TEXT_FORMATS])
def test_system_and_tools_stand_beside_every_conversation(name: str) -> None:
    """A system column is the first turn and tools are kept, whatever the format."""
    example = example_of(name)
    converted = convert({"system": "Be kind.", "tools": '[{"name": "f"}]', **example.row}, name)
    turns = [(turn["role"], turn["content"]) for turn in converted.messages]
    assert turns == [("system", "Be kind."), *example.turns]
    assert converted.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_refused(name: str) -> None:
    """Each value that no row may have is refused at its column."""
    example = example_of(name)
    assert example.refused, f"give the example of {name!r} a value that is refused"
    for column, value, message in example.refused:
        with pytest.raises(RowProblem) as error:
            convert({**example.row, column: value}, name)
        assert message in error.value.what
        assert re.match(r"\w+", error.value.field)[0] in example.row  # type: ignore[index]


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_values_are_refused_by_name(name: str) -> None:
    """A number, null or nothing in a required column is no row of the format.

    Whatever else is refused, the error names a column that the row has, or the one that it lacks.
    """
    row = example_of(name).row
    for column in FORMATS[name].required:
        for value in (*KINDS, 3.5, True, "", [], {}, [None]):
            try:
                convert({**row, column: value}, name)
            except RowProblem as problem:
                field = re.match(r"\w+", problem.field)
                assert field is not None and field[0] in row, (column, value, problem)
            else:
                assert value not in (3.5, None), f"{name}: {column}: {value!r} is taken"
        lacking = {other: row[other] for other in row if other != column}
        with pytest.raises(RowProblem) as error:
            convert(lacking, name)
        assert error.value.field == column or "this row looks like" in error.value.what


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in TEXT_FORMATS])
def test_a_format_takes_no_rows_that_are_read_without_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that names in common use decide on are not claimed by a format with columns of that name.

    Such a format tells its rows by their values, with `fits`.
    """
    required = FORMATS[name].required
    rows: list[dict[str, Any]] = []
    for values in product(KINDS, repeat=len(required)):
        rows.append(dict(zip(required, values, strict=True)))
    with_it = [detected(row) for row in rows]
    others = {other: format for other, format in FORMATS.items() if other != name}
    monkeypatch.setattr(columns_module, "FORMATS", others)
    for row, claimed in zip(rows, with_it, strict=True):
        without_it = detected(row)
        if without_it is None or claimed == without_it or (name, without_it) in RELATIVES:
            continue
        pytest.fail(
            f"{row} was read as {without_it} and is now {claimed}: give {name!r} in "
            "known_formats.py a `fits` that tells its rows by their values"
        )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_documented(name: str) -> None:
    """The page of formats has a row for each."""
    page = DOCS / "data.md"
    assert f"\n| `{name}` | " in page.read_text(encoding="utf-8"), f"add {name!r} to {page}"


def test_a_column_is_found_by_its_own_name_whatever_its_case() -> None:
    """Names in common use are a table, in which a column needs no entry."""
    values = {"Instruction": "q", "Output": "a", "History": [["q1", "a1"]]}
    wanted = ("instruction", "output", "history")
    assert "history" not in columns_module.COMMON_NAMES
    assert columns_module.recognise(values, "instruction", {}, "rows.jsonl:1", wanted) == {
        "instruction": "Instruction",
        "output": "Output",
        "history": "History",
    }


def test_a_format_that_tells_its_rows_by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with its columns and other values is read as if the format did not exist.

    Where nothing else reads it, the error says how to see what is wrong.
    """
    utterances = columns_module.Format(
        required=("dialog",),
        messages=lambda fields: [],
        fits=lambda values: (
            isinstance(values["dialog"], list)
            and all(isinstance(line, str) for line in values["dialog"])
        ),
    )
    monkeypatch.setattr(columns_module, "FORMATS", {**FORMATS, "dialog": utterances})
    assert detected({"dialog": ["Hi", "Hello"]}) == "dialog"
    assert detected({"dialog": CHAT}) == "messages"
    assert detected({"dialog": "A: hi", "summary": "Greetings."}) == "instruction"
    with pytest.raises(InputError, match="those of dialog, their values are not"):
        detect_format({"dialog": 3}, {}, "rows.jsonl:1")
    mapping = {"dialog": "turns.lines"}
    nested = {"turns": {"lines": ["Hi", "Hello"]}}
    assert detect_format(nested, mapping, "rows.jsonl:1") == "dialog"
