"""The evaluation as a whole: rows, files, comparison and what a person reads in the terminal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.errors import InputError
from sft_recipes.evaluation.answering import control_tokens
from sft_recipes.evaluation.evaluator import (
    Evaluation,
    compare,
    evaluate,
    evaluation_from_rows,
    examples_text,
    read_evaluation,
    write_evaluation,
)
from sft_recipes.evaluation.metrics import HEADLINES, METRICS
from sft_recipes.messages import Example
from sft_recipes.report.evaluation_tables import metrics_text
from tests.data.template_tokenizers import tokenizer_for


def as_text(tuned: Evaluation, base: Evaluation | None = None, examples: int = 3) -> str:
    """What `evaluate --all` prints of both: the tables, then some answers."""
    of_base = None if base is None else base.as_json()
    tables = metrics_text(tuned.as_json(base), of_base, tuned.rows)
    return tables + examples_text(tuned, base, examples)


@pytest.fixture(scope="module")
def tuned(make_model, renderer, examples) -> Evaluation:
    return evaluate(
        make_model(), renderer, examples, max_new_tokens=16, batch_size=4, progress=False
    )


def answered(evaluation: Evaluation, answers: dict[int, bool]) -> Evaluation:
    """The same evaluation with other verdicts on exact match."""
    rows = [
        dict(row) | {"exact_match": answers.get(index, False)}
        for index, row in enumerate(evaluation.rows)
    ]
    return evaluation_from_rows(rows)


def test_rows_hold_what_was_asked_and_answered(tuned, examples, renderer) -> None:
    """One row per example in order: its place, the rendered generation prompt, the answer and the
    scores."""
    for row, example in zip(tuned.rows, examples, strict=True):
        assert (row["source"], row["row"], row["line"]) == (
            example.source,
            example.row,
            example.line,
        )
        assert row["task_type"] == example.columns["task_type"]
    first = tuned.rows[0]
    assert first["prompt"] == "### user:\nName a colour.\n### assistant:\n"
    assert (first["reference"], first["messages"][-1]["content"]) == ("Blue.", "Blue.")
    assert first["reference_tokens"] == 5
    assert first["stop_reason"] in ("eos", "length")
    assert first["n_tokens"] <= 16


def test_answers_are_those_of_the_model(make_model, renderer, examples, tokenizer) -> None:
    """A model that always says one thing is scored on that: exact where the reference says the
    same."""
    model = make_model()
    answer = [*tokenizer("Blue.")["input_ids"], tokenizer.eos_token_id]

    def generate(input_ids: Any, **_: Any) -> Any:
        return input_ids.new_tensor([[*row, *answer] for row in input_ids.tolist()])

    model.generate = generate
    evaluation = evaluate(
        model, renderer, examples, max_new_tokens=16, batch_size=4, progress=False
    )
    assert {row["response"] for row in evaluation.rows} == {"Blue."}
    assert evaluation.metrics["exact_match"].value == 1 / 6
    assert {name: (value.value, value.n) for name, value in evaluation.task_types.items()} == {
        "count": (0.0, 1),
        "list": (0.0, 2),
        "name": (1 / 3, 3),
    }
    assert evaluation.stop_reasons == {"eos": 6}
    assert evaluation.flags["constraint_fail"].value == pytest.approx(2 / 6)
    assert evaluation.rows[0]["length_ratio"] == 1.0
    # "x" * 40 does not fit into 16 tokens with its terminator; nothing else comes near
    assert evaluation.metrics["reference_beyond_budget"].value == pytest.approx(1 / 6)


def test_template_text_and_control_tokens_count_as_leaks(
    make_model, renderer, examples, tokenizer
) -> None:
    """The segments that are handed in and the tokenizer's own special tokens reach the flags."""
    model = make_model()
    for text, flag in (
        ("### assistant:\nBlue.", "template_leak"),
        ("Blue.<pad>", "special_token_leak"),
    ):
        answer = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        model.generate = lambda input_ids, answer=answer, **_: input_ids.new_tensor(
            [[*row, *answer] for row in input_ids.tolist()]
        )
        settings: dict[str, Any] = {"max_new_tokens": 64, "batch_size": 4, "progress": False}
        segments = ["### assistant:\n"]
        evaluation = evaluate(model, renderer, examples, template_segments=segments, **settings)
        assert evaluation.flags[flag].value == 1.0


