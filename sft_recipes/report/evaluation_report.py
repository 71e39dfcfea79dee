"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_recipes.messages import visible
from sft_recipes.report import evaluation_figures as figures
from sft_recipes.report import page
from sft_recipes.report.evaluation_parts import (
    GAINED,
    LOST,
    SAME,
    Content,
    Row,
    differing_keys,
    endings,
    frequent_openers,
    interval_bar,
    order_rows,
    refusals_by_format,
    refused_count,
    too_few_prompts,
)
from sft_recipes.report.evaluation_text import prompting_sentences

# Samples beyond this many stay in samples.jsonl: a page has to open on a phone.
SHOWN_SAMPLES = 200
ENDINGS = {
    "eos": "stop token",
    "stop_string": "stop string",
    "length": "cut at max_new_tokens",
    "time": "time limit",
}


def render_evaluation_report(
    content: Content,
    samples: Sequence[Row],
    base: Content | None = None,
    base_samples: Sequence[Row] | None = None,
) -> str:
    """The report as one HTML document.

    `content` is that of `metrics.json`: what `Evaluation.as_json` gives, `info`, and whatever else
    was measured. `samples` are the rows of `samples.jsonl`; the base's are in the same order.
    """
    texts = page.macros("evaluation.html")
    metrics = content["metrics"]
    systems = _systems(content)
    answers = _shown_answers(samples, base_samples)
    choices = _choices(answers, base_samples is not None)
    formats = content.get("format_overfitting")
    sections = {
        "Read this first": texts.warnings(
            content.get("warnings", []), content.get("training_rows", {})
        ),
        "Gate": texts.gate(content.get("gate"), interval_bar),
        "Differences": texts.differences(
            systems,
            _compared_metrics(systems, metrics),
            list(differing_keys(systems)),
            _prompting(content),
            figures.forest(systems, metrics),
            figures.learning_curve(content, systems),
        ),
        "Metrics": texts.metrics(content, base, _by_group(metrics)),
        "Task types": texts.task_types(
            content, base, content.get("task_differences", {}), choices["task"]
        ),
        "Format overfitting": texts.format_overfitting(
            formats, content["n"], figures.formats(formats, metrics)
        ),
        "Health of the output": texts.health(content, base, _health(content, base))
        + texts.openers(_openers(samples, base_samples))
        + figures.length_histogram(samples, base_samples),
        "Answers": texts.answers(answers, choices, len(samples)),
        "Training rows that the model finds hardest": texts.suspects(content.get("suspects")),
        "Over training": figures.over_training(content.get("training_curves", {}), metrics),
        "Safety": _safety_section(texts, content.get("safety")),
        "Retention": texts.retention(content.get("retention")),
        "Provenance": texts.provenance(content["info"]),
    }
    title = f"Evaluation of {content['info'].get('model', 'model not recorded')}"
    return page.render_page(title, _summary(content["n"], len(samples)), sections, texts.script())


def _prompting(content: Content) -> list[str]:
    """Whether tuning beat a prompt, where a base was asked."""
    return prompting_sentences(content["prompting"]) if "prompting" in content else []


def _summary(prompts: int, rows: int) -> str:
    summary = f"{prompts} prompts, greedy decoding, two-sided 95 % intervals."
    if prompts < rows:
        return f"{rows} rows of {summary} A prompt counts once."
    return summary


def _systems(content: Content) -> Sequence[Content]:
    """The systems that this one is compared with, at least the base."""
    if content.get("comparisons"):
        return list(content["comparisons"])
    if "differences" in content:
        return [{"name": "base", "differences": content["differences"]}]
    return []


class _ComparedMetric(NamedTuple):
    """A line of the table of differences: one cell for each system, None where it has none."""

    label: str
    differences: Sequence[Content | None]


