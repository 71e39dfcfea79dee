"""What an evaluation asks of the rows a run was trained on: overlap, task types, and shots."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.data.trained_rows import TrainedRows
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.overlap import best_hits, prompt_overlaps, question
from sft_recipes.recipe import Recipe

Turns = list[Message]
ANY_TYPE = ""
# Training rows that a base is asked to choose among numbers of shots: enough to tell 2 shots from
# none, and a minute on a CPU.
PROBES = 32
_SHOWN = 20


class SeenRow(NamedTuple):
    """An asked row whose prompt was trained, the training row, and the rule that found it."""

    where: str
    trained: str
    rule: str


@dataclass(frozen=True)
class TrainingRows:
    """What is known of them: rows by task type, None where they were not read, and shots.

    `shots`: by task type, and under `ANY_TYPE`, some rows, each its question and its answer.
    `probes`: other rows, for choosing how many shots to show. `seen`: the asked rows with a prompt
    that was trained, equal or nearly. `unknown`: why the rows of a run could not be read.
    """

    task_types: Mapping[str, int] | None
    shots: Mapping[str, list[Turns]] = field(default_factory=dict)
    probes: Sequence[Example] = ()
    seen: Sequence[SeenRow] = ()
    unknown: str = ""

    def shown_to(self, example: Example, count: int) -> Example:
        """The example behind `count` shots of its task type, of any where there are none of it."""
        task_type = str(example.columns.get("task_type"))
        shots = self.shots.get(task_type) or self.shots[ANY_TYPE]
        turns = list(example.messages)
        first = 1 if turns and turns[0]["role"] == "system" else 0
        shown = list(chain.from_iterable(shots[:count]))
        messages = [*turns[:first], *shown, *turns[first:]]
        return replace(example, messages=messages, train=())

    def as_json(self) -> dict[str, Any]:
        """How many asked rows were trained on, by rule, and some of them; or why it is unknown."""
        if self.task_types is None:
            return {"unknown": self.unknown or "this is no run folder"}
        return {
            "rows": len(self.seen),
            "by_rule": dict(Counter(row.rule for row in self.seen)),
            "shown": [row._asdict() for row in self.seen[:_SHOWN]],
        }

    def refuse_seen(self, option: str) -> None:
        """Raise InputError where a row that is asked was trained on."""
        fix = "take it out of the evaluation or of the training data, or add --allow_trained_rows"
        problems = []
        for row in self.seen:
            what = f"trained on as {row.trained} ({row.rule}): it says nothing of other prompts"
            problems.append(Problem(row.where, option, what, fix))
        if problems:
            raise InputError(problems)


def read_training_rows(
    recipe: Recipe,
    labeller: Labeller,
    trained: TrainedRows,
    asked: Sequence[Example],
    shots: int = 0,
) -> TrainingRows:
    """Read the rows that were `trained` once, and compare them with those that are `asked`.

    `shots` rows of each task type are kept, none with a prompt that is asked, and with them some
    rows to try them on. Raises InputError if the data cannot be read any more, or if there are no
    questions with one answer to show.
    """
    held_out = set(map(prompt_text, asked))
    task_types: Counter[str] = Counter()
    draws = {ANY_TYPE: _Draw(shots)}
    probes = _Draw(PROBES if shots else 0)
    prompts: list[str] = []
    places: list[str] = []
    for example in _trained_examples(recipe, labeller, trained):
        prompts.append(question(example) or example.text or "")
        places.append(example.where)
        names = [ANY_TYPE]
        if example.columns.get("task_type") is not None:
            names.append(str(example.columns["task_type"]))
            task_types[names[-1]] += 1
        prompt = prompt_text(example)
        turns = _question_and_answer(example)
        if prompt in held_out or not turns:
            continue
        group = prompt_group(prompt, recipe.data.seed)
        probes.add(-group, example)
        for name in names:
            draw = draws.setdefault(name, _Draw(shots))
            draw.add(group, turns)
    if shots and not draws[ANY_TYPE].rows:
        what = "the training rows hold no question with one answer"
        raise InputError(Problem(recipe.name, "--shots", what, "evaluate without --shots"))
    shown = {name: list(draw.rows.values()) for name, draw in draws.items()}
    groups = set(chain.from_iterable(draw.rows for draw in draws.values()))
    tried_on = [example for group, example in probes.rows.items() if -group not in groups]
    return TrainingRows(task_types, shown, tried_on, _seen(asked, prompts, places))


def _seen(asked: Sequence[Example], prompts: Sequence[str], places: Sequence[str]) -> list[SeenRow]:
    """The asked rows that nearly stand in the training rows of these prompts."""
    hits = best_hits(prompt_overlaps(prompts, list(map(question, asked))))
    seen = []
    for row, hit in hits.items():
        seen.append(SeenRow(asked[row].where, places[hit.train_row], hit.rule))
    return seen


def _trained_examples(
    recipe: Recipe, labeller: Labeller, trained: TrainedRows
) -> Iterator[Example]:
    for number, source in enumerate(recipe.data.datasets):
        rejects = RejectLog(recipe.data)
        for example in iter_examples(source, recipe.data, rejects, columns=EVALUATION_COLUMNS):
            if trained.holds(number, example):
                yield labeller.for_template(example)


def _question_and_answer(example: Example) -> Turns:
    """The two turns of a question with one answer, without a system message; else nothing."""
    turns = [message for message in example.messages if message["role"] != "system"]
    is_one_pair = list(map(itemgetter("role"), turns)) == ["user", "assistant"]
    return turns if is_one_pair and not example.tools else []


class _Draw:
    """The rows with the largest keys.

    The keys are hashes of prompts, of which a drawn eval split holds the largest out last.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.rows: dict[int, Any] = {}

    def add(self, key: int, row: Any) -> None:
        """Take a row in, and put the one with the smallest key out if it is full."""
        self.rows[key] = row
        if len(self.rows) > self._size:
            del self.rows[min(self.rows)]
