"""Write the pages of docs/reference/ that follow from the code: recipe keys and metrics, and
the doctor's checks.

    python scripts/reference.py

Names, types, defaults and refusals are asked of the code; what a key means in words stands in
`reference_keys.yaml` beside this file. `tests/test_docs.py` fails where a page is not what this prints.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.doctor.doctor import CHECKS
from sft_recipes.evaluation.gate_bounds import INDICATORS
from sft_recipes.evaluation.metric import Metric
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.recipe_checks import (
    IDLE,
    NEEDS,
    NOTES,
    REFUSED,
    REFUSED_VALUES,
    RENAMED,
    TABLES,
    Key,
)
from sft_recipes.recipe_keys import (
    DATA_KEYS,
    EVALUATION_KEYS,
    OWN_KEYS,
    SOURCE_KEYS,
    trl_keys,
)

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
TRL_MEANINGS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("reference_keys.yaml").read_text(encoding="utf-8")
)
NOTICE = (
    "<!-- Written by scripts/reference.py: change the code or scripts/reference_keys.yaml, "
    "then `make docs`. -->"
)
# How the keys of each of recipe.py's dataclasses are called.
OWN_GROUPS = {
    "DatasetSource": "How rows are read, beside `dataset_name` or inside `datasets`",
    "DataSettings": "Which rows",
    "LabelSettings": "What is trained; see [labels](labels.md)",
    "TemplateSettings": "Chat template",
    "TopKeys": "The run",
}
TABLE_HEAD = ["", "| key | default | takes | meaning |", "|---|---|---|---|"]
_TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "dict": "mapping",
    "DatasetSource": "text or mapping",
}
_MOST_CHOICES = 10


def recipe_keys_page() -> str:
    """Every key that a recipe takes: default, form, meaning, and what of it is refused."""
    lines = [
        "# Recipe keys",
        "",
        NOTICE,
        "",
        "A recipe is one flat YAML file. A value that is not of the form in the column `takes`, an",
        "unknown key and a key that would have no effect are refused with the fix, and null is the",
        "default. `--key value` on the command line overrides a key. A path that starts with `./` or",
        "`../` is relative to the recipe file. `2e-5` may be written for 0.00002. Keys that are not",
        "taken stand in [refused-keys.md](refused-keys.md), each with what to use instead.",
        "",
        "## This project's own keys",
    ]
    for settings, title in OWN_GROUPS.items():
        names = [name for name in TABLES["keys"][settings] if name in OWN_KEYS]
        lines += ["", f"### {title}", *TABLE_HEAD]
        lines += [_line(name, OWN_KEYS[name]) for name in names]
    lines += ["", "### TRL's data keys, read here with the same meaning", *TABLE_HEAD]
    lines += [_line(name, key) for name, key in DATA_KEYS.items()]
    lines += ["", "### Inside `datasets`, beside the keys that say how rows are read", *TABLE_HEAD]
    lines += [_line(name, key) for name, key in SOURCE_KEYS.items() if name not in OWN_KEYS]
    lines += ["", "### Inside `evaluation`", *TABLE_HEAD]
    lines += [_line(f"evaluation.{name}", key) for name, key in EVALUATION_KEYS.items()]
    lines += ["", "## TRL's keys", ""]
    lines += ["They keep their names and meaning and go to `SFTConfig` and `ModelConfig` verbatim."]
    for title, meanings in TRL_MEANINGS.items():
        lines += ["", f"### {title}", *TABLE_HEAD, *_trl_lines(meanings)]
    return "\n".join(lines) + "\n"


def refused_keys_page() -> str:
    """Every key of TRL and of other recipes that is not taken, with what to use instead."""
    lines = ["# Keys that are not taken", "", NOTICE, ""]
    lines += [
        "An error says the same. The keys that are taken: [recipe-keys.md](recipe-keys.md).",
        "",
    ]
    lines += [
        "## Under another name",
        "",
        "`sft-recipes check --fix` rewrites them in the file.",
        "",
    ]
    lines += ["| written | now | what differs |", "|---|---|---|"]
    lines += [f"| `{old}` | `{new}` | {NOTES.get(old, '')} |" for old, new in RENAMED.items()]
    lines += [
        "",
        "## Refused",
        "",
        "`sft-recipes check --fix` takes out those that only have to be removed, and converts mixtures.",
        "",
    ]
    lines += ["| key | instead |", "|---|---|"]
    lines += [f"| `{name}` | {instead} |" for name, instead in REFUSED.items()]
    return "\n".join(lines) + "\n"


def _trl_lines(meanings: Mapping[str, Any]) -> Iterator[str]:
    keys = {**trl_keys().model, **trl_keys().training}
    for name, meaning in meanings.items():
        default = keys[name].default
        if isinstance(meaning, list):
            default, meaning = meaning
        yield _line(name, dataclasses.replace(keys[name], default=default, meaning=meaning))


def _line(name: str, key: Key) -> str:
    meaning = ". ".join([key.meaning.rstrip("."), *_refusals(name)])
    return f"| `{name}` | {_in_words(key.default)} | {_shortened(key.expected)} | {meaning} |"


def _refusals(name: str) -> Iterator[str]:
    """What of a key is refused, and with which other keys it is, because it would do nothing."""
    for value, instead in REFUSED_VALUES.get(name, {}).items():
        yield f"Refused: `{value}`, {instead}"
    needed = NEEDS.get(name, {})
    if needed:
        states = [f"`{key}`{_one_of(values)}" for key, values in needed.items()]
        yield f"Refused without {' or '.join(states)}"
    for key, values in IDLE.get(name, {}).items():
        yield f"Refused with `{key}`{_one_of(values)}"
    apart = TABLES["apart"]
    for key, other in apart.items():
        if name in (key, other):
            yield f"Refused together with `{other if name == key else key}`"


def _one_of(values: Sequence[Any]) -> str:
    if not values:
        return ""
    words = ["not set" if value is None else _in_words(value) for value in values]
    listed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f": {listed}"


def _in_words(value: Any) -> str:
    """A value as YAML writes it, nothing for none."""
    value = getattr(value, "value", value)
    if value is None or value in ("", {}, dataclasses.MISSING):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _shortened(expected: str) -> str:
    """What a key takes: the words in which another value is refused, less most of a long list."""
    choices = expected.removeprefix("one of ").split(", ")
    if expected.startswith("one of ") and len(choices) > _MOST_CHOICES:
        left_out = len(choices) - _MOST_CHOICES
        return f"{', '.join(choices[:_MOST_CHOICES])} and {left_out} more"
    words = [_TYPES.get(word, word) for word in expected.removeprefix("one of ").split()]
    return " ".join(words)


def metrics_page() -> str:
    """Every metric of an evaluation, from the table that the evaluator, the report and the gate read."""
    lines = [
        "# Metrics",
        "",
        NOTICE,
        "",
        "One table, `METRICS` in `sft_recipes/evaluation/metrics.py`, names every metric. Each comes",
        "with n, the number of prompts that have no value, and a 95 % interval: rows with an equal",
        "prompt count once, with the mean of their values. Those in **bold** are",
        "compared between systems pair by pair and drawn. A gate may name any but the chapter's three.",
        "How to add one: [add-a-metric.md](../how-to/add-a-metric.md).",
    ]
    for group in dict.fromkeys(metric.group for metric in METRICS.values()):
        lines += ["", f"## {group}", ""]
        lines += ["| metric | in a row | definition | number and interval | unit | better |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_metric(metric) for metric in METRICS.values() if metric.group == group]
    lines += ["", "## What else a gate may name", ""]
    lines += [
        "Numbers of several evaluations, asked for where a gate names them; lower is better.",
        "",
    ]
    lines += ["| name | definition |", "|---|---|"]
    lines += [f"| `{name}` | {indicator.definition} |" for name, indicator in INDICATORS.items()]
    return "\n".join(lines) + "\n"


def _metric(metric: Metric) -> str:
    name = f"**`{metric.name}`**" if metric.headline else f"`{metric.name}`"
    statistic = (metric.statistic.__doc__ or "").partition("\n")[0].rstrip(".")
    better = {True: "higher", False: "lower", None: "neither"}[metric.higher_is_better]
    cells = [name, f"`{metric.key}`", metric.definition, statistic, metric.unit, better]
    return f"| {' | '.join(cells)} |"


def doctor_page() -> str:
    """Every check of `sft-recipes doctor`, from the table that runs them."""
    lines = [
        "# What the doctor looks at",
        "",
        NOTICE,
        "",
        "`sft-recipes doctor RUN` makes each of these on files alone: no model is loaded, no pickle is",
        "opened (`training_args.bin`, optimizer states), nothing is asked of the Hub. A check that finds",
        "no files for it says why it did not look. What a rule of thumb decides is marked as a judgement.",
        "How it is used: [examine-a-run.md](../how-to/examine-a-run.md).",
        "",
        "| check | what has to hold |",
        "|---|---|",
    ]
    for name, check in CHECKS.items():
        text = " ".join((check.__doc__ or "").split())
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "recipe-keys.md": recipe_keys_page,
    "refused-keys.md": refused_keys_page,
    "metrics.md": metrics_page,
    "doctor-checks.md": doctor_page,
}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
