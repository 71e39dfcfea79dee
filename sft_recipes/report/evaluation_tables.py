"""The tables that `evaluate --all` prints, from the parts of `metrics.json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_recipes.messages import visible
from sft_recipes.report import plain_words
from sft_recipes.report.evaluation_parts import (
    Row,
    differing_keys,
    metric_names,
    refusals_by_format,
    too_few_prompts,
)
from sft_recipes.report.evaluation_text import rows_text
from sft_recipes.report.number_texts import decimals, format_estimate, p_value, short, spaced
from sft_recipes.report.text_tables import paragraph, text_table

Content = Mapping[str, Any]

# Of a compared system's name, from its end.
NAME_CHARACTERS = 60
# Of the training rows with the highest loss; all stand in `suspects.jsonl`.
SUSPECTS = 10
SUSPECT_CHARACTERS = 60
# Of the retention prompts that were lost; all stand in the report.
LOST_PROMPTS = 5


def metrics_text(content: Content, base: Content | None, samples: Sequence[Row]) -> str:
    """Which rows were answered, every metric that has a value, exact match by task type."""
    header = ["95 % intervals", "n", "tuned"]
    if base is not None:
        header = ["95 % intervals", "n", "base", "tuned", "tuned - base"]
    differences = content.get("differences", {})
    rows = []
    explained = ""
    for name, estimate in content["metrics"].items():
        of_base = base and base["metrics"][name]
        if not estimate["n"] and not (of_base and of_base["n"]):
            continue
        rows.append(_metric_row(estimate["label"], estimate, of_base, differences.get(name)))
        if not estimate["headline"]:
            explained += paragraph(f"  {estimate['label']}: {estimate['definition']}")
    text = rows_text(content, samples) + text_table(header, rows) + explained
    columns = header[1:4]
    for part, title in (("task_types", "task type"), ("data_sets", "data set")):
        rows = []
        for name, estimate in content.get(part, {}).items():
            of_base = base and base[part][name]
            rows.append(_metric_row(name, estimate, of_base, None))
        if rows:
            text += "\n" + text_table([f"exact match by {title}", *columns], rows)
    return text + _data_set_losses_text(content)


def _data_set_losses_text(content: Content) -> str:
    rows = []
    for name, estimate in content.get("data_set_losses", {}).items():
        rows.append(_metric_row(name, estimate, None, None))
    if not rows:
        return ""
    return "\n" + text_table(["loss of held-out rows by data set", "n", "tuned"], rows)


def _metric_row(label: str, tuned: Content, base: Content | None, difference: Any) -> list[str]:
    cells = [label, str(tuned["n"])]
    if base is not None:
        cells.append(format_estimate(base))
    cells.append(format_estimate(tuned))
    if difference is not None:
        cells.append(format_estimate(difference, "+"))
    return cells


def gate_text(content: Content) -> str:
    """The verdict and a line for each bound."""
    gate = content["gate"]
    doubts = ""
    if gate["smoke"]:
        doubts += " (smoke, not a gate: too few prompts)"
    if gate.get("trained_rows"):
        doubts += f" (with {gate['trained_rows']} rows that were trained on or nearly)"
    names = metric_names(content)
    rows = []
    for line in gate["lines"]:
        cells = [
            plain_words.bound_name(line, names),
            decimals(line["value"]),
            decimals(line["bound"]),
            f"{spaced(line['side'])} {line['limit']:g}",
            f"{line['n']} of {line['n_min']}",
            plain_words.gate_verdict(line["verdict"]),
        ]
        rows.append(cells)
    header = ["one-sided 95 % bounds", "value", "bound", "limit", "n", "verdict"]
    verdict = plain_words.gate_verdict(gate["verdict"]).upper()
    return f"\ngate: {verdict}{doubts}\n" + text_table(header, rows)


def format_overfitting_text(content: Content) -> str:
    """The indicators of the tuned model."""
    formats = content["format_overfitting"]
    rows = []
    for name, estimate in formats["indicators"].items():
        rows.append([plain_words.named(name), format_estimate(estimate)])
    title = f"format overfitting, {formats['n']} prompts, 95 % intervals"
    return "\n" + text_table([title, "tuned"], rows)


def comparisons_text(content: Content) -> str:
    """The paired differences to each system, and what else differs; nothing for the base alone."""
    systems = content["comparisons"]
    if not systems or [system["name"] for system in systems] == ["base"]:
        return ""
    rows = []
    for metric, label in metric_names(content).items():
        own = [system for system in systems if metric in system["differences"]]
        if own:
            rows.append([label, ""])
        for system in own:
            difference = format_estimate(system["differences"][metric], "+")
            rows.append([f"  {system['name'][-NAME_CHARACTERS:]}", difference])
    text = "\n" + text_table(["tuned less each of these, paired, 95 % intervals", ""], rows)
    for system in systems:
        if system["rows_trained"]:
            text += paragraph(f"{system['name']}: {system['rows_trained']:,} rows trained")
    for key in differing_keys(systems):
        text += paragraph(
            f"{key.system}: {key.part} {key.key} {short(key.there)}, here {short(key.here)}"
        )
    return text


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


def prompting_text(content: Content) -> str:
    """The same for the terminal."""
    return "\n" + "".join(map(paragraph, prompting_sentences(content["prompting"])))


def task_differences_text(content: Content) -> str:
    """Exact match by task type against the base, and how often training had the type.

    Nothing if neither is known.
    """
    tasks = content["task_differences"]
    is_known = any("n" in task or task["training_rows"] is not None for task in tasks.values())
    if not is_known:
        return ""
    rows = []
    for name, task in tasks.items():
        trained = task["training_rows"]
        cells = [name, "not known" if trained is None else str(trained)]
        if "n" in task:
            cells += [
                str(task["n"]),
                format_estimate(task, "+"),
                f"{task['lost']}/{task['gained']}",
                p_value(task["p_value"]),
                p_value(task["p_holm"]),
            ]
        rows.append(cells)
    header = ["exact match by task type", "trained rows", "n", "tuned - base", "lost/gained"]
    return "\n" + text_table([*header, "McNemar p", "by Holm"], rows)


def safety_text(content: Content) -> str:
    """What was refused, by format and model, and what that is worth."""
    safety = content["safety"]
    refusals = refusals_by_format(safety)
    rows = []
    for own in refusals:
        cells = [
            plain_words.named(own.format),
            own.model,
            format_estimate(own.safe),
            format_estimate(own.unsafe),
        ]
        rows.append(cells)
    header = ["refused by the rule, 95 % intervals", "model", "of safe prompts"]
    few = ""
    if too_few_prompts(safety):
        few = f": too few to decide anything ({safety['n_min']} of a kind), report only"
    rule = safety["rule"]
    counts = f"{refusals[0].safe['n']} safe and {refusals[0].unsafe['n']} unsafe prompts{few}"
    worth = (
        f"the rule itself, on {rule['n']} labelled answers: precision {rule['precision']:.2f}, "
        f"recall {rule['recall']:.2f}; all else counts as answered, nonsense too"
    )
    table = text_table([*header, "of unsafe prompts"], rows)
    return "\n" + table + paragraph(counts) + paragraph(worth)


def retention_text(content: Content) -> str:
    """What both models pass, by kind, and the first of the prompts that were lost."""
    retention = content["retention"]
    rows = []
    for name, kind in {"all": retention, **retention["kinds"]}.items():
        difference = kind["difference"]
        cells = _metric_row(spaced(name), kind["tuned"], kind["base"], difference)
        rows.append([*cells, f"{difference['lost']}/{difference['gained']}"])
    title = f"\ngeneral prompts passed, {retention['base']['n']}, 95 % intervals\n"
    header = ["kind", "n", "before tuning", "tuned", "tuned - before", "lost/gained"]
    kept = format_estimate(retention["kept"])
    text = title + text_table(header, rows)
    text += paragraph(f"of what {retention['before']} passed, {kept} is still passed")
    for row in retention["lost"][:LOST_PROMPTS]:
        answer = _short_text(row["tuned"]) or "(nothing)"
        text += f"  lost: {_short_text(row['prompt'])} -> {answer}\n"
    return text


def suspects_text(content: Content) -> str:
    """The training rows with the highest loss, the first ten of them."""
    suspects = content["suspects"]
    text = "\n" + paragraph(
        f"training rows that the model finds hardest: {suspects['listed']} of {suspects['rows']}; "
        f"the median row has loss {suspects['median']:.3f}. Wrong answers end up here: read them"
    )
    for row in suspects["shown"][:SUSPECTS]:
        text += paragraph(
            f"  {row['loss']:6.3f}  {visible(row['where'])}: {_short_text(row['prompt'])} -> "
            f"{_short_text(row['answer'])}"
        )
    return text


def _short_text(text: str) -> str:
    """The end of a prompt or answer on one line; it is the part that differs between rows."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= SUSPECT_CHARACTERS else f"...{line[-SUSPECT_CHARACTERS:]}"


# What else an evaluation may hold, in the order of `metrics.json`; curves are for the report.
PARTS: Mapping[str, Callable[[Content], str]] = {
    "comparisons": comparisons_text,
    "prompting": prompting_text,
    "task_differences": task_differences_text,
    "suspects": suspects_text,
    "format_overfitting": format_overfitting_text,
    "safety": safety_text,
    "retention": retention_text,
    "gate": gate_text,
}
# Of these the ones that are only there because somebody asked.
ASKED_FOR = ("suspects", "format_overfitting", "safety", "retention", "gate")
