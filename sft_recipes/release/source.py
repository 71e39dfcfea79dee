"""What an export starts from: a finished run of this project, or the folder that another tool saved."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sft_recipes import models, run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.kept_examples import read_examples
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, Recipe, TemplateSettings
from sft_recipes.release.finished_run import finished_run

ROWS = 200  # that are linted
# What a model is asked whose rows are not known: questions of one turn and of two.
_TURNS = (
    ("Name a colour.", "Blue."),
    ("What is the capital of France?", "Paris."),
    ("Write one sentence about rain.", "Rain fell all night."),
    ("Count from one to five.", "One, two, three, four, five."),
)


class Source(NamedTuple):
    """A trained model as it was rendered, what was trained of a row, and rows to ask.

    `recipe`: None for the folder of another tool.
    """

    recipe: Recipe | None
    renderer: ChatRenderer
    labels: LabelSettings
    examples: list[Example]


def open_source(run: Path) -> Source:
    """The run in a folder. Raises InputError for one that is not finished, or that lacks what a server
    needs.
    """
    if run_folder.is_run_folder(run):
        recipe = finished_run(run)
        tokenizer = load_tokenizer(str(run))
        renderer = ChatRenderer(tokenizer, recipe.template.chat_template_kwargs)
        return Source(recipe, renderer, recipe.labels, _rows_of_run(run))
    models.check_model(str(run))
    tokenizer = load_tokenizer(str(run))
    if not tokenizer.chat_template:
        what = "there is no chat template, and without one a server cannot make a prompt"
        place = run / "chat_template.jinja"
        fix = f"save the template that it was trained with as {place}"
        raise InputError(Problem(str(run), "chat_template", what, fix))
    renderer = attach_chat_template(tokenizer, TemplateSettings("tokenizer"))
    return Source(None, renderer, LabelSettings(), _rows_of_ours(str(run)))


def _rows_of_run(run: Path) -> list[Example]:
    """Rows of the run's data, held-out ones where there are any."""
    path = run / run_folder.PREPARED / "eval_examples.jsonl"
    if not path.is_file():
        fix = f"run `sft-recipes prepare {run / run_folder.RECIPE}` first"
        raise InputError(Problem(str(path), "", "there are no rows to compare on", fix))
    examples = []
    for grouped in islice(read_examples(path), ROWS):
        examples.append(grouped.example)
    return examples


def _rows_of_ours(name: str) -> list[Example]:
    examples: list[Example] = []
    for row, (question, answer) in enumerate(_TURNS):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        examples.append(Example(messages=messages, source=name, row=row))
    talk = [*examples[0].messages, *examples[1].messages]
    examples.append(Example(messages=talk, source=name, row=len(_TURNS)))
    return examples
