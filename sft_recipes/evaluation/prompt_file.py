"""Reads a file of prompts that a rule judges, so that no answer to compare with stands beside them."""

from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.data.loading import open_rows
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message, place
from sft_recipes.recipe import DatasetSource

# What the evaluation reads of a row beside its prompt, from the row and where it stands.
ColumnsOf = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


def read_prompt_file(path: str, columns_of: ColumnsOf) -> list[Example]:
    """The column `prompt` of a file as conversations whose answer is still open.

    Raises InputError for a row without a prompt, and whatever `columns_of` raises.
    """
    examples = []
    for file, rows in open_rows(DatasetSource(path), "train"):
        for number, (line, row, _) in enumerate(rows):
            where = place(file, number, line)
            if isinstance(row, RowProblem):
                raise InputError(row.at(where))
            messages = _messages(row, where)
            columns = columns_of(row, where)
            examples.append(Example(messages, file, number, line, columns=columns))
    return examples


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    prompt = str(row.get("prompt") or "").strip()
    if not prompt:
        raise InputError(Problem(where, "prompt", "there is no `prompt`", "name the column so"))
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": None},
    ]