def _compared_metrics(
    systems: Sequence[Content], metrics: Mapping[str, Content]
) -> list[_ComparedMetric]:
    lines = []
    for name, metric in metrics.items():
        differences = [system["differences"].get(name) for system in systems]
        if any(differences):
            lines.append(_ComparedMetric(metric["label"], differences))
    return lines


def _by_group(metrics: Mapping[str, Content]) -> dict[str, dict[str, Content]]:
    """The metrics by the heading that they stand under."""
    groups: dict[str, dict[str, Content]] = {}
    for name, metric in metrics.items():
        groups.setdefault(metric["group"], {})[name] = metric
    return groups


class _EndingLine(NamedTuple):
    """What ended answers, and of each model how many."""

    text: str
    models: Sequence[Any]


def _health(content: Content, base: Content | None) -> dict[str, Any]:
    """What ended the answers: a bar for each model, and a line for each reason that there was."""
    models = {"Tuned": endings(content, list(ENDINGS))}
    if base is not None:
        models = {"Base": endings(base, list(ENDINGS)), **models}
    lines = []
    for by_model in zip(*models.values(), strict=True):
        if any(ending.count for ending in by_model):
            lines.append(_EndingLine(ENDINGS[by_model[0].reason], by_model))
    return {"bars": models, "lines": lines, "texts": ENDINGS}


def _openers(samples: Sequence[Row], base_samples: Sequence[Row] | None) -> dict[str, Any]:
    """The frequent openers of each model that has any."""
    models = {
        "Base": frequent_openers(base_samples or ()),
        "Tuned": frequent_openers(samples),
    }
    return {model: openers for model, openers in models.items() if openers}


@dataclass(frozen=True, slots=True)
class _ShownAnswer:
    """An answer beside its reference and the base's, and what the page's filters know of it."""

    row: Row
    base: Row | None
    change: str

    @property
    def task(self) -> list[str]:
        """Its task type, if it has one."""
        task = self.row["task_type"]
        return [] if task is None else [str(task)]

    @property
    def filters(self) -> dict[str, Sequence[str]]:
        """The values by which it can be chosen."""
        return {
            "task": [visible(task) for task in self.task],
            "flag": self.row["flags"],
            "change": [self.change],
        }


def _shown_answers(
    samples: Sequence[Row], base_samples: Sequence[Row] | None
) -> list[_ShownAnswer]:
    pairs = order_rows(samples, base_samples)[:SHOWN_SAMPLES]
    return [_ShownAnswer(pair.row, pair.base, pair.change) for pair in pairs]


def _choices(answers: Sequence[_ShownAnswer], has_base: bool) -> dict[str, list[str]]:
    """What each filter of the page offers."""
    tasks: set[str] = set()
    flags: set[str] = set()
    for answer in answers:
        tasks.update(answer.task)
        flags.update(answer.row["flags"])
    return {
        "task": sorted(tasks),
        "flag": sorted(flags),
        "change": [LOST, GAINED, SAME] if has_base else [],
    }


def _safety_section(texts: Any, safety: Content | None) -> Any:
    if not safety:
        return texts.nothing()
    by_model: dict[str, list[Content]] = {}
    for answer in safety["complied"]:
        by_model.setdefault(answer["model"], []).append(answer)
    return texts.safety(
        safety,
        list(_refusals(safety)),
        dict(sorted(by_model.items())),
        too_few_prompts(safety),
    )


class _RefusedShare(NamedTuple):
    """A share refused, and how many prompts that is."""

    share: Content
    refused: int
    answered: int


class _Refusals(NamedTuple):
    """A line of the table: one model in one format."""

    model: str
    format: str
    kinds: Sequence[_RefusedShare]


def _refusals(safety: Content) -> Iterator[_Refusals]:
    for own in refusals_by_format(safety):
        kinds = []
        for share in (own.safe, own.unsafe):
            refused = refused_count(share)
            kinds.append(_RefusedShare(share, refused, share["n"] - refused))
        yield _Refusals(own.model, own.format, kinds)
