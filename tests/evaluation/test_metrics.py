"""Known answers for every value of a row and for every number over rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation import metrics
from sft_recipes.evaluation.metrics import FLAGS, Answer, check_expected_format, score_row, summarise, summarise_flags

LEAKS = {
    "control_tokens": ["<|im_end|>", "<eos>"],
    "template_segments": ["### Instruction:\n", "\n\n### Response:\n", "<|im_start|>user\n", "user\n", "\n", "--"],
}


def score(response: str, reference: str | None = "Blue.", instruction: str = "Name a colour.", **rest: Any) -> dict:
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
        ("one two " + SENTENCE * 3 + "the cat sa", {"stop_reason": "length"}, ["loop", "unterminated"]),
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
    """Each flag is raised by its fault and by nothing that only looks like it; format adherence is no flag at all."""
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
    """Complete: ended by itself, not empty, no loop, no next turn, nothing open; a leak alone does not matter here."""
    row = score(response, stop_reason=stop_reason)
    assert (row["complete"], row["eos"]) == (complete, stop_reason == "eos")


@pytest.mark.parametrize(
    ("response", "reference", "match"),
    [(" Blue.\n", "Blue.", True), ("blue.", "Blue.", False), ("", "", True), ("x", None, None)],
)
def test_exact_match_strips_and_nothing_else(response: str, reference: str | None, match: bool | None) -> None:
    """Outer whitespace does not count, case does; without a reference there is no verdict."""
    assert score(response, reference)["exact_match"] is match


def test_the_chapters_own_metrics() -> None:
    """Words over at least one reference word; keywords found as substrings; 0, 0.5 or 1 for the format."""
    row = score("### The capital is Paris", "Paris is it", instruction="What is the capital of France?")
    # 5 words over 3; of "what is the capital of france?" the answer holds is, the, capital
    assert row["chapter_length_ratio"] == pytest.approx(5 / 3)
    assert row["chapter_completion_rate"] == pytest.approx(3 / 6)
    assert row["chapter_format_adherence"] == 0.5
    assert [metrics.chapter_format(text) for text in (" ", "###x", "  ### x", "fine")] == [0.0, 1.0, 0.5, 1.0]
    assert metrics.chapter_length_ratio("", "a b") == 2.0
    assert metrics.chapter_completion("  ", "a b") is None


def row_of(ratio: float | None, stop_reason: str = "eos", exact: bool | None = True) -> dict:
    """A scored row with a given length ratio over ten reference tokens."""
    tokens = None if ratio is None else round(10 * ratio)
    return score(
        "Blue.", stop_reason=stop_reason, response_tokens=tokens, reference_tokens=10 if tokens is not None else 0
    ) | {"exact_match": exact}


def test_length_ratios() -> None:
    """Median, median of finished answers, exp mean log without empty ones, corpus ratio, share outside 0.5 to 2."""
    rows = [row_of(1.0), row_of(2.0), row_of(4.0, "length"), row_of(0.0), row_of(0.5), row_of(None)]
    values = {name: (estimate.value, estimate.n, estimate.n_excluded) for name, estimate in summarise(rows).items()}
    assert values["length_ratio"] == (1.0, 5, 1)
    assert values["length_ratio_finished"] == (0.75, 4, 2)
    assert values["length_ratio_geometric"] == (pytest.approx(math.exp(math.log(1 * 2 * 4 * 0.5) / 4)), 4, 2)
    assert values["length_ratio_corpus"] == (pytest.approx(75 / 50), 5, 1)
    assert values["length_ratio_outside"] == (2 / 5, 5, 1)


def test_rates_over_rows() -> None:
    """Shares count the rows that have a verdict, and each metric says which direction is better."""
    rows = [row_of(1.0), row_of(1.0, "length", False), row_of(1.0, exact=None), row_of(1.0, "stop_string", False)]
    summary = summarise(rows)
    assert {name: summary[name].value for name in metrics.BINARY_METRICS} == {
        "exact_match": 1 / 3,
        "completion_rate": 0.75,
        "format_adherence": 0.75,
        "eos_rate": 0.5,
    }
    assert summary["exact_match"].n_excluded == 1
    assert all(summary[name].higher_is_better for name in metrics.BINARY_METRICS)
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
    "expected", [{"type": "yaml"}, {"type": "bullets"}, {"type": "bullets", "n": True}, "json", {}, {"n": 2}, [1]]
)
def test_unknown_formats_are_refused(expected: Any) -> None:
    """A format nobody can check is an error that names the row, never a pass."""
    with pytest.raises(InputError, match=r"^a\.jsonl:3: expected_format: .* Fix: "):
        check_expected_format(expected, "a.jsonl:3")


@pytest.mark.parametrize("expected", [None, JSON, BULLETS, {"type": "json", "n": None}])
def test_known_formats_pass(expected: Any) -> None:
    """Also with the null members that columnar files add."""
    check_expected_format(expected, "a.jsonl:3")
