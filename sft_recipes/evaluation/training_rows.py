"""What an evaluation asks of the rows a run was trained on: task types, examples for a prompt, long shared runs."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from sft_recipes import run_folder
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.data.loading import EVALUATION_COLUMNS, RejectLog, iter_examples
from sft_recipes.data.mixture import prompt_group, prompt_text
from sft_recipes.data.prepared import load_prepared
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import Recipe

# Runs of tokens that an answer shares with a trained one: the convention for copied text, and a soft count.
RUNS = {"memorised_share": 50, "memorised_share_13": 13}
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TrainingRows:
    """How many rows of each task type, and by task type, "" for any, the turns of some rows one after the other."""

    task_types: Counter[str]
    shots: dict[str, list[Message]]

    def shown_to(self, example: Example) -> Example:
        """The example behind the shots of its task type, or of any where training has none of it."""
        shots = self.shots.get(str(example.columns.get("task_type"))) or self.shots[""]
        system = sum(message["role"] == "system" for message in example.messages[:1])
        return replace(
            example,
            messages=[*example.messages[:system], *shots, *example.messages[system:]],
            train=(),
        )


def read_training_rows(
    recipe: Recipe, labeller: Labeller, asked: Sequence[Example], shots: int
) -> TrainingRows:
    """Read the recipe's training data once, without prompts that are `asked`; keep `shots` rows of each task type.

    Those with the largest hash of their prompt, which a drawn eval split would hold out last. Raises InputError if the
    data cannot be read any more, or if there are no questions with one answer to show.
    """
    held_out, counts = {prompt_text(example) for example in asked}, Counter[str]()
    drawn: dict[str, dict[int, list[Message]]] = defaultdict(dict)
    for source in recipe.data.datasets:
        for raw in iter_examples(
            source, recipe.data, RejectLog(recipe.data), columns=EVALUATION_COLUMNS
        ):
            text, kind = (
                prompt_text(example := labeller.for_template(raw)),
                raw.columns.get("task_type"),
            )
            kinds = set() if text in held_out or kind is None else {str(kind)}
            counts.update(kinds)
            turns = [message for message in example.messages if message["role"] != "system"]
            is_shot = [turn["role"] for turn in turns] == [
                "user",
                "assistant",
            ] and not example.tools
            for some in {"", *kinds} if is_shot and text not in held_out else ():
                drawn[some][prompt_group(text, recipe.data.seed)] = turns
                if len(drawn[some]) > shots:
                    del drawn[some][min(drawn[some])]
    if shots and not drawn:
        what = "the training rows hold no question with one answer"
        raise InputError(Problem(recipe.name, "--shots", what, "evaluate without --shots"))
    return TrainingRows(counts, {some: [*chain(*found.values())] for some, found in drawn.items()})


def memorised(recipe: Recipe, answers: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """For each of RUNS whether each answer (ids) shares so long a run with what was trained: 0.0 or 1.0."""
    # No id is negative, and the ends differ: a run across two rows is never one across two answers.
    own = np.array([token for ids in answers for token in (*ids, -1)], dtype=np.int64)
    owner = np.repeat(np.arange(len(answers)), [len(ids) + 1 for ids in answers])
    hashes = {name: _run_hashes(own, size) for name, size in RUNS.items()}
    found = {name: np.zeros(len(answers)) for name in RUNS}
    prepared = load_prepared(recipe, recipe.output_dir / run_folder.PREPARED)
    for batch in prepared.train.select_columns("labels").with_format("numpy").iter(batch_size=1000):
        trained = np.concatenate(
            [part for labels in batch["labels"] for part in (labels, [IGNORE_INDEX])]
        )
        for name, size in RUNS.items():
            found[name][
                owner[: len(hashes[name])][np.isin(hashes[name], _run_hashes(trained, size))]
            ] = 1.0
    return {name: hits.tolist() for name, hits in found.items()}


def _run_hashes(ids: Any, size: int) -> Any:
    """A 64-bit hash of every run of `size` ids (int64)."""
    count, values = max(len(ids) - size + 1, 0), ids.astype(np.int64).view(np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * _BASE + values[offset : offset + count]
    return hashes
