"""Generate, score, compare, write, print: the evaluation as the command and the training callback use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.generation import Generation, generate
from sft_recipes.evaluation.metrics import (
    BINARY_METRICS,
    Leaks,
    check_expected_format,
    score_row,
    summarise,
    summarise_flags,
)
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_report import METRIC_TEXTS, order_rows, render_evaluation_report
from sft_recipes.report.page import format_difference, format_estimate, visible
from sft_recipes.statistics import Estimate, PairedDifference, paired_difference, proportion_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set. `rows` are the scored samples in data order, the rest is computed from them.

    `task_types`: exact match by the data's `task_type` column, empty without it. `flags`: share of rows with each flag.
    """

    metrics: Mapping[str, Estimate]
    flags: Mapping[str, Estimate]
    stop_reasons: Mapping[str, int]
    task_types: Mapping[str, Estimate]
    rows: Sequence[Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Everything but the rows, as plain data."""
        return {
            "metrics": {name: estimate.as_json() for name, estimate in self.metrics.items()},
            "flags": {name: estimate.as_json() for name, estimate in self.flags.items()},
            "stop_reasons": dict(self.stop_reasons),
            "task_types": {name: estimate.as_json() for name, estimate in self.task_types.items()},
        }


def evaluate(
    model: Any,
    renderer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    template_segments: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Answer the last turn of each example greedily and score it; the same result on every process.

    `renderer` is the `ChatRenderer` of training. `template_segments` is the template's own literal text, for the
    `template_leak` flag. Raises InputError for rows without a prompt, unknown `expected_format`s and prompts too long.
    """
    _check_examples(examples)
    prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples]
    generations = generate(
        model,
        renderer.tokenizer,
        prompts,
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        names=[example.where for example in examples],
        progress=progress,
    )
    references = [example.messages[-1].get("content") for example in examples]
    reference_tokens = _count_tokens(renderer.tokenizer, [reference or "" for reference in references])
    response_tokens = _count_tokens(renderer.tokenizer, [generation.text for generation in generations])
    leaks = Leaks(control_tokens(renderer.tokenizer), template_segments)
    rows = []
    for index, (example, generation) in enumerate(zip(examples, generations, strict=True)):
        scores = score_row(
            instruction=_instruction(example),
            reference=references[index],
            response=generation.text,
            stop_reason=generation.stop_reason,
            expected_format=example.columns.get("expected_format"),
            leaks=leaks,
            response_tokens=response_tokens[index],
            reference_tokens=reference_tokens[index],
        )
        # One token of the budget goes to the terminator.
        beyond_budget = reference_tokens[index] >= max_new_tokens
        rows.append(_sample(example, renderer, generation) | scores | {"reference_beyond_budget": beyond_budget})
    return evaluation_from_rows(rows)


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The evaluation of scored rows, fresh or read from `samples.jsonl`."""
    metrics = summarise(rows)
    metrics["reference_beyond_budget"] = proportion_of([row["reference_beyond_budget"] for row in rows])
    stop_reasons: dict[str, int] = {}
    by_task: dict[str, list[bool | None]] = {}
    for row in rows:
        stop_reasons[row["stop_reason"]] = stop_reasons.get(row["stop_reason"], 0) + 1
        if row["task_type"] is not None:
            by_task.setdefault(str(row["task_type"]), []).append(row["exact_match"])
    task_types = {name: proportion_of(values, higher_is_better=True) for name, values in sorted(by_task.items())}
    return Evaluation(metrics, summarise_flags(rows), stop_reasons, task_types, list(rows))


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote, for a comparison with an earlier run."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise InputError(Problem(str(folder), "", "there is no samples.jsonl", "name a folder below `evaluations/`"))
    return evaluation_from_rows([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line])


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, PairedDifference]:
    """Paired differences tuned - base of the metrics that are 0 or 1 in each row.

    Raises InputError unless both answered the same conversations, of the same task types, in the same order.
    """
    asked = [[(row["messages"], row["task_type"]) for row in evaluation.rows] for evaluation in (base, tuned)]
    if asked[0] != asked[1]:
        what = f"the base answered other rows ({len(asked[0])}) than the tuned model ({len(asked[1])})"
        raise InputError(Problem("evaluation", "base", what, "evaluate both on the same data"))
    return {
        name: paired_difference(
            [row[key] for row in base.rows], [row[key] for row in tuned.rows], higher_is_better=True
        )
        for name, key in BINARY_METRICS.items()
    }


def write_evaluation(
    evaluation: Evaluation, folder: Path, *, info: Mapping[str, Any], base: Evaluation | None = None
) -> None:
    """Write `metrics.json`, `samples.jsonl` and `report.html`; with `base`, its paired differences too.

    `info` is plain data on where the numbers come from: model, data, template hash, decoding, versions. The base's own
    files are written by a call of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "info": dict(info), "n": len(evaluation.rows)}
    content |= evaluation.as_json()
    if base is not None:
        content["differences"] = {name: value.as_json() for name, value in compare(base, evaluation).items()}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in evaluation.rows]
    page = render_evaluation_report(
        content, evaluation.rows, base.as_json() if base else None, base.rows if base else None
    )
    for name, body in (("metrics.json", text), ("samples.jsonl", "\n".join(lines)), ("report.html", page)):
        # JSON can carry half a surrogate pair that UTF-8 cannot; escaped it stays the same JSON.
        (folder / name).write_text(body + "\n", encoding="utf-8", errors="backslashreplace")


