"""Generate, score, compare, write, print: what command and training callback share."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.answering import answer
from sft_recipes.evaluation.metrics import (
    HEADLINES,
    METRICS,
    summarise,
    summarise_flags,
)
from sft_recipes.evaluation.prompts import Row, count_prompts, prompts_of
from sft_recipes.evaluation.samples import SAMPLES, read_samples
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_parts import order_rows
from sft_recipes.report.evaluation_report import render_evaluation_report
from sft_recipes.report.evaluation_text import answers_text
from sft_recipes.run_folder import SCHEMA_VERSION
from sft_recipes.statistics import Estimate, PairedDifference, paired_difference
from sft_recipes.text_files import interpreting

METRICS_FILE = "metrics.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set.

    `rows` are the scored samples in data order, the rest is computed from them, with rows of an
    equal prompt as one (`prompts.py`). `task_types`: exact match by the data's `task_type` column,
    empty without it. `data_sets`: exact match by data set of a mixture. `flags`: share of prompts
    with each flag.
    """

    metrics: Mapping[str, Estimate]
    flags: Mapping[str, Estimate]
    stop_reasons: Mapping[str, int]
    task_types: Mapping[str, Estimate]
    data_sets: Mapping[str, Estimate]
    rows: Sequence[Mapping[str, Any]]

    def as_json(self, base: Self | None = None) -> dict[str, Any]:
        """Everything but the rows, as plain data; with `base`, the paired differences too."""
        content = {
            "n": count_prompts(self.rows),
            "rows": len(self.rows),
            "metrics": described(self.metrics),
            "flags": estimates_as_json(self.flags),
            "stop_reasons": dict(self.stop_reasons),
            "task_types": estimates_as_json(self.task_types),
            "data_sets": estimates_as_json(self.data_sets),
        }
        if base is not None:
            content["differences"] = estimates_as_json(compare(base, self))
        return content


def described(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates of metrics as plain data, with what each metric is called and counts."""
    return {name: METRICS[name].describe(estimate) for name, estimate in estimates.items()}


def estimates_as_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates by name as plain data."""
    return {name: estimate.as_json() for name, estimate in estimates.items()}


def evaluate(model: Any, renderer: Any, examples: Sequence[Example], **asking: Any) -> Evaluation:
    """Answer the last turn of each example greedily and score it as it came: see `answer`."""
    return evaluation_from_rows(answer(model, renderer, examples, **asking).rows())


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The evaluation of scored rows, fresh or read from `samples.jsonl`."""
    data_sets = _rows_by("data_set", rows)
    if len(data_sets) == 1:
        data_sets = {}
    return Evaluation(
        metrics=summarise(rows),
        flags=summarise_flags(rows),
        stop_reasons=dict(Counter(map(itemgetter("stop_reason"), rows))),
        task_types=_exact_matches(rows_by_task_type(rows)),
        data_sets=_exact_matches(data_sets),
        rows=list(rows),
    )


def rows_by_task_type(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by task type in alphabetical order, without rows that have none."""
    return _rows_by("task_type", rows)


def _rows_by(column: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by a column's value in alphabetical order, without rows that have none."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(column) is not None:  # earlier versions wrote no data_set
            groups.setdefault(str(row[column]), []).append(row)
    return dict(sorted(groups.items()))


def _exact_matches(groups: Mapping[str, Sequence[Row]]) -> dict[str, Estimate]:
    """Exact match of each group of rows."""
    metric = METRICS["exact_match"]
    estimates = {}
    for name, rows in groups.items():
        estimates[name] = metric.estimate(metric.of_prompts(rows))
    return estimates


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote, for a comparison with an earlier run."""
    rows = read_samples(folder)
    with interpreting(folder / SAMPLES, "evaluate again"):
        return evaluation_from_rows(rows)


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, PairedDifference]:
    """Paired differences tuned - base of the headline metrics that any row has.

    Raises as `check_same_rows`.
    """
    check_same_rows(base, tuned)
    differences = {}
    for metric in HEADLINES:
        difference = paired_difference(
            metric.of_rows(base.rows),
            metric.of_rows(tuned.rows),
            groups=prompts_of(tuned.rows),
            unit=metric.unit,
            higher_is_better=True,
        )
        if difference.n:
            differences[metric.name] = difference
    return differences


def check_same_rows(base: Evaluation, tuned: Evaluation) -> None:
    """Raise InputError unless both answered the same conversations, of the same task types."""
    if _asked(base) != _asked(tuned):
        what = (
            f"the base answered other rows ({len(base.rows)}) "
            f"than the tuned model ({len(tuned.rows)})"
        )
        raise InputError(Problem("evaluation", "base", what, "evaluate both on the same data"))


def _asked(evaluation: Evaluation) -> list[Any]:
    return list(map(itemgetter("messages", "task_type"), evaluation.rows))


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    info: Mapping[str, Any],
    base: Evaluation | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `metrics.json`, `samples.jsonl` and `report.html`; with `base`, its differences too.

    `info` is plain data on where the numbers come from: model, data, template hash, decoding,
    versions; `extra` what else was measured: `gate`, `format_overfitting`. The base's own files are
    written by a call of their own.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "info": info,
        **evaluation.as_json(base),
        **(extra or {}),
    }
    if base is None:
        report = render_evaluation_report(content, evaluation.rows)
    else:
        report = render_evaluation_report(content, evaluation.rows, base.as_json(), base.rows)
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    files = {
        METRICS_FILE: dump(content, indent=2),
        SAMPLES: "\n".join(map(dump, evaluation.rows)),
        REPORT: report,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # JSON can carry half a surrogate pair that UTF-8 cannot; escaped it stays the same JSON.
        (folder / name).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def examples_text(tuned: Evaluation, base: Evaluation | None, examples: int) -> str:
    """At most so many answers side by side; those that became wrong come first."""
    pairs = order_rows(tuned.rows, None if base is None else base.rows)
    return answers_text(pairs[:examples])
