"""Lengths in words and tokens, and the truncation forecast against a count by hand over the labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from sft_recipes.audit.finding import AuditRow, audit_rows
from sft_recipes.audit.lengths import (
    TokenLengths,
    forecast,
    measure_tokens,
    smallest_fitting,
    summarise_lengths,
)
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.audit.planted import plant


@pytest.fixture(scope="module")
def labeller(make_tokenizer: Callable[..., Any]) -> Labeller:
    """ChatML on the tests' tokenizer, no limit of length."""
    renderer = attach_chat_template(make_tokenizer(), TemplateSettings(chat_template="chatml"))
    return Labeller(renderer, LabelSettings(max_length=None))


@pytest.fixture(scope="module")
def rows() -> list[AuditRow]:
    """Single exchanges, two conversations of three turns each, and a row of which nothing is trained."""
    turns = [
        ("user", "one two"),
        ("assistant", "three"),
        ("user", "four"),
        ("assistant", "five six"),
    ] * 2
    chat = [{"role": role, "content": content} for role, content in turns]
    extra = [
        Example(chat, "b.jsonl", 0, 1),
        Example(chat[:2], "b.jsonl", 1, 2, train=(False, False)),
    ]
    return audit_rows([*plant(clean=40, each=0).examples, *extra])


@pytest.fixture(scope="module")
def tokens(labeller: Labeller, rows: list[AuditRow], monkeypatch_module: Any) -> TokenLengths:
    """All rows measured in small batches, so that several are joined."""
    return measure_tokens(labeller, rows, tqdm(disable=True))


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    """Batches of 7 rows for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_recipes.audit.lengths._BATCH", 7)
        yield patch


def test_tokens_are_those_of_the_labelled_rows(
    labeller: Labeller, rows: list[AuditRow], tokens: TokenLengths
) -> None:
    """Total, number and places of trained tokens of each row are those of its labels; an unlabelled row is named."""
    labelled = labeller.label([row.example for row in rows]).rows
    assert tokens.row.tolist() == [row.example for row in labelled]
    assert tokens.total.tolist() == [len(row.labels) for row in labelled]
    assert tokens.trained.tolist() == [row.trained_tokens for row in labelled]
    for mask, row in zip(tokens.masks, labelled, strict=True):
        assert mask.tolist() == [label != IGNORE_INDEX for label in row.labels]
    ((position, lost),) = tokens.dropped
    assert position == len(rows) - 1 and lost.reason == "no_trained_turn"


def test_forecast_equals_cutting_the_rows(
    labeller: Labeller, rows: list[AuditRow], tokens: TokenLengths
) -> None:
    """For each length the counts are those of labels that are cut there, as TRL does, and of rows dropped whole."""
    labelled = labeller.label([row.example for row in rows]).rows
    everything = sum(row.trained_tokens for row in labelled)
    for cost in forecast(tokens, [20, 60, int(tokens.total[0]), 500]):
        limit = cost["max_length"]
        long = [row for row in labelled if len(row.labels) > limit]
        left = [sum(label != IGNORE_INDEX for label in row.labels[:limit]) for row in long]
        lost = sum(row.trained_tokens for row in long) - sum(left)
        assert cost["rows_cut"] == len(long) and cost["answers_lost"] == left.count(0)
        assert cost["trained_tokens_lost"] == lost and cost["share"] == pytest.approx(
            lost / everything
        )
        assert cost["trained_tokens_dropped"] == sum(row.trained_tokens for row in long)
        assert cost["share_dropped"] == pytest.approx(cost["trained_tokens_dropped"] / everything)
    assert forecast(tokens, [20])[0]["answers_lost"] > 0 == forecast(tokens, [5000])[0]["rows_cut"]


@pytest.mark.parametrize("count", [1, 50, 100, 101, 250, 1000])
def test_smallest_length_loses_less_than_one_percent(count: int) -> None:
    """One token less than the smallest fitting length loses 1 % of the rows or more."""
    total = np.random.default_rng(count).permutation(count) + 10
    tokens = TokenLengths(np.arange(count), total, total, [])
    fitting = smallest_fitting(tokens)
    assert (total > fitting).sum() < 0.01 * count <= (total > fitting - 1).sum()


def zip_lists(*columns: Any) -> list[list[int]]:
    """The rows of columns."""
    return np.stack(columns, axis=1).tolist()


def test_summary_counts_every_row(rows: list[AuditRow], tokens: TokenLengths) -> None:
    """Histograms hold every row, extremes are the shortest and longest, turns are the assistant's."""
    summary = summarise_lengths(rows, tokens)
    for name in (
        "prompt_words",
        "response_words",
        "prompt_tokens",
        "response_tokens",
        "total_tokens",
    ):
        histogram = summary[name]["histogram"]
        expected = len(rows) if name.endswith("words") else len(tokens.total)
        assert (
            sum(histogram["counts"]) == expected
            and len(histogram["edges"]) == len(histogram["counts"]) + 1
        )
        assert (
            histogram["edges"][0] == summary[name]["min"]
            and histogram["edges"][-1] >= summary[name]["max"]
        )
    assert sorted(summary["points"]) == sorted(
        zip_lists(tokens.total - tokens.trained, tokens.trained)
    )
    assert len(summarise_lengths(list(rows) * 30, None)["points"]) == 500
    assert summary["turns"] == {"1": 41, "4": 1}
    words = sorted(len(row.prompt.split()) + len(row.response.split()) for row in rows)
    for name, expected in {"shortest": words[:5], "longest": words[::-1][:5]}.items():
        assert [row["prompt_words"] + row["response_words"] for row in summary[name]] == expected
    assert summarise_lengths(rows[:1], None)["prompt_words"]["max"] == len(rows[0].prompt.split())
