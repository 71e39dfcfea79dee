"""Known answers for every value of a row and for every number over rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from sft_recipes.evaluation.answer import FLAGS, Answer
from sft_recipes.evaluation.metrics import (
    HEADLINES,
    METRICS,
    score_row,
    summarise,
    summarise_flags,
)
from sft_recipes.evaluation.scores import chapter_completion, chapter_format, chapter_length_ratio
from sft_recipes.statistics import Estimate

LEAKS = {
    "control_tokens": ["<|im_end|>", "<eos>"],
    "template_segments": [
        "### Instruction:\n",
        "\n\n### Response:\n",
        "<|im_start|>user\n",
        "user\n",
        "\n",
        "--",
    ],
}


def score(
    response: str, reference: str | None = "Blue.", instruction: str = "Name a colour.", **rest: Any
) -> dict:
    """`score_row` with an ordinary row around the response."""
    settings = {"stop_reason": "eos"} | LEAKS | rest
    return score_row(Answer(instruction, reference, response, **settings))


FENCE = "```python\nprint(1)\n"
SENTENCE = "the cat sat on the mat and saw "  # 8 words
JSON = {"type": "json"}
BULLETS = {"type": "bullets", "n": 2}
LONG = "Please list the names of all the planets."


@pytest.mark.parametrize(
    ("response", "settings", "flags"),
    [
        ("Blue.", {}, []),
        ("", {}, ["empty"]),
        (" \n", {}, ["empty"]),
        ("Blue.<|im_end|>", {}, ["special_token_leak"]),
        ("It is <eos>.", {"reference": "The token is <eos>."}, []),
        ("Blue.\n### Instruction:\nName a bird.", {}, ["template_leak", "next_turn"]),
        ("### Response:\nBlue.", {}, ["template_leak"]),
        ("We write ### Instruction: first.", {}, []),
        ("### Overview\nBlue.", {}, []),
        ("users -- all of them", {}, []),
        ("user\nBlue.", {}, ["template_leak"]),
        ("### Instruction: a", {"reference": "### Instruction: b"}, []),
        ("Blue.\nUser: and now?", {}, ["next_turn"]),
        ("Blue.\n**Human:** and now?", {}, ["next_turn"]),
        ("Blue.\n<start_of_turn>user\nand now?", {}, ["next_turn"]),
        ("User: hello", {}, []),
        ("A: hi\nUser: hello", {"instruction": "Write a dialogue."}, []),
        ("Q: 1?\nA: 1\nQ: 2?", {"reference": "x\nQ: y"}, []),
        (SENTENCE * 3, {}, ["loop"]),
        (SENTENCE * 2, {}, []),
        (
            "one two " + SENTENCE * 3 + "the cat sa",
            {"stop_reason": "length"},
            ["loop", "unterminated"],
        ),
        ("no " * 23, {}, []),
        ("no " * 24, {}, ["loop"]),
        ("的" * 96, {}, ["loop"]),
        ("的" * 120, {"stop_reason": "length"}, ["loop", "unterminated"]),
        ("的" * 95, {}, []),
        (" ".join(map(str, range(200))), {}, []),
        ((SENTENCE * 7 + "end of it"), {}, ["repetitive"]),
        ("Blue", {"stop_reason": "length"}, ["unterminated"]),
        ("Blue", {"stop_reason": "time"}, ["unterminated"]),
        ("Blue", {"stop_reason": "stop_string"}, []),
        (FENCE, {}, ["open_structure"]),
        (FENCE + "```", {}, []),
        ('{"a": [1, 2', {}, ["open_structure"]),
        ('[{"a": 1}] is the list', {}, []),
        ("[1] is a citation", {}, []),
        ('{"a": 1}', {"expected_format": JSON}, []),
        ("[" * 9000, {"expected_format": JSON}, ["loop", "open_structure", "constraint_fail"]),
        ("9" * 9000, {"expected_format": JSON}, ["loop", "open_structure", "constraint_fail"]),
        ("NaN of it", {"expected_format": JSON}, ["open_structure", "constraint_fail"]),
        ('{"a": 1} done', {"expected_format": JSON}, ["open_structure", "constraint_fail"]),
        ("- a\n* b", {"expected_format": BULLETS}, []),
        ("- a\n- b\n- c", {"expected_format": BULLETS}, ["constraint_fail"]),
        ("- a\n-b\n-", {"expected_format": BULLETS}, ["constraint_fail"]),
        (LONG + " Sure.", {"instruction": LONG}, ["prompt_echo"]),
        ("Sure: " + LONG, {"instruction": LONG}, []),
        (LONG, {"instruction": LONG, "reference": LONG}, []),
        ("Name a colour.", {}, []),
    ],
)
def test_flags(response: str, settings: dict, flags: list[str]) -> None:
    """Each flag is raised by its fault and by nothing that only looks like it; format adherence is
    no flag at all."""
    row = score(response, **settings)
    assert row["flags"] == flags
    assert row["well_formed"] is (not flags)


def test_every_flag_is_covered() -> None:
    """The cases above raise each flag at least once."""
    (cases,) = (mark.args[1] for mark in test_flags.pytestmark if mark.name == "parametrize")
    assert {flag for _, _, flags in cases for flag in flags} == set(FLAGS)


@pytest.mark.parametrize(
    ("response", "stop_reason", "complete"),
    [
        ("Blue.", "eos", True),
        ("Blue.", "stop_string", True),
        ("Blue.", "length", False),
        ("Blue.", "time", False),
        ("", "eos", False),
        (FENCE, "eos", False),
        (SENTENCE * 3, "eos", False),
        ("Blue.\nUser: more", "eos", False),
        ("### Response:\nBlue.", "eos", True),
    ],
)
def test_completion(response: str, stop_reason: str, complete: bool) -> None:
    """Complete: ended by itself, not empty, no loop, no next turn, nothing open; a leak alone does
    not matter here."""
    row = score(response, stop_reason=stop_reason)
    assert (row["complete"], row["eos"]) == (complete, stop_reason == "eos")


@pytest.mark.parametrize(
    ("response", "reference", "match"),
    [(" Blue.\n", "Blue.", True), ("blue.", "Blue.", False), ("", "", True), ("x", None, None)],
)
def test_exact_match_strips_and_nothing_else(
    response: str, reference: str | None, match: bool | None
) -> None:
    """Outer whitespace does not count, case does; without a reference there is no verdict."""
    assert score(response, reference)["exact_match"] is match


def test_the_chapters_own_metrics() -> None:
    """Words over at least one reference word; keywords found as substrings; 0, 0.5 or 1 for the
    format."""
    row = score(
        "### The capital is Paris", "Paris is it", instruction="What is the capital of France?"
    )
    # 5 words over 3; of "what is the capital of france?" the answer holds is, the, capital
    assert row["chapter_length_ratio"] == pytest.approx(5 / 3)
    assert row["chapter_completion_rate"] == pytest.approx(3 / 6)
    assert row["chapter_format_adherence"] == 0.5
    assert [chapter_format(text) for text in (" ", "###x", "  ### x", "fine")] == [
        0.0,
        1.0,
        0.5,
        1.0,
    ]
    assert chapter_length_ratio("", "a b") == 2.0
    assert chapter_completion("  ", "a b") is None


def row_of(ratio: float | None, stop_reason: str = "eos", exact: bool | None = True) -> dict:
    """A scored row with a given length ratio over ten reference tokens."""
    tokens = None if ratio is None else round(10 * ratio)
    return score(
        "Blue.",
        stop_reason=stop_reason,
        response_tokens=tokens,
        reference_tokens=10 if tokens is not None else 0,
    ) | {"exact_match": exact}


def test_length_ratio() -> None:
    """The median, answers cut at the budget and empty ones included, rows without a reference
    not."""
    rows = [row_of(1.0), row_of(2.0), row_of(4.0, "length"), row_of(0.0), row_of(0.5), row_of(None)]
    ratio = summarise(rows)["length_ratio"]
    assert (ratio.value, ratio.n, ratio.n_excluded) == (1.0, 5, 1)
    assert ratio.higher_is_better is None


def test_rates_over_rows() -> None:
    """Shares count the rows that have a verdict, and each metric says which direction is better."""
    rows = [
        row_of(1.0),
        row_of(1.0, "length", False),
        row_of(1.0, exact=None),
        row_of(1.0, "stop_string", False),
    ]
    summary = summarise(rows)
    rates = {metric.name: summary[metric.name].value for metric in HEADLINES}
    assert rates == {
        "exact_match": 1 / 3,
        "token_f1": 1.0,
        "rouge_l": 1.0,
        "tool_call_exact": None,
        "completion_rate": 0.75,
        "format_adherence": 0.75,
        "eos_rate": 0.5,
    }
    assert summary["exact_match"].n_excluded == 1
    assert all(summary[metric.name].higher_is_better for metric in HEADLINES)
    assert summarise_flags(rows)["unterminated"].value == 0.25
    assert summarise_flags(rows)["loop"].value == 0.0
    assert summary["chapter_length_ratio"].value == 1.0


def test_equal_rows_give_points_and_wilson_bounds() -> None:
    """All alike: ratios have a point interval, proportions keep Wilson's doubt."""
    summary = summarise([row_of(1.0)] * 8)
    assert (summary["length_ratio"].ci_low, summary["length_ratio"].ci_high) == (1.0, 1.0)
    assert summary["exact_match"].value == 1.0
    assert summary["exact_match"].ci_low == pytest.approx(8 / (8 + 1.959964**2), abs=1e-6)


