"""This evaluation beside others on the same rows: paired differences, and what else differs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.evaluator import (
    METRICS_FILE,
    Evaluation,
    compare,
    estimates_as_json,
    read_evaluation,
    rows_by_task_type,
)
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.evaluation.prompts import prompts_of
from sft_recipes.messages import Example
from sft_recipes.recipe import read_yaml, rebase_paths
from sft_recipes.statistics import PairedDifference, paired_difference
from sft_recipes.text_files import RESTORE, interpreting, read_json_lines

_ASKED_AS = (
    "max_new_tokens",
    "batch_size",
    "dtype",
    "decoding",
    "template_sha256",
    "chat_template_kwargs",
)
# Of a training curve; more are not seen in a figure of that width.
_POINTS = 500
_EVALUATE_AGAIN = "evaluate it again"

Facts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class System:
    """A system that answered the same rows.

    `facts`: recipe keys, data and way of asking, where they are known.
    """

    name: str
    evaluation: Evaluation
    facts: Facts = field(default_factory=dict)


def earlier(folder: str, name: str, examples: Sequence[Example]) -> System:
    """An evaluation folder, or of a run folder its evaluation called `name`.

    Raises InputError unless it asked the same conversations.
    """
    path = Path(folder)
    if run_folder.is_run_folder(path):
        path = path / run_folder.EVALUATIONS / name
    evaluation = read_evaluation(path)
    asked_then = list(map(itemgetter("messages"), evaluation.rows))
    asked_now = [list(map(dict, example.messages)) for example in examples]
    if asked_then != asked_now:
        what = (
            f"its {len(asked_then)} rows are other conversations "
            f"than the {len(asked_now)} that are asked now"
        )
        fix = "evaluate both on the same data, under the same system prompt"
        raise InputError(Problem(str(path), "", what, fix))
    metrics = run_folder.read_json(path / METRICS_FILE, _EVALUATE_AGAIN)
    with interpreting(path / METRICS_FILE, _EVALUATE_AGAIN):
        facts = facts_of(path.parent.parent, metrics["info"])
    return System(folder, evaluation, facts)


def facts_of(run: Path, info: Mapping[str, Any]) -> Facts:
    """A run's recipe keys (paths absolute), data and way of asking.

    Without a run folder the last only.
    """
    facts: dict[str, Mapping[str, Any]] = {"evaluation": {key: info.get(key) for key in _ASKED_AS}}
    if (run / run_folder.DATA).is_file():
        data = run_folder.read_json(run / run_folder.DATA)
        with interpreting(run / run_folder.DATA, RESTORE):
            facts["data"] = {"fingerprint": data["fingerprint"], **data["train"]}
        recipe = dict(rebase_paths(read_yaml(run / run_folder.RECIPE)[0], run))
        recipe.pop("output_dir", None)
        facts["recipe"] = recipe
    return facts


def compare_all(this: System, others: Sequence[System]) -> list[dict[str, Any]]:
    """For each other system its metrics, the paired differences this - other, and what differs.

    `changed`: [the other's, this one's] by part and key. `on_curve`: the same recipe on another
    number of rows, a point of the learning curve.
    """
    compared = []
    for other in others:
        changed = _changed(this.facts, other.facts)
        differs_in_rows_only = list(changed.get("recipe", ())) == ["max_rows"]
        content = {
            "name": other.name,
            "metrics": estimates_as_json(other.evaluation.metrics),
            "differences": estimates_as_json(compare(other.evaluation, this.evaluation)),
            "changed": changed,
            "rows_trained": other.facts.get("data", {}).get("rows"),
            "on_curve": differs_in_rows_only and "rows" in changed["data"],
        }
        compared.append(content)
    return compared


def _changed(ours: Facts, theirs: Facts) -> dict[str, dict[str, list[Any]]]:
    """[theirs, ours] of every key that differs, by the parts that both know."""
    changed = {}
    for part, own in ours.items():
        if part not in theirs:
            continue
        other = theirs[part]
        differing = {}
        for key in {**own, **other}:
            if own.get(key) != other.get(key):
                differing[key] = [other.get(key), own.get(key)]
        changed[part] = differing
    return changed


def task_table(
    this: Evaluation, base: Evaluation | None, trained: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """Exact match by task type: paired difference to the base, McNemar's p alone and by Holm.

    `training_rows` are those of `trained`, None where the training data is not known. Without a
    base there is nothing else.
    """
    exact = METRICS["exact_match"]
    after = rows_by_task_type(this.rows)
    table: dict[str, dict[str, Any]] = {}
    for name in after:
        table[name] = {"training_rows": None if trained is None else trained.get(name, 0)}
    if base is None:
        return table
    before = rows_by_task_type(base.rows)
    differences = {}
    for name, rows in after.items():
        differences[name] = paired_difference(
            exact.of_rows(before[name]), exact.of_rows(rows), groups=prompts_of(rows)
        )
    adjusted = holm(differences)
    for name, difference in differences.items():
        table[name] |= {**difference.as_json(), "p_holm": adjusted.get(name)}
    return table


def holm(differences: Mapping[str, PairedDifference]) -> dict[str, float]:
    """p-values adjusted by Holm's procedure; what has none takes no part."""
    p_values: dict[str, float] = {}
    for name, difference in differences.items():
        if difference.p_value is not None:
            p_values[name] = difference.p_value
    adjusted = {}
    largest = 0.0
    for index, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        # Never below that of a smaller p-value.
        largest = max(largest, p_values[name] * (len(p_values) - index))
        adjusted[name] = min(largest, 1.0)
    return adjusted


def training_curves(log: Path) -> dict[str, list[list[float]]]:
    """`[step, value]` of the loss and of everything evaluated while training, from `log.jsonl`.

    At most 500 points of each.
    """
    curves: dict[str, dict[int, float]] = {}
    for entry in _entries(log):
        for key, value in entry.items():
            # A number that is not finite was written as its name.
            if (key == "loss" or key.startswith("eval_")) and not isinstance(value, str):
                curves.setdefault(key, {})[entry["step"]] = value
    thinned = {}
    for key, curve in curves.items():
        every = math.ceil(len(curve) / _POINTS)
        thinned[key] = [[step, curve[step]] for step in sorted(curve)[::every]]
    return thinned


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    if log.is_file():
        for line in read_json_lines(log, "delete that line"):
            with interpreting(line.where, "delete that line"):
                yield {**line.content, "step": int(line.content["step"])}
