"""The evaluation report: made from the content of `metrics.json` and `samples.jsonl`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes.report import evaluation_figures as figures
from sft_recipes.report import page, plain_words
from sft_recipes.report.evaluation_answers import filters_of, shown_answers, task_types_of
from sft_recipes.report.evaluation_parts import (
    Content,
    IntervalBar,
    Row,
    differing_keys,
    endings,
    frequent_openers,
    interval_bar,
    metric_names,
    refusals_by_format,
    refused_count,
    too_few_prompts,
)
from sft_recipes.report.evaluation_tables import prompting_sentences
from sft_recipes.report.evaluation_text import main_figures
from sft_recipes.report.evaluation_verdict import verdict_of
from sft_recipes.report.plain_words import model_name
from sft_recipes.report.review_text import ReviewLine, review_lines

_BIG_FIGURES = 4
ENDINGS = {
    "eos": "stop token",
    "stop_string": "stop string",
    "length": "cut at the token limit",
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
    first = page.macros("answers.html")
    metrics = content["metrics"]
    systems = _systems(content)
    answers = shown_answers(samples, base_samples)
    choices = filters_of(answers, base_samples is not None)
    formats = content.get("format_overfitting")
    sections = {
        "Verdict": _card(first, content, base, samples) + _seen_rows(texts, content),
        "Gate": _gate_section(texts, content, base),
        "Answers": first.answers(answers, choices, len(samples)),
        "What people preferred": first.review(_review(content)),
        "Differences": texts.differences(
            systems,
            _compared_metrics(systems, metrics),
            list(differing_keys(systems)),
            _prompting(content),
            figures.forest(systems, metrics),
            figures.learning_curve(content, systems),
        ),
        "Metrics": texts.metrics(content, base, _by_group(metrics, base)),
        "Task types": texts.task_types(
            content, base, content.get("task_differences", {}), task_types_of(answers)
        ),
        "Data sets": texts.data_sets(content, base),
        "Format overfitting": texts.format_overfitting(
            formats, content["n"], metrics, figures.formats(formats, metrics)
        ),
        "Health of the output": texts.health(content, base, _health(content, base))
        + texts.openers(_openers(samples, base_samples))
        + figures.length_histogram(samples, base_samples),
        "Training rows that the model finds hardest": texts.suspects(content.get("suspects")),
        "During training": figures.over_training(content, metrics),
        "Safety": _safety_section(texts, content.get("safety")),
        "Retention": texts.retention(content.get("retention")),
        "Provenance": texts.provenance(content["info"]),
    }
    summary = _summary(content["n"], len(samples))
    return page.render_page(_title(content), summary, sections, first.script(), first.style())


def _title(content: Content) -> str:
    return "Evaluation of " + model_name(content["info"].get("model") or "model not recorded")


def _card(first: Any, content: Content, base: Content | None, samples: Sequence[Row]) -> Any:
    verdict = verdict_of(content, base, samples)
    return first.verdict(verdict, content.get("warnings", []), _figures(content, base))


def _seen_rows(texts: Any, content: Content) -> Any:
    """The asked rows that were trained on."""
    return texts.trained_rows(content.get("training_rows", {}).get("shown", []))


class _BigFigure(NamedTuple):
    """A figure of the card; `base` is None without one."""

    words: str
    base: Content | None
    tuned: Content


def _figures(content: Content, base: Content | None) -> list[_BigFigure]:
    shown = []
    for figure in main_figures(content, _BIG_FIGURES):
        of_base = base and base["metrics"][figure.metric]
        shown.append(_BigFigure(figure.words, of_base, content["metrics"][figure.metric]))
    return shown


class _JudgedBound(NamedTuple):
    """A line of the gate; `base`: the base's value of the same, where it was measured."""

    line: Content
    name: str
    verdict: str
    base: float | None
    bar: IntervalBar | None


def _gate_section(texts: Any, content: Content, base: Content | None) -> Any:
    gate = content.get("gate")
    if not gate:
        return texts.nothing()
    judged = []
    unjudged = []
    for line in gate["lines"]:
        bound = _JudgedBound(
            line,
            plain_words.bound_name(line, metric_names(content)),
            plain_words.gate_verdict(line["verdict"]),
            _value_in_base(line, base),
            interval_bar(line),
        )
        if plain_words.is_judged(line):
            judged.append(bound)
        else:
            unjudged.append(bound)
    verdict = plain_words.gate_verdict(gate["verdict"])
    return texts.gate(gate, verdict, judged, unjudged, base is not None)


def _value_in_base(line: Content, base: Content | None) -> float | None:
    """What the base has there: of task types only exact match is known."""
    if base is None:
        return None
    name = str(line["name"])
    estimates = {**base["metrics"]}
    estimates |= {f"flag {flag}": estimate for flag, estimate in base["flags"].items()}
    if line["group"]:
        estimates = {"exact_match": base["task_types"].get(line["group"], {})}
    value: float | None = estimates.get(name, {}).get("value")
    return value


def _review(content: Content) -> list[ReviewLine]:
    return review_lines(content["review"]) if "review" in content else []


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


def _by_group(
    metrics: Mapping[str, Content], base: Content | None
) -> dict[str, dict[str, Content]]:
    """The metrics by the heading that they stand under, without those that no answer has."""
    groups: dict[str, dict[str, Content]] = {}
    for name, metric in metrics.items():
        if not metric["n"] and not (base and base["metrics"][name]["n"]):
            continue
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