def test_no_rows_no_values() -> None:
    """An empty evaluation has every metric and every flag, all without a value."""
    for estimate in [*summarise([]).values(), *summarise_flags([]).values()]:
        assert (estimate.value, estimate.n) == (None, 0)


@pytest.mark.parametrize(
    ("reference", "response", "f1"),
    [
        ("Blue.", "blue", 1.0),
        ("The sky is blue", "a sky, blue!", 4 / 5),
        ("a b b", "b b b", 4 / 5),
        ("red", "blue", 0.0),
        ("", "", 1.0),
        ("the", "...", 1.0),
        ("red", "", 0.0),
        ("", "red", 0.0),
        ("don't", "dont", 1.0),
        ("ÄPFEL und Birnen", "äpfel oder birnen", 2 / 3),
    ],
)
def test_token_f1(reference: str, response: str, f1: float) -> None:
    """Words count as often as both texts have them; case, punctuation and English articles do not
    count."""
    assert score(response, reference)["token_f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("reference", "response", "f1"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("the cat", "THE cat.", 1.0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("a b", "b a", 1 / 2),
        ("", "", 1.0),
        ("?", "!", 1.0),
        ("red", "", 0.0),
    ],
)
def test_rouge_l(reference: str, response: str, f1: float) -> None:
    """The first two are the examples of Lin's paper (2004): the order of the shared words counts,
    gaps do not."""
    assert score(response, reference)["rouge_l"] == pytest.approx(f1)


