"""What `evaluate` prints: tables of fixed width, all from the content of `metrics.json`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.messages import visible
from sft_recipes.report.evaluation_parts import (
    RowPair,
    differing_keys,
    line_name,
    refusals_by_format,
    too_few_prompts,
)
from sft_recipes.report.number_texts import decimals, format_estimate, p_value, short, where

Content = Mapping[str, Any]
# Of a compared system's name, from its end.
NAME_CHARACTERS = 28
# Of the training rows with the highest loss; all stand in `suspects.jsonl`.
SUSPECTS = 10
SUSPECT_CHARACTERS = 60
# Of the retention prompts that were lost; all stand in the report.
LOST_PROMPTS = 5


def warnings_text(warnings: Sequence[str]) -> str:
    """What makes the figures worth less than they look, above them; nothing without any."""
    if not warnings:
        return ""
    return visible(_joined([f"WARNING: {warning}" for warning in warnings] + [""]))


def evaluation_text(
    content: Content,
    base: Content | None,
    sources: Mapping[str, int],
    pairs: Sequence[RowPair],
) -> str:
    """Which rows were answered, the metrics, exact match by task type, and some answers."""
    lines = [_answered(content, sources), _metrics_header(base)]
    differences = content.get("differences", {})
    for name, estimate in content["metrics"].items():
        of_base = base and base["metrics"][name]
        lines.append(_metric_line(estimate["label"], estimate, of_base, differences.get(name)))
    for name, estimate in content["task_types"].items():
        of_base = base and base["task_types"][name]
        lines.append(_metric_line(f"Exact match: {name}", estimate, of_base, None))
    for pair in pairs:
        lines += ["", *_answers(pair)]
    return visible(_joined(lines))


def _answered(content: Content, sources: Mapping[str, int]) -> str:
    if not content["rows"]:
        return "no rows answered"
    counts = ", ".join(f"{count} of {source}" for source, count in sources.items())
    text = f"{content['rows']} rows answered: {counts}"
    if content["n"] < content["rows"]:
        text += f"; {content['n']} different prompts, each of which counts once"
    return text


def _metrics_header(base: Content | None) -> str:
    head = f"{'95 % intervals':44} {'n':>6} "
    if base is None:
        return head + f"{'value':>20}"
    return head + f"{'base':>20} {'tuned':>20} {'tuned - base':>22}"


def _metric_line(label: str, tuned: Content, base: Content | None, difference: Any) -> str:
    line = f"{visible(label):44} {tuned['n']:>6} "
    if base is not None:
        line += f"{format_estimate(base):>20} "
    line += f"{format_estimate(tuned):>20}"
    if difference is not None:
        line += f" {format_estimate(difference, '+'):>22}"
    return line


def _answers(pair: RowPair) -> list[str]:
    lines = [
        f"---- {where(pair.row)}",
        f"prompt: {pair.row['prompt']}",
        f"reference: {pair.row['reference'] or ''}",
    ]
    if pair.base is not None:
        lines.append(f"base: {pair.base['response']}")
    lines.append(f"tuned: {pair.row['response']}")
    return lines


def gate_text(gate: Content) -> str:
    """The verdict and a line for each bound."""
    doubts = ""
    if gate["smoke"]:
        doubts += " (smoke, not a gate: too few prompts)"
    if gate.get("trained_rows"):
        doubts += f" (with {gate['trained_rows']} rows that were trained on)"
    lines = [
        "",
        f"gate: {gate['verdict'].upper()}{doubts}",
        f"{'one-sided 95 % bounds':44} {'value':>8} {'bound':>8} {'limit':>16} {'n':>12}  verdict",
    ]
    for line in gate["lines"]:
        side = line["side"].replace("_", " ")
        limit = f"{side} {line['limit']:g}"
        rows = f"{line['n']} of {line['n_min']}"
        lines.append(
            f"{visible(line_name(line)):44} {decimals(line['value']):>8} "
            f"{decimals(line['bound']):>8} {limit:>16} {rows:>12}  {line['verdict']}"
        )
    return _joined(lines)


def format_overfitting_text(formats: Content) -> str:
    """The indicators of the tuned model."""
    title = f"format overfitting, {formats['n']} prompts"
    lines = ["", f"{title:44} tuned, 95 % intervals"]
    for name, estimate in formats["indicators"].items():
        lines.append(f"{name:44} {format_estimate(estimate)}")
    return _joined(lines)


def comparisons_text(systems: Sequence[Content]) -> str:
    """The paired differences to each system, and what else differs; nothing for the base alone."""
    if not systems or [system["name"] for system in systems] == ["base"]:
        return ""
    names = [visible(system["name"][-NAME_CHARACTERS:]) for system in systems]
    lines = ["", _columns("tuned less each of these, paired, 95 %", names)]
    for name in systems[0]["differences"]:
        cells = []
        for system in systems:
            difference = system["differences"].get(name)
            cells.append(format_estimate(difference, "+") if difference else "")
        lines.append(_columns(name, cells))
    rows_trained = [system["rows_trained"] or "" for system in systems]
    if any(rows_trained):
        lines.append(_columns("rows trained", rows_trained))
    for key in differing_keys(systems):
        lines.append(
            f"{visible(key.system)}: {key.part} {visible(key.key)} "
            f"{visible(short(key.there))}, here {visible(short(key.here))}"
        )
    return _joined(lines)


def _columns(label: str, cells: Sequence[object]) -> str:
    return f"{label:44}" + "".join(f" {cell:>28}" for cell in cells)


_VERDICTS = {
    "better": "tuning beat a prompt",
    "worse": "a prompt beat tuning",
    "undecided": "whether tuning beat a prompt is not decided",
}


def prompting_sentences(prompting: Content) -> list[str]:
    """Whether tuning beat the best way of asking the base, and how many shots that way has."""
    ways = prompting["ways"]
    if "verdict" not in prompting:
        return ["whether tuning beat a prompt is not decided: no answer can be called right"]
    sentence = (
        f"{_VERDICTS[prompting['verdict']]}: {prompting['label']} "
        f"{format_estimate(prompting['difference'], '+')} against {prompting['best']}"
    )
    if len(ways) > 1:
        sentence += f", the best of {len(ways)} ways to ask it"
    if "shots" not in prompting:
        return [sentence + " (asked without examples: add --shots auto)"]
    return [sentence, *_shots_tried(prompting["shots"])]


def _shots_tried(shots: Content) -> list[str]:
    if not shots["tried"]:
        return []
    scores = []
    for tried in shots["tried"]:
        taken = " (taken)" if tried["shots"] == shots["shots"] else ""
        scores.append(f"{tried['shots']}: {tried['exact_match']:.2f}{taken}")
    return [f"shots, by exact match on {shots['rows']} training rows: {', '.join(scores)}"]


def prompting_text(prompting: Content) -> str:
    """The same for the terminal."""
    return visible(_joined(["", *prompting_sentences(prompting)]))


def task_differences_text(tasks: Mapping[str, Content]) -> str:
    """Exact match by task type against the base, and how often training had the type.

    Nothing if neither is known.
    """
    is_known = any("n" in task or task["training_rows"] is not None for task in tasks.values())
    if not is_known:
        return ""
    lines = [
        "",
        f"{'exact match by task type':30} {'in data':>8} {'n':>6} {'tuned - base':>22} "
        f"{'lost/gained':>12} {'McNemar p':>9} {'by Holm':>9}",
    ]
    for name, task in tasks.items():
        rows = task["training_rows"]
        trained = "not known" if rows is None else rows or "none"
        line = f"{visible(name):30} {trained:>8}"
        if "n" in task:
            moved = f"{task['lost']}/{task['gained']}"
            line += (
                f" {task['n']:>6} {format_estimate(task, '+'):>22} {moved:>12} "
                f"{p_value(task['p_value'], 'none'):>9} {p_value(task['p_holm'], 'none'):>9}"
            )
        lines.append(line)
    return _joined(lines)


def safety_text(safety: Content) -> str:
    """What was refused, by format and model, and what that is worth."""
    lines = [
        "",
        f"{'refused by the rule, 95 % intervals':44} {'model':>6} "
        f"{'of safe prompts':>20} {'of unsafe prompts':>20}",
    ]
    refusals = refusals_by_format(safety)
    for own in refusals:
        lines.append(
            f"{own.format:44} {own.model:>6} "
            f"{format_estimate(own.safe):>20} {format_estimate(own.unsafe):>20}"
        )
    few = ""
    if too_few_prompts(safety):
        few = f": too few to decide anything ({safety['n_min']} of a kind), report only"
    rule = safety["rule"]
    lines += [
        f"{refusals[0].safe['n']} safe and {refusals[0].unsafe['n']} unsafe prompts{few}",
        f"the rule itself, on {rule['n']} labelled answers: precision {rule['precision']:.2f}, "
        f"recall {rule['recall']:.2f}; all else counts as answered, nonsense too",
    ]
    return _joined(lines)


def retention_text(retention: Content) -> str:
    """What both models pass, by kind, and the first of the prompts that were lost."""
    title = f"general prompts passed, {retention['base']['n']}, 95 % intervals"
    lines = [
        "",
        f"{title:44} {'n':>6} {'before tuning':>20} {'tuned':>20} {'tuned - before':>22} "
        f"{'lost/gained':>12}",
    ]
    for name, kind in {"all": retention, **retention["kinds"]}.items():
        difference = kind["difference"]
        moved = f"{difference['lost']}/{difference['gained']}"
        lines.append(_metric_line(name, kind["tuned"], kind["base"], difference) + f" {moved:>12}")
    kept = format_estimate(retention["kept"])
    lines.append(f"of what {visible(retention['before'])} passed, {kept} is still passed")
    for row in retention["lost"][:LOST_PROMPTS]:
        answer = visible(_short_text(row["tuned"]))
        lines.append(f"  lost: {visible(_short_text(row['prompt']))} -> {answer or '(nothing)'}")
    return _joined(lines)


def suspects_text(suspects: Content) -> str:
    """The training rows with the highest loss, the first ten of them."""
    lines = [
        "",
        f"training rows that the model finds hardest: {suspects['listed']} of {suspects['rows']}; "
        f"the median row has loss {suspects['median']:.3f}. Wrong answers end up here: read them",
    ]
    for row in suspects["shown"][:SUSPECTS]:
        lines.append(
            f"  {row['loss']:6.3f}  {row['where']}: {_short_text(row['prompt'])} -> "
            f"{_short_text(row['answer'])}"
        )
    return visible(_joined(lines))


def _short_text(text: str) -> str:
    """The end of a prompt or answer on one line; it is the part that differs between rows."""
    line = " ".join(text.split())
    return line if len(line) <= SUSPECT_CHARACTERS else f"...{line[-SUSPECT_CHARACTERS:]}"


def next_steps(model_or_run: str, base: str | None, folder: Path) -> str:
    """Where the rest is, and what to do next; `base` is one that can be talked to."""
    beside = f" --base {base}" if base else ""
    lines = [
        "",
        f"report: {folder}/report.html",
        f"answers: {folder}/samples.jsonl",
        f"next: sft-recipes chat {model_or_run}{beside}",
    ]
    return _joined(lines)


# What else an evaluation may hold, in the order of `metrics.json`; curves are for the report.
PARTS: Mapping[str, Callable[[Any], str]] = {
    "comparisons": comparisons_text,
    "prompting": prompting_text,
    "task_differences": task_differences_text,
    "suspects": suspects_text,
    "format_overfitting": format_overfitting_text,
    "safety": safety_text,
    "retention": retention_text,
    "gate": gate_text,
}


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
