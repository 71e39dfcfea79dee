"""Generate, score, compare, write, print: the evaluation as the command and the training callback use it."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import metrics
from sft_recipes.evaluation.generation import generate
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_report import METRIC_TEXTS, order_rows, render_evaluation_report
from sft_recipes.report.page import macros
from sft_recipes.run_folder import SCHEMA_VERSION
from sft_recipes.statistics import Estimate, PairedDifference, paired_difference, proportion_of


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

    def as_json(self, base: Self | None = None) -> dict[str, Any]:
        """Everything but the rows, as plain data; with `base`, the paired differences too."""
        content = {"n": len(self.rows), **asdict(replace(self, rows=()))}
        del content["rows"]
        if base is not None:
            content["differences"] = {name: one.as_json() for name, one in compare(base, self).items()}
        return content


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
    generations = generate(
        model,
        renderer.tokenizer,
        [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples],
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        names=[example.where for example in examples],
        progress=progress,
    )
    rows, controls = [], control_tokens(renderer.tokenizer)

    def count(text: str) -> int:
        return len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    for example, generation in zip(examples, generations, strict=True):
        reference = example.messages[-1].get("content")
        asked = {
            "row": example.row,
            "source": example.source,
            "task_type": example.columns.get("task_type"),
            "prompt": renderer.render(example.messages[:-1], example.tools, add_generation_prompt=True),
            "messages": [dict(message) for message in example.messages],
            "n_tokens": len(generation.ids),
        }
        answer = metrics.Answer(
            _instruction(example),
            reference,
            generation.text,
            generation.stop_reason,
            example.columns.get("expected_format"),
            controls,
            template_segments,
            response_tokens=count(generation.text),
            reference_tokens=count(reference or ""),
            max_new_tokens=max_new_tokens,
        )
        rows.append(asked | metrics.score_row(answer))
    return evaluation_from_rows(rows)


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The evaluation of scored rows, fresh or read from `samples.jsonl`."""
    by_task: dict[str, list[bool | None]] = {}
    for row in rows:
        if row["task_type"] is not None:
            by_task.setdefault(str(row["task_type"]), []).append(row["exact_match"])
    task_types = {name: proportion_of(values, higher_is_better=True) for name, values in sorted(by_task.items())}
    stop_reasons = dict(Counter(row["stop_reason"] for row in rows))
    return Evaluation(metrics.summarise(rows), metrics.summarise_flags(rows), stop_reasons, task_types, list(rows))


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote, for a comparison with an earlier run."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise InputError(Problem(str(folder), "", "there is no samples.jsonl", "name a folder below `evaluations/`"))
    return evaluation_from_rows([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line])


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, PairedDifference]:
    """Paired differences tuned - base of the metrics that are 0 or 1 in each row. Raises as `check_same_rows`."""
    check_same_rows(base, tuned)
    return {
        name: paired_difference(
            [row[key] for row in base.rows], [row[key] for row in tuned.rows], higher_is_better=True
        )
        for name, key in metrics.BINARY_METRICS.items()
    }


def check_same_rows(base: Evaluation, tuned: Evaluation) -> None:
    """Raise InputError unless both answered the same conversations, of the same task types, in the same order."""
    asked = [[(row["messages"], row["task_type"]) for row in evaluation.rows] for evaluation in (base, tuned)]
    if asked[0] != asked[1]:
        what = f"the base answered other rows ({len(asked[0])}) than the tuned model ({len(asked[1])})"
        raise InputError(Problem("evaluation", "base", what, "evaluate both on the same data"))


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    info: Mapping[str, Any],
    base: Evaluation | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `metrics.json`, `samples.jsonl` and `report.html`; with `base`, its paired differences too.

    `info` is plain data on where the numbers come from: model, data, template hash, decoding, versions; `extra` what
    else was found: `gate`, `format_overfitting`. The base's own files are written by a call of their own.
    """
    content = {"schema_version": SCHEMA_VERSION, "info": info, **evaluation.as_json(base), **(extra or {})}
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    base_parts = (base.as_json(), base.rows) if base else (None, None)
    files = {
        "metrics.json": dump(content, indent=2),
        "samples.jsonl": "\n".join(map(dump, evaluation.rows)),
        "report.html": render_evaluation_report(content, evaluation.rows, *base_parts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # JSON can carry half a surrogate pair that UTF-8 cannot; escaped it stays the same JSON.
        (folder / name).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def as_text(tuned: Evaluation, base: Evaluation | None = None, *, examples: int = 3) -> str:
    """For the terminal: which rows were answered, the metrics, exact match by task type, and `examples` answers.

    Answers that became wrong come first.
    """
    pairs = order_rows(tuned.rows, base.rows if base else None)[:examples]
    sources = Counter(row["source"] for row in tuned.rows)
    parts = (tuned.as_json(base), base.as_json() if base else None)
    return str(macros("verdicts.txt").evaluation(*parts, METRIC_TEXTS, sources, pairs))


def control_tokens(tokenizer: Any) -> list[str]:
    """Text of every added token that is special or looks like markup (`<think>`, `[INST]`); not added plain words."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or re.fullmatch(r"[^\w\s].*[^\w\s]", token.content)}
    return sorted(token for token in tokens | set(tokenizer.all_special_tokens) if token.strip())


def _check_examples(examples: Sequence[Example]) -> None:
    if without_prompt := [example for example in examples if len(example.messages) < 2]:
        what = "there is no prompt and answer to compare (raw text cannot be evaluated)"
        fix = "use data with a user turn and an assistant turn"
        raise InputError([Problem(example.where, "messages", what, fix) for example in without_prompt])
    for example in examples:
        metrics.check_expected_format(example.columns.get("expected_format"), example.where)


def _instruction(example: Example) -> str:
    """The last user message as its author wrote it, without the `input` that a format joined to it."""
    user = next((message for message in reversed(example.messages) if message["role"] == "user"), {})
    return str(user.get("instruction") or user.get("content") or "")
