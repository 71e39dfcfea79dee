"""This evaluation beside others on the same rows: differences pair by pair, and what differs in recipe and data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.evaluator import Evaluation, by_task_type, compare, read_evaluation
from sft_recipes.messages import Example
from sft_recipes.recipe import read_yaml, rebase_paths
from sft_recipes.statistics import PairedDifference, paired_difference

_ASKED_AS = ("max_new_tokens", "batch_size", "decoding", "template_sha256", "chat_template_kwargs")
_POINTS = 500

Facts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class System:
    """A system that answered the same rows. `facts`: recipe keys, data and way of asking, where they are known."""

    name: str
    evaluation: Evaluation
    facts: Facts = field(default_factory=dict)


def earlier(folder: str, name: str, examples: Sequence[Example]) -> System:
    """An evaluation folder, or of a run folder its evaluation called `name`. InputError unless it asked the same."""
    path = (
        Path(folder) / run_folder.EVALUATIONS / name
        if run_folder.is_run_folder(Path(folder))
        else Path(folder)
    )
    found = read_evaluation(path)
    if [row["messages"] for row in found.rows] != [
        [dict(one) for one in example.messages] for example in examples
    ]:
        what = f"its {len(found.rows)} rows are other conversations than the {len(examples)} that are asked now"
        raise InputError(
            Problem(
                str(path), "", what, "evaluate both on the same data, under the same system prompt"
            )
        )
    info = run_folder.read_json(path / "metrics.json")["info"]
    return System(folder, found, facts_of(path.parent.parent, info))


def facts_of(run: Path, info: Mapping[str, Any]) -> Facts:
    """A run's recipe keys (paths absolute), data and way of asking; without a run folder the last only."""
    facts: dict[str, Mapping[str, Any]] = {"evaluation": {key: info.get(key) for key in _ASKED_AS}}
    if (run / run_folder.DATA).is_file():
        data = run_folder.read_json(run / run_folder.DATA)
        recipe = rebase_paths(read_yaml(run / run_folder.RECIPE)[0], run)
        facts["recipe"] = {key: value for key, value in recipe.items() if key != "output_dir"}
        facts["data"] = {"fingerprint": data["fingerprint"], **data["train"]}
    return facts


def compare_all(this: System, others: Sequence[System]) -> list[dict[str, Any]]:
    """For each other system its metrics, the paired differences this - other, and `changed`: [other's, this one's].

    `on_curve`: the same recipe on another number of rows, a point of the learning curve.
    """
    found = []
    for other in others:
        changed = {
            part: {
                key: pair
                for key in {**ours, **theirs}
                if (pair := [theirs.get(key), ours.get(key)])[0] != pair[1]
            }
            for part, ours in this.facts.items()
            if (theirs := other.facts.get(part)) is not None
        }
        content: dict[str, Any] = {
            "name": other.name,
            "metrics": other.evaluation.as_json()["metrics"],
        }
        content["differences"] = {
            name: one.as_json() for name, one in compare(other.evaluation, this.evaluation).items()
        }
        content |= {"changed": changed, "rows_trained": other.facts.get("data", {}).get("rows")}
        is_curve = [*changed.get("recipe", ())] == ["max_rows"] and "rows" in changed["data"]
        found.append(content | {"on_curve": is_curve})
    return found


def task_table(
    this: Evaluation, base: Evaluation | None, trained: Mapping[str, int] | None
) -> dict[str, Any]:
    """Exact match by task type: paired difference to the base, McNemar's p alone and by Holm, rows in training.

    Without a base the last only; None where the training data is not known.
    """
    before, after = ([row["exact_match"] for row in one.rows] for one in (base or this, this))
    pairs = by_task_type(this.rows, zip(before, after, strict=True))
    found: dict[str, Any] = {
        name: {"training_rows": None if trained is None else trained.get(name, 0)} for name in pairs
    }
    if base:
        differences = {name: paired_difference(*zip(*pairs[name], strict=True)) for name in found}
        adjusted = holm(differences)
        for name, one in differences.items():
            found[name] |= {**one.as_json(), "p_holm": adjusted.get(name)}
    return found


def holm(differences: Mapping[str, PairedDifference]) -> dict[str, float]:
    """p-values adjusted by Holm's procedure; what has none takes no part."""
    known = {name: one.p_value for name, one in differences.items() if one.p_value is not None}
    order = sorted(known, key=lambda name: known[name])
    steps = [known[name] * (len(order) - index) for index, name in enumerate(order)]
    return (
        dict(zip(order, np.minimum(np.maximum.accumulate(steps), 1).tolist(), strict=True))
        if order
        else {}
    )


def training_curves(log: Path) -> dict[str, list[list[float]]]:
    """`[step, value]` of the loss and of everything evaluated while training, from `log.jsonl`; at most 500 of each."""
    curves: dict[str, dict[int, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        entry = json.loads(line)
        for key, value in entry.items():
            # A number that is not finite was written as its name.
            if (key == "loss" or key.startswith("eval_")) and not isinstance(value, str):
                curves.setdefault(key, {})[entry["step"]] = value
    points = {
        key: [list(point) for point in sorted(curve.items())] for key, curve in curves.items()
    }
    return {key: curve[:: -(-len(curve) // _POINTS)] for key, curve in points.items()}