def print_table(console: Console, tuned: Evaluation, base: Evaluation | None = None, *, examples: int = 3) -> None:
    """Print the metrics, exact match by task type, and `examples` answers, those that became wrong first."""
    differences = compare(base, tuned) if base is not None else {}
    table = Table(title=f"{len(tuned.rows)} prompts, 95 % intervals", title_justify="left")
    for header in ("metric", *(["base"] if base else []), "tuned", *(["tuned - base"] if base else [])):
        table.add_column(header, justify="left" if header == "metric" else "right")
    for name, estimate in tuned.metrics.items():
        cells = [METRIC_TEXTS[name].label, format_estimate(estimate.as_json())]
        if base is not None:
            cells.insert(1, format_estimate(base.metrics[name].as_json()))
            cells.append(format_difference(differences[name].as_json()) if name in differences else "")
        table.add_row(*cells)
    console.print(table)
    if tuned.task_types:
        _print_task_types(console, tuned, base)
    for row, base_row in order_rows(tuned.rows, base.rows if base else None)[:examples]:
        _print_example(console, row, base_row)


def _print_task_types(console: Console, tuned: Evaluation, base: Evaluation | None) -> None:
    table = Table(title="exact match by task type", title_justify="left")
    table.add_column("task type")
    for header in ("n", *(["base"] if base else []), "tuned"):
        table.add_column(header, justify="right")
    for name, estimate in tuned.task_types.items():
        before = [format_estimate(base.task_types[name].as_json())] if base else []
        table.add_row(Text(visible(name)), str(estimate.n), *before, format_estimate(estimate.as_json()))
    console.print(table)


def _print_example(console: Console, row: Mapping[str, Any], base_row: Mapping[str, Any] | None) -> None:
    console.rule(Text(visible(f"{row['source']} row {row['row']}")), align="left")
    parts = [("prompt", row["prompt"]), ("reference", row["reference"] or "")]
    parts += [("base", base_row["response"])] if base_row else []
    for label, text in [*parts, ("tuned", row["response"])]:
        console.print(Text(f"{label}: ", style="bold") + Text(visible(text), style="not bold"))


def control_tokens(tokenizer: Any) -> list[str]:
    """Text of every added token that is special or looks like markup (`<think>`, `[INST]`); not added plain words."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or re.fullmatch(r"[^\w\s].*[^\w\s]", token.content)}
    return sorted(token for token in tokens | set(tokenizer.all_special_tokens) if token.strip())


def _check_examples(examples: Sequence[Example]) -> None:
    problems = []
    for example in examples:
        if len(example.messages) < 2:
            what = "there is no prompt and answer to compare (raw text cannot be evaluated)"
            problems.append(Problem(example.where, "messages", what, "use data with a user turn and an assistant turn"))
        check_expected_format(example.columns.get("expected_format"), example.where)
    if problems:
        raise InputError(problems)


def _instruction(example: Example) -> str:
    """The last user message as its author wrote it, without the `input` that a format joined to it."""
    user = next((message for message in reversed(example.messages) if message["role"] == "user"), {})
    return str(user.get("instruction") or user.get("content") or "")


def _count_tokens(tokenizer: Any, texts: list[str]) -> list[int]:
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _sample(example: Example, renderer: Any, generation: Generation) -> dict[str, Any]:
    return {
        "row": example.row,
        "source": example.source,
        "task_type": example.columns.get("task_type"),
        "prompt": renderer.render(example.messages[:-1], example.tools, add_generation_prompt=True),
        "messages": [dict(message) for message in example.messages],
        "reference": example.messages[-1].get("content"),
        "response": generation.text,
        "stop_reason": generation.stop_reason,
        "n_tokens": len(generation.ids),
    }
