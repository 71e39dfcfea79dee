"""What an evaluation asks of the rows a run was trained on: task types, and shots."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter

from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import Recipe

ANY_TYPE = ""


@dataclass(frozen=True)
class TrainingRows:
    """What is known of them: rows by task type, None where they were not read, and shots.

    `shots`: by task type, and under `ANY_TYPE`, the turns of some rows one after the other.
    `unknown`: why they could not be read, for the provenance.
    """

    task_types: Mapping[str, int] | None
    shots: Mapping[str, list[Message]]
    unknown: str = ""

    def shown_to(self, example: Example) -> Example:
        """The example behind the shots of its task type, or of any where there are none of it."""
        task_type = str(example.columns.get("task_type"))
        shots = self.shots.get(task_type) or self.shots[ANY_TYPE]
        turns = list(example.messages)
        first = 1 if turns and turns[0]["role"] == "system" else 0
        messages = [*turns[:first], *shots, *turns[first:]]
        return replace(example, messages=messages, train=())


def read_training_rows(
    recipe: Recipe, labeller: Labeller, asked: Sequence[Example], shots: int
) -> TrainingRows:
    """Read the recipe's training data once, without prompts that are `asked`.

    `shots` rows of each task type are kept. Raises InputError if the data cannot be read any more,
    or if there are no questions with one answer to show.
    """
    held_out = set(map(prompt_text, asked))
    task_types: Counter[str] = Counter()
    draws = {ANY_TYPE: _Draw(shots)}
    for example in _training_examples(recipe, labeller):
        prompt = prompt_text(example)
        if prompt in held_out:
            continue
        names = [ANY_TYPE]
        if example.columns.get("task_type") is not None:
            names.append(str(example.columns["task_type"]))
            task_types[names[-1]] += 1
        turns = _question_and_answer(example)
        for name in names if turns else ():
            draw = draws.setdefault(name, _Draw(shots))
            draw.add(prompt_group(prompt, recipe.data.seed), turns)
    if shots and not draws[ANY_TYPE].turns:
        what = "the training rows hold no question with one answer"
        raise InputError(Problem(recipe.name, "--shots", what, "evaluate without --shots"))
    return TrainingRows(task_types, {name: draw.messages() for name, draw in draws.items()})


def _training_examples(recipe: Recipe, labeller: Labeller) -> Iterator[Example]:
    for source in recipe.data.datasets:
        rejects = RejectLog(recipe.data)
        for example in iter_examples(source, recipe.data, rejects, columns=EVALUATION_COLUMNS):
            yield labeller.for_template(example)


def _question_and_answer(example: Example) -> list[Message]:
    """The two turns of a question with one answer, without a system message; else nothing."""
    turns = [message for message in example.messages if message["role"] != "system"]
    is_one_pair = list(map(itemgetter("role"), turns)) == ["user", "assistant"]
    return turns if is_one_pair and not example.tools else []


class _Draw:
    """The rows with the largest hash of their prompt, which a drawn eval split holds out last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.turns: dict[int, list[Message]] = {}

    def add(self, group: int, turns: list[Message]) -> None:
        """Take the turns of a row in, and put the one with the smallest hash out if it is full."""
        self.turns[group] = turns
        if len(self.turns) > self._size:
            del self.turns[min(self.turns)]

    def messages(self) -> list[Message]:
        """All turns, one row after the other."""
        return list(chain.from_iterable(self.turns.values()))