def test_comparisons_need_a_reference() -> None:
    """Without a reference exact match, token F1, ROUGE-L and the chapter's length ratio have no
    value."""
    row = score("Blue.", None)
    assert [
        row[name] for name in ("exact_match", "token_f1", "rouge_l", "chapter_length_ratio")
    ] == [None] * 4


def test_any_flag_is_a_fault_of_form() -> None:
    """Format adherence is strict: one flag of whatever kind is enough."""
    for response, settings in (
        ("Blue", {"stop_reason": "length"}),
        (LONG + " Sure.", {"instruction": LONG}),
        ("one two", {"expected_format": {"max_words": 1, "lower_case": True}}),
    ):
        row = score(response, **settings)
        assert len(row["flags"]) == 1 and not row["well_formed"]


def test_repetition_inside_answers() -> None:
    """Of five 4-grams four are different; an answer of fewer than four words has none."""
    assert score("a b c d a b c d")["rep_4"] == pytest.approx(1 / 5)
    assert score("a b c")["rep_4"] is None
    assert score("")["rep_4"] is None
    repeated = summarise([row_of(1.0) | {"rep_4": value} for value in (0.0, 0.5, None)])["rep_4"]
    assert (repeated.value, repeated.n, repeated.n_excluded) == (0.25, 2, 1)
    assert repeated.higher_is_better is False


