"""Lengths in words and tokens, and the truncation forecast against a count over labelled rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from sft_recipes.audit.finding import AuditRow, audit_rows
from sft_recipes.audit.lengths import (
    TokenLengths,
    advice,
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
    """Single exchanges, a conversation of eight turns, and a row of which nothing is trained."""
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
def tokens(labeller: Labeller, rows: list[AuditRow]) -> TokenLengths:
    """All rows measured in small batches, so that several are joined."""
    return measure_tokens(labeller, rows, tqdm(disable=True), batch_size=7)


def test_tokens_are_those_of_the_labelled_rows(
    labeller: Labeller, rows: list[AuditRow], tokens: TokenLengths
) -> None:
    """Total, number and places of trained tokens of each row are those of its labels.

    An unlabelled row is named.
    """
    labelled = labeller.label([row.example for row in rows]).rows
    assert tokens.row.tolist() == [row.example for row in labelled]
    assert tokens.total.tolist() == [len(row.labels) for row in labelled]
    assert tokens.trained.tolist() == [row.trained_tokens for row in labelled]
    for mask, row in zip(tokens.masks, labelled, strict=True):
        assert mask.tolist() == [label != IGNORE_INDEX for label in row.labels]
    (dropped,) = tokens.dropped
    assert dropped.position == len(rows) - 1
    assert dropped.loss.reason == "no_trained_turn"


def test_forecast_equals_cutting_the_rows(
    labeller: Labeller, rows: list[AuditRow], tokens: TokenLengths
) -> None:
    """For each length the counts are those of labels that are cut there, and of rows dropped."""
    labelled = labeller.label([row.example for row in rows]).rows
    everything = sum(row.trained_tokens for row in labelled)
    for cost in forecast(tokens, [20, 60, int(tokens.total[0]), 500]):
        limit = cost["max_length"]
        left = []
        dropped = 0
        for row in labelled:
            if len(row.labels) > limit:
                left.append(sum(label != IGNORE_INDEX for label in row.labels[:limit]))
                dropped += row.trained_tokens
        lost = dropped - sum(left)
        assert cost == {
            "max_length": limit,
            "rows_cut": len(left),
            "answers_lost": left.count(0),
            "trained_tokens_lost": lost,
            "share": pytest.approx(lost / everything),
            "trained_tokens_dropped": dropped,
            "share_dropped": pytest.approx(dropped / everything),
        }


def test_forecast_at_both_ends(tokens: TokenLengths) -> None:
    """A very short limit loses whole answers, a very long one cuts nothing."""
    short, long = forecast(tokens, [20, 5000])
    assert short["answers_lost"] > 0
    assert long["rows_cut"] == 0


@pytest.mark.parametrize("count", [1, 50, 100, 101, 250, 1000])
def test_smallest_length_loses_less_than_one_percent(count: int) -> None:
    """One token less than the smallest fitting length loses 1 % of the rows or more."""
    total = np.random.default_rng(count).permutation(count) + 10
    tokens = TokenLengths(np.arange(count), total, total, [])
    fitting = smallest_fitting(tokens)
    assert (total > fitting).sum() < 0.01 * count <= (total > fitting - 1).sum()


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("prompt_words", "rows"),
        ("response_words", "rows"),
        ("prompt_tokens", "training rows"),
        ("response_tokens", "training rows"),
        ("total_tokens", "training rows"),
    ],
)
def test_histograms_hold_every_row(
    rows: list[AuditRow], tokens: TokenLengths, name: str, unit: str
) -> None:
    """The counts add up, and the edges reach from the shortest to the longest."""
    numbers = summarise_lengths(rows, tokens)[name]
    edges = numbers["histogram"]["edges"]
    counts = numbers["histogram"]["counts"]
    assert sum(counts) == {"rows": len(rows), "training rows": len(tokens.total)}[unit]
    assert len(edges) == len(counts) + 1
    assert edges[0] == numbers["min"]
    assert edges[-1] >= numbers["max"]


def test_points_are_rows(rows: list[AuditRow], tokens: TokenLengths) -> None:
    """Each point is prompt and answer of a training row; of many rows 500 are drawn."""
    expected = np.stack([tokens.total - tokens.trained, tokens.trained], axis=1).tolist()
    assert sorted(summarise_lengths(rows, tokens)["points"]) == sorted(expected)
    assert len(summarise_lengths(list(rows) * 30, None)["points"]) == 500


def test_extremes_and_turns(rows: list[AuditRow], tokens: TokenLengths) -> None:
    """The shortest and longest rows are shown in their order; turns are the assistant's."""
    summary = summarise_lengths(rows, tokens)
    assert summary["turns"] == {"1": 41, "4": 1}
    words = sorted(len(row.prompt.split()) + len(row.response.split()) for row in rows)
    for name, expected in {"shortest": words[:5], "longest": words[::-1][:5]}.items():
        assert [row["prompt_words"] + row["response_words"] for row in summary[name]] == expected


def test_summary_of_one_row(rows: list[AuditRow]) -> None:
    """A single row has a distribution, too."""
    summary = summarise_lengths(rows[:1], None)
    assert summary["prompt_words"]["max"] == len(rows[0].prompt.split())


@pytest.mark.parametrize(
    ("lengths", "limit", "advised"),
    [
        ([100] * 295 + [5000], 128, [5000]),  # one long row: 100 would be no raise
        ([100] * 90 + [300] * 9 + [900], 128, [900]),  # 1 % is not less than 1 %
        ([100] * 900 + [300] * 99 + [900], 128, [300, 900]),
        ([300] * 300, 128, [300]),
    ],
)
def test_advised_lengths_lose_less_than_the_limit_set(
    lengths: list[int], limit: int, advised: list[int]
) -> None:
    """Every length that the advice names is above the one that is set; the last loses no row."""
    total = np.array(lengths)
    masks = [np.ones(length, dtype=bool) for length in lengths]
    text = advice(TokenLengths(np.arange(len(total)), total, total, masks), limit)
    assert [int(number) for number in re.findall(r"(?:to|or) (\d+)", text)] == advised
    assert all(length > limit for length in advised)
