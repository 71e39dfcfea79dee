"""Generate, score, compare, write, print: the evaluation as the command and the training callback use it."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation import metrics
from sft_recipes.evaluation.constraints import check_expected_format
from sft_recipes.evaluation.generation import generate
from sft_recipes.evaluation.tool_calls import answer_text, calls_match
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_report import METRIC_TEXTS, order_rows, render_evaluation_report
from sft_recipes.report.page import macros
from sft_recipes.run_folder import SCHEMA_VERSION
from sft_recipes.statistics import Estimate, PairedDifference, paired_difference, proportion_of

THINK_END = "</think>"


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
            content["differences"] = {
                name: one.as_json() for name, one in compare(base, self).items()
            }
        return content


def evaluate(
    model: Any,
    renderer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    template_segments: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Answer the last turn of each example greedily and score it; the same result on every process.

    `renderer` is the `ChatRenderer` of training. An answer is what follows the model's reasoning, which the row holds
    apart as `reasoning`. `template_segments` is the template's own literal text, for the `template_leak` flag. Raises
    InputError for rows without a prompt, unknown `expected_format`s and prompts too long.
    """
    references = _references(renderer, examples)
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

    for example, reference, generation in zip(examples, references, generations, strict=True):
        # A reference that holds reasoning itself is compared with all of the text.
        is_apart = THINK_END in controls and THINK_END not in (reference or "")
        reasoning, response = (
            _reasoning_apart(generation.text) if is_apart else (None, generation.text)
        )
        asked = {
            "row": example.row,
            "source": example.source,
            "task_type": example.columns.get("task_type"),
            "prompt": renderer.render(
                example.messages[:-1], example.tools, add_generation_prompt=True
            ),
            "messages": [dict(message) for message in example.messages],
            "n_tokens": len(generation.ids),
            "reasoning": reasoning,
        }
        answer = metrics.Answer(
            _instruction(example),
            reference,
            response,
            generation.stop_reason,
            example.columns.get("expected_format"),
            controls,
            template_segments,
            response_tokens=count(response),
            reference_tokens=count(reference or ""),
            max_new_tokens=max_new_tokens,
            calls_match=calls_match(renderer, example, generation.text, controls),
        )
        rows.append(asked | metrics.score_row(answer))
    return evaluation_from_rows(rows)


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The evaluation of scored rows, fresh or read from `samples.jsonl`."""
    exact = by_task_type(rows, [row["exact_match"] for row in rows])
    task_types = {
        name: proportion_of(values, higher_is_better=True) for name, values in exact.items()
    }
    stop_reasons = dict(Counter(row["stop_reason"] for row in rows))
    return Evaluation(
        metrics.summarise(rows), metrics.summarise_flags(rows), stop_reasons, task_types, list(rows)
    )


def by_task_type(rows: Sequence[Mapping[str, Any]], values: Iterable[Any]) -> dict[str, list[Any]]:
    """The rows' values by task type in alphabetical order, without those of rows that have none."""
    groups: dict[str, list[Any]] = {}
    for row, value in zip(rows, values, strict=True):
        if row["task_type"] is not None:
            groups.setdefault(str(row["task_type"]), []).append(value)
    return dict(sorted(groups.items()))


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote, for a comparison with an earlier run."""
    return evaluation_from_rows(metrics.read_samples(folder))


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, PairedDifference]:
    """Paired differences tuned - base of the scores between 0 and 1 that any row has. Raises as `check_same_rows`."""
    check_same_rows(base, tuned)
    before, after = (list(map(metrics.metric_values, one.rows)) for one in (base, tuned))
    found = {}
    for name in metrics.PAIRED_METRICS:
        pair, unit = (
            [[row.get(name) for row in rows] for rows in (before, after)],
            METRIC_TEXTS[name].unit,
        )
        found[name] = paired_difference(*pair, unit=unit, higher_is_better=True)
    return {name: difference for name, difference in found.items() if difference.n}


def check_same_rows(base: Evaluation, tuned: Evaluation) -> None:
    """Raise InputError unless both answered the same conversations, of the same task types, in the same order."""
    asked = [
        [(row["messages"], row["task_type"]) for row in evaluation.rows]
        for evaluation in (base, tuned)
    ]
    if asked[0] != asked[1]:
        what = (
            f"the base answered other rows ({len(asked[0])}) than the tuned model ({len(asked[1])})"
        )
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
    content = {
        "schema_version": SCHEMA_VERSION,
        "info": info,
        **evaluation.as_json(base),
        **(extra or {}),
    }
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
    tokens = {
        token.content
        for token in added
        if token.special or re.fullmatch(r"[^\w\s].*[^\w\s]", token.content)
    }
    return sorted(token for token in tokens | set(tokenizer.all_special_tokens) if token.strip())


def _references(renderer: Any, examples: Sequence[Example]) -> list[str | None]:
    """The answers to compare with, calls as the template writes them. Raises InputError listing all that is wrong."""
    found, problems = [], list[Problem]()
    for example in examples:
        try:
            if len(example.messages) < 2:
                what = "there is no prompt and answer to compare (raw text cannot be evaluated)"
                fix = "use data with a user turn and an assistant turn"
                raise InputError(Problem(example.where, "messages", what, fix))
            check_expected_format(example.columns.get("expected_format"), example.where)
            last = {
                key: value
                for key, value in example.messages[-1].items()
                if key != "reasoning_content"
            }
            found.append(
                answer_text(renderer, example, last)
                if last.get("tool_calls")
                else last.get("content")
            )
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def _reasoning_apart(text: str) -> tuple[str | None, str]:
    """The reasoning before an answer, None without any, and the answer."""
    *reasoning, answer = text.rsplit(THINK_END, 1)
    return (reasoning[0], answer.lstrip("\n")) if reasoning else (None, answer)


def _instruction(example: Example) -> str:
    """The last user message as its author wrote it, without the `input` that a format joined to it."""
    user = next(
        (message for message in reversed(example.messages) if message["role"] == "user"), {}
    )
    return str(user.get("instruction") or user.get("content") or "")