def evenness_of(*openers: str | None) -> Estimate:
    """The evenness of rows with these openers."""
    return summarise([row_of(1.0) | {"opener": opener} for opener in openers])["opener_entropy"]


def test_openers_over_rows() -> None:
    """Entropy over that of n different ones; rows without an opener do not count."""
    found = evenness_of(
        "sure, here is a", "sure, here is a", "as an ai model", "the sky is blue", None
    )
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert found.value == pytest.approx(entropy)
    assert (found.n, found.n_excluded, found.higher_is_better) == (4, 1, None)
    assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1


def test_openers_all_alike_all_different_one_and_none() -> None:
    """All alike: 0; all different: 1, the interval not below it as resampling would have it."""
    alike = evenness_of(*["sure"] * 20)
    assert (alike.value, alike.ci_high) == (0.0, 0.0)
    different = evenness_of(*map(str, range(20)))
    assert (different.value, different.ci_high) == (1.0, 1.0)
    single = evenness_of("sure")
    assert (single.value, single.ci_high) == (0.0, None)
    none = evenness_of(None, None)
    assert (none.value, none.ci_high) == (None, None)


@pytest.mark.slow
def test_openers_interval_holds_the_expected_value() -> None:
    """In 300 draws of 150 rows the interval holds the expected value at that n in 90 % or more."""
    rng = np.random.default_rng(0)
    shares = np.array([0.3, 0.2, *[0.05] * 10])
    draws = rng.choice(len(shares), (300, 150), p=shares)
    metric = METRICS["opener_entropy"]
    found = [metric.estimate([f"{code}" for code in draw]) for draw in draws]
    truth = np.mean([estimate.value for estimate in found])
    held = [estimate.ci_low <= truth <= estimate.ci_high for estimate in found]
    assert np.mean(held) >= 0.9


def test_the_table_of_metrics() -> None:
    """Names and columns stand for one metric each, every metric says what it is, groups hold
    together.

    The headlines are those that can be compared in pairs and are better when higher.
    """
    metrics = list(METRICS.values())
    assert len({metric.key for metric in metrics}) == len(metrics)
    assert all(metric.label and metric.definition.endswith(".") for metric in metrics)
    groups = [group for group, _ in itertools.groupby(metric.group for metric in metrics)]
    assert len(groups) == len(set(groups))
    for metric in HEADLINES:
        assert metric.is_mean_of_rows and metric.higher_is_better and not metric.is_unbounded_mean


def test_every_metric_has_a_value_its_unit_and_its_direction() -> None:
    """An ordinary row has a value for every metric, so no column is one that rows do not have."""
    row = score(
        "Sure, the sky is blue, the sky is blue.",
        max_new_tokens=9,
        response_tokens=9,
        reference_tokens=9,
    )
    for name, estimate in summarise([row | {"tool_call_exact": True}] * 3).items():
        metric = METRICS[name]
        assert estimate.value is not None, name
        if metric.is_yes_or_no and name != "tool_call_exact":
            what = "is a share in the default unit: measure true or false, or name a unit"
            assert isinstance(row[metric.key], bool), f"{name} {what}"
        assert (estimate.n, estimate.unit, estimate.higher_is_better) == (
            3,
            metric.unit,
            metric.higher_is_better,
        )


def test_rows_of_an_earlier_version_are_read() -> None:
    """A sample without the newer scores has none for them; the others stay as they were."""
    row = {
        key: value
        for key, value in row_of(1.0).items()
        if key not in ("token_f1", "tool_call_exact", "opener")
    }
    summary = summarise([row])
    assert summary["exact_match"].value == 1.0
    assert summary["token_f1"].value is None
    assert summary["opener_entropy"].n == 0
