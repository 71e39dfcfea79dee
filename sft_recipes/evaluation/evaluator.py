"""Generate, score, compare, write, print: what command and training callback share."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.constraints import check_expected_format
from sft_recipes.evaluation.generation import Generation, generate
from sft_recipes.evaluation.metrics import (
    HEADLINES,
    METRICS,
    score_row,
    summarise,
    summarise_flags,
)
from sft_recipes.evaluation.prompts import Row, count_prompts, prompts_of
from sft_recipes.evaluation.samples import SAMPLES, read_samples
from sft_recipes.evaluation.tool_calls import answer_text, calls_match
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_parts import order_rows
from sft_recipes.report.evaluation_report import render_evaluation_report
from sft_recipes.report.evaluation_text import evaluation_text
from sft_recipes.run_folder import SCHEMA_VERSION
from sft_recipes.statistics import Estimate, PairedDifference, paired_difference
from sft_recipes.text_files import interpreting

METRICS_FILE = "metrics.json"
REPORT = "report.html"
THINK_END = "</think>"
_MARKUP = re.compile(r"[^\w\s].*[^\w\s]")


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set.

    `rows` are the scored samples in data order, the rest is computed from them, with rows of an
    equal prompt as one (`prompts.py`). `task_types`: exact match by the data's `task_type` column,
    empty without it. `flags`: share of prompts with each flag.
    """

    metrics: Mapping[str, Estimate]
    flags: Mapping[str, Estimate]
    stop_reasons: Mapping[str, int]
    task_types: Mapping[str, Estimate]
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
    """Answer the last turn of each example greedily and score it; the same on every process.

    `renderer` is the `ChatRenderer` of training. An answer is what follows the model's reasoning,
    which the row holds apart as `reasoning`. `template_segments` is the template's own literal
    text, for the `template_leak` flag. Raises InputError for rows without a prompt, unknown
    `expected_format`s and prompts too long.
    """
    references = _references(renderer, examples)
    prompts = []
    names = []
    for example in examples:
        prompts.append(renderer.prompt_ids(example.messages[:-1], example.tools))
        names.append(example.where)
    generations = generate(
        model,
        renderer.tokenizer,
        prompts,
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        names=names,
        progress=progress,
    )
    scorer = _Scorer(
        renderer, control_tokens(renderer.tokenizer), template_segments, max_new_tokens
    )
    rows = list(map(scorer.row, examples, references, generations))
    return evaluation_from_rows(rows)


@dataclass(frozen=True)
class _Scorer:
    """What all answers of one evaluation are judged by."""

    renderer: Any
    control_tokens: Sequence[str]
    template_segments: Sequence[str]
    max_new_tokens: int

    def row(
        self, example: Example, reference: str | None, generation: Generation
    ) -> dict[str, Any]:
        """The row of `samples.jsonl`: where it stands, what was asked, answered, and its scores."""
        prompt = self.renderer.render(
            example.messages[:-1], example.tools, add_generation_prompt=True
        )
        said = self._split_reasoning(generation.text, reference)
        answer = Answer(
            instruction=_instruction(example),
            reference=reference,
            response=said.response,
            stop_reason=generation.stop_reason,
            expected_format=example.columns.get("expected_format"),
            control_tokens=self.control_tokens,
            template_segments=self.template_segments,
            response_tokens=self._count(said.response),
            reference_tokens=self._count(reference or ""),
            max_new_tokens=self.max_new_tokens,
            calls_match=calls_match(self.renderer, example, generation.text, self.control_tokens),
        )
        return {
            "row": example.row,
            "line": example.line,
            "source": example.source,
            "task_type": example.columns.get("task_type"),
            "prompt": prompt,
            "messages": list(map(dict, example.messages)),
            "n_tokens": len(generation.ids),
            "reasoning": said.reasoning,
            **score_row(answer),
        }

    def _count(self, text: str) -> int:
        return len(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _split_reasoning(self, text: str, reference: str | None) -> "_Said":
        # A reference that holds reasoning itself is compared with all of the text.
        if THINK_END not in self.control_tokens or THINK_END in (reference or ""):
            return _Said(None, text)
        reasoning, end, answer = text.rpartition(THINK_END)
        if not end:
            return _Said(None, text)
        return _Said(reasoning, answer.lstrip("\n"))


class _Said(NamedTuple):
    """What a model wrote: its reasoning, None without any, and its answer."""

    reasoning: str | None
    response: str


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The evaluation of scored rows, fresh or read from `samples.jsonl`."""
    exact_match = METRICS["exact_match"]
    task_types = {}
    for name, own_rows in rows_by_task_type(rows).items():
        task_types[name] = exact_match.estimate(exact_match.of_prompts(own_rows))
    return Evaluation(
        metrics=summarise(rows),
        flags=summarise_flags(rows),
        stop_reasons=dict(Counter(map(itemgetter("stop_reason"), rows))),
        task_types=task_types,
        rows=list(rows),
    )


def rows_by_task_type(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by task type in alphabetical order, without rows that have none."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["task_type"] is not None:
            groups.setdefault(str(row["task_type"]), []).append(row)
    return dict(sorted(groups.items()))


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


def as_text(tuned: Evaluation, base: Evaluation | None = None, *, examples: int = 3) -> str:
    """For the terminal: which rows were answered, the metrics, exact match by task type, answers.

    At most `examples` answers are shown; those that became wrong come first.
    """
    sources = Counter(map(itemgetter("source"), tuned.rows))
    base_content = None if base is None else base.as_json()
    pairs = order_rows(tuned.rows, None if base is None else base.rows)
    return evaluation_text(tuned.as_json(base), base_content, sources, pairs[:examples])


def control_tokens(tokenizer: Any) -> list[str]:
    """Text of every added token that is special or looks like markup (`<think>`, `[INST]`).

    Added plain words are none.
    """
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or _MARKUP.fullmatch(token.content):
            tokens.add(token.content)
    return sorted(filter(str.strip, tokens))


def _references(renderer: Any, examples: Sequence[Example]) -> list[str | None]:
    """The answers to compare with, calls as the template writes them.

    Raises InputError listing all that is wrong.
    """
    references = []
    problems: list[Problem] = []
    for example in examples:
        try:
            references.append(_reference(renderer, example))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return references


def _reference(renderer: Any, example: Example) -> str | None:
    if len(example.messages) < 2:
        what = "there is no prompt and answer to compare (raw text cannot be evaluated)"
        fix = "use data with a user turn and an assistant turn"
        raise InputError(Problem(example.where, "messages", what, fix))
    check_expected_format(example.columns.get("expected_format"), example.where)
    answer = dict(example.messages[-1])
    if not answer.get("tool_calls"):
        return answer.get("content")
    # The model may think otherwise and make the same call.
    answer.pop("reasoning_content", None)
    return answer_text(renderer, example, answer)


def _instruction(example: Example) -> str:
    """The last user message as its author wrote it, without the `input` that a format joined."""
    for message in reversed(example.messages):
        if message["role"] == "user":
            return str(message.get("instruction") or message.get("content") or "")
    return ""
