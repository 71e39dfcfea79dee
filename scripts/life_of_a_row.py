"""One real row at every stage between its file and the loss, as docs/architecture.md shows it.

    python scripts/life_of_a_row.py RECIPE_OR_DATA [--row N] [--tokenizer DIR_OR_ID]

RECIPE_OR_DATA is a recipe, or a file of rows with the tokenizer of a model. Everything printed comes
from the functions that training calls; this page only calls them in order. In a terminal trained
text is green, as `sft-recipes inspect` shows it, elsewhere it stands between « and ».
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.inspection import coloured, token_runs
from sft_recipes.data.labels import LabelledRow, Labeller
from sft_recipes.data.loading import RejectLog, iter_examples, open_rows
from sft_recipes.data.opening import OpenedData, open_data
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.data.row_table import record_batch
from sft_recipes.errors import InputError, Problem, SFTRecipesError
from sft_recipes.messages import Example, visible

# Longer texts are cut: it is their form that is of interest.
LONGEST_TEXT = 2000
NUMBERS_A_LINE = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the stages of the row that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe_or_data", type=Path, metavar="RECIPE_OR_DATA")
    parser.add_argument("--row", type=int, default=0, help="which row, counted from 0")
    parser.add_argument("--tokenizer", help="folder or name of a model, in place of the recipe's")
    options = parser.parse_args(arguments)
    try:
        opened = open_data(options.recipe_or_data, options.tokenizer, {})
        if opened.labeller is None:
            fix = "add --tokenizer DIR_OR_ID"
            raise InputError(Problem("command line", "--tokenizer", "is needed for a file", fix))
        show_life(opened, opened.labeller, options.row)
    except SFTRecipesError as error:
        raise SystemExit(str(error)) from error


def show_life(opened: OpenedData, labeller: Labeller, number: int) -> None:
    """Print every stage of row `number` of the first data set; the row after it shares its batch."""
    renderer = labeller.renderer
    read = list(islice(_examples(opened, number), 2))
    if not read or read[0].row != number:
        what = f"row {number} is past the end, or no example"
        fix = "count from 0; `sft-recipes check` says which rows are rejected"
        raise InputError(Problem(opened.settings.data.datasets[0].path, "--row", what, fix))
    example = read[0]

    _stage(f"1. The row as it stands in the file ({example.where})")
    _text(_row_of_file(opened, number))

    _stage("2. As messages (data/formats.py)")
    for message in example.messages:
        print(json.dumps(message, ensure_ascii=False))

    _stage("3. As the template needs them (data/admission.py, fitting.py)")
    fitted = labeller.for_template(example)
    if fitted is example:
        print("the same: neither a system prompt nor another form of calls and reasoning is needed")
    else:
        for message in fitted.messages:
            print(json.dumps(message, ensure_ascii=False))

    _stage("4. Rendered by the chat template (data/chat_templates.py)")
    if fitted.text is None:
        _text(renderer.render(fitted.messages, fitted.tools))
    else:
        _text(fitted.text)

    labelled = labeller.label(read)
    rows = [row for row in labelled.rows if row.example == 0]
    neighbours = [row for row in labelled.rows if row.example == 1]
    for dropped in labelled.dropped:
        print(f"{read[dropped.example].where} dropped, {dropped.reason}: {dropped.detail}")
    group = prompt_group(prompt_text(example), opened.settings.data.seed)
    for row in rows:
        _show_ids(renderer, row)
        _stage("6. As a row of a shard in prepared/ (data/row_table.py)")
        _arrays(record_batch([row], 0, [example.row], [group]).to_pylist()[0])
    if rows:
        _show_batches(renderer, [*rows, *neighbours])
        _show_loss(renderer, rows[0])


def _examples(opened: OpenedData, number: int) -> Iterator[Example]:
    """The examples from row `number` on."""
    data = opened.settings.data
    for example in iter_examples(data.datasets[0], data, RejectLog(data)):
        if example.row >= number:
            yield example


def _row_of_file(opened: OpenedData, number: int) -> str:
    """The text of a row where its file has one, else its cells as JSON."""
    source = opened.settings.data.datasets[0]
    for _, rows in open_rows(source, source.split):
        for _, content, text in islice(rows, number, number + 1):
            return text or json.dumps(content, ensure_ascii=False, default=str)
    return ""


def _show_ids(renderer: ChatRenderer, row: LabelledRow) -> None:
    _stage("5. As ids, cut where trained spans begin and end (data/encoding.py, labels.py)")
    console = Console()
    if console.is_terminal:
        console.print(coloured(renderer, row), soft_wrap=True)
    else:
        for run in token_runs(renderer, row):
            text = visible(run.text)
            print(f"«{text}»" if run.is_trained else text, end="")
        print()
    for start, end in row.spans:
        print(f"\n{len(row.ids)} tokens; trained {start}:{end}, the ids {row.input_ids[start:end]}")


def _show_batches(renderer: ChatRenderer, rows: Sequence[LabelledRow]) -> None:
    """The rows in one batch, in both forms; `training/batching.py` chooses the form of a run."""
    given = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    pad_token_id = renderer.tokenizer.pad_token_id
    _stage("7a. In a batch with the row after it, flattened (TRL's collator)")
    flattened = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)(given)
    _arrays({name: flattened[name] for name in ("input_ids", "labels", "position_ids")})
    _arrays({"rows begin at": flattened["cu_seq_lens_q"]})
    _stage("7b. The same batch padded")
    padded = DataCollatorForLanguageModeling(pad_token_id)(given)
    _arrays({name: padded[name] for name in ("input_ids", "labels", "attention_mask")})


def _show_loss(renderer: ChatRenderer, row: LabelledRow) -> None:
    _stage("8. What is learned: at each of these positions the token that comes next")
    for start, end in row.spans:
        for position in range(start, end):
            before = visible(renderer.tokenizer.decode(row.input_ids[position - 1]))
            learned = visible(renderer.tokenizer.decode(row.input_ids[position]))
            print(f"position {position - 1:4}  after {before!r:14} comes {learned!r}")


def _stage(title: str) -> None:
    print(f"\n== {title}")


def _text(text: str) -> None:
    print(visible(text[:LONGEST_TEXT]) + ("..." if len(text) > LONGEST_TEXT else ""))


def _arrays(arrays: Mapping[str, Any]) -> None:
    """Each array under its name, a row of a batch on lines of its own; a number beside its name."""
    for name, values in arrays.items():
        if np.ndim(values) == 0:
            print(f"{name:16} {values}")
            continue
        print(name)
        for row in np.atleast_2d(values):
            for start in range(0, len(row), NUMBERS_A_LINE):
                numbers = row[start : start + NUMBERS_A_LINE]
                print("   " + "".join(f"{number:6}" for number in numbers))


if __name__ == "__main__":
    main()