@pytest.mark.parametrize(
    ("text", "reference", "reasoning", "response", "flags"),
    [
        ("<think>\nhm\n</think>\n\nBlue.", "Blue.", "<think>\nhm\n", "Blue.", []),
        ("hm</think>\n\nBlue.", "Blue.", "hm", "Blue.", []),
        ("\nBlue.", "Blue.", None, "\nBlue.", []),
        ("<think>\nhm", "Blue.", None, "<think>\nhm", ["special_token_leak"]),
        ("<think>\nhm\n</think>\n\n", "Blue.", "<think>\nhm\n", "", ["empty"]),
        ("a</think>b", "x</think>y", None, "a</think>b", []),
    ],
)
def test_answers_are_judged_without_their_reasoning(
    make_model, text: str, reference: str, reasoning: str | None, response: str, flags: list[str]
) -> None:
    """What a reasoning model writes before its answer is kept apart; reasoning that never ends is a
    leak."""
    tokenizer = tokenizer_for("qwen3")
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model = make_model()
    model.generate = lambda input_ids, **_: input_ids.new_tensor(
        [[*row, *ids] for row in input_ids.tolist()]
    )
    answer = {"role": "assistant", "content": reference, "reasoning_content": "hm"}
    example = Example([{"role": "user", "content": "Name a colour."}, answer], "a.jsonl", 0)
    settings: dict[str, Any] = {"max_new_tokens": 64, "batch_size": 1, "progress": False}
    (row,) = evaluate(model, ChatRenderer(tokenizer), [example], **settings).rows
    assert (row["reasoning"], row["response"], row["flags"]) == (reasoning, response, flags)
    assert row["exact_match"] is (response.strip() == reference)
    assert row["response_tokens"] == len(tokenizer(response)["input_ids"])


def test_control_tokens_are_markup_not_words(tokenizer) -> None:
    """Special tokens and added markup count; an added plain word and added whitespace do not."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<tool_call>", "covid", "   "])
    assert control_tokens(own) == ["<eos>", "<pad>", "<tool_call>"]


def test_files_tell_the_whole_story(tuned, tmp_path) -> None:
    """metrics.json, samples.jsonl and report.html are written, and the samples read back to the
    same evaluation."""
    base = answered(tuned, {0: True})
    write_evaluation(tuned, tmp_path / "new" / "eval", info={"model": "tiny", "n": 6}, base=base)
    folder = tmp_path / "new" / "eval"
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (content["schema_version"], content["info"]["model"], content["n"]) == (1, "tiny", 6)
    exact = METRICS["exact_match"]
    assert content["metrics"]["exact_match"] == exact.describe(tuned.metrics["exact_match"])
    assert content["metrics"]["exact_match"]["label"] == "Exact match"
    assert content["differences"]["exact_match"]["lost"] == 1
    assert "Evaluation of tiny" in (folder / "report.html").read_text(encoding="utf-8")
    again = read_evaluation(folder)
    assert again == dataclasses.replace(tuned, rows=again.rows)
    assert [dict(row) for row in again.rows] == [dict(row) for row in tuned.rows]


def test_half_a_surrogate_pair_can_be_written(tuned, tmp_path) -> None:
    """JSON data may hold a lone surrogate, which UTF-8 cannot: the files are written and read back
    unchanged."""
    rows = [dict(row) | {"response": "a\ud800b"} for row in tuned.rows]
    write_evaluation(evaluation_from_rows(rows), tmp_path, info={"model": "tiny"})
    assert read_evaluation(tmp_path).rows[0]["response"] == "a\ud800b"


@pytest.mark.parametrize("line", ['{"messages": [], "respo', '{"messages": []}', "[]"])
def test_samples_that_are_cut_or_foreign_are_refused(tuned, tmp_path, line: str) -> None:
    """An earlier evaluation whose writing was cut short is named with its line, not a traceback."""
    write_evaluation(tuned, tmp_path, info={"model": "tiny"})
    with (tmp_path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
    where = rf"samples\.jsonl:{len(tuned.rows) + 1}: "
    with pytest.raises(InputError, match=where + "(is no sample|is no JSON|holds list)"):
        read_evaluation(tmp_path)


def test_comparison_is_paired_by_row(tuned) -> None:
    """Gained and lost rows are counted per prompt, tuned minus base."""
    differences = compare(
        answered(tuned, {0: True, 1: True}), answered(tuned, {1: True, 2: True, 3: True})
    )
    headlines = {metric.name for metric in HEADLINES}
    # No row here has a tool call to make.
    assert set(differences) == headlines - {"tool_call_exact"}
    exact = differences["exact_match"]
    assert (exact.gained, exact.lost, exact.n, exact.value) == (2, 1, 6, pytest.approx(1 / 6))
    assert differences["eos_rate"].value == 0.0
    assert (differences["token_f1"].n, differences["token_f1"].unit) == (6, "score 0 to 1")


def test_other_rows_cannot_be_compared(tuned) -> None:
    """A base that answered other prompts, fewer of them, another order or without the task types is
    refused."""
    for rows in (
        tuned.rows[:-1],
        tuned.rows[::-1],
        [dict(row) | {"task_type": None} for row in tuned.rows],
    ):
        with pytest.raises(InputError, match="evaluate both on the same data"):
            compare(evaluation_from_rows(rows), tuned)


def test_rows_that_cannot_be_evaluated_are_named(make_model, renderer, examples) -> None:
    """Raw text, and a format nobody knows, are refused with file and line before anything is
    generated."""
    raw = Example([], "raw.txt", 0, line=7, text="once upon a time")
    odd = dataclasses.replace(examples[0], columns={"expected_format": {"type": "yaml"}})
    for example, message in ((raw, "raw.txt:7: messages"), (odd, "test.jsonl:1: expected_format")):
        with pytest.raises(InputError, match=message):
            evaluate(make_model(), renderer, [example], max_new_tokens=4, batch_size=2)


def test_no_rows(make_model, renderer) -> None:
    """An empty data set has every metric without a value."""
    evaluation = evaluate(make_model(), renderer, [], max_new_tokens=4, batch_size=2)
    assert evaluation.metrics["exact_match"].value is None
    assert as_text(evaluation).startswith("no rows answered")
    assert "none" not in as_text(evaluation).lower()


def test_the_table_shows_both_models_and_what_was_lost(tuned) -> None:
    """Value, interval and paired difference per metric; task types; rows that became wrong come
    first."""
    base = answered(tuned, {3: True})
    text = as_text(tuned, base, examples=1)
    exact = next(line for line in text.splitlines() if line.startswith("Exact match  "))
    assert "0.167 [0.03, 0.56]" in exact
    assert "-0.167" in exact
    assert any("name" in line and "0.333" in line for line in text.splitlines())
    assert "---- test.jsonl:4" in text
    assert "---- test.jsonl:1" not in text
    assert "Owl." in text


def test_the_table_says_first_which_rows_were_answered(tuned) -> None:
    """Number of rows and the source of each come before any metric."""
    rows = [
        dict(row) | {"source": "other.jsonl" if row["row"] == 5 else "a\x1b.jsonl"}
        for row in tuned.rows
    ]
    first = as_text(evaluation_from_rows(rows)).splitlines()[0]
    assert first == "6 rows answered: 5 of a\u27e8U+001B\u27e9.jsonl, 1 of other.jsonl"


def test_the_terminal_shows_control_characters_and_markup_as_text(tuned) -> None:
    """Escape sequences, bidirectional overrides and rich markup in an answer are shown, not
    obeyed."""
    rows = [dict(row) | {"response": "[red]x[/red] \x1b[2J \u202e."} for row in tuned.rows]
    text = as_text(evaluation_from_rows(rows), examples=1)
    assert "[red]x[/red] \u27e8U+001B\u27e9[2J \u27e8U+202E\u27e9." in text
    assert "\x1b" not in text
