"""Exact and near duplicates in planted rows; what only looks like a duplicate is kept apart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from sft_recipes.audit.duplicates import check_duplicates
from sft_recipes.audit.finding import Finding, audit_rows
from sft_recipes.messages import Example, Message
from tests.audit.planted import Planted, example, plant

PASSAGE = (
    "The harbour of the old town was built by fishermen who came from the north and stayed for the "
    "winter. They left their boats on the sand, carried stones down from the hill and laid them in "
    "a half circle against the waves. When the king heard of it he sent masons, a priest and a "
    "clerk, who wrote down what each family owned and owed."
)


def checked(examples: Sequence[Example]) -> dict[str, Finding]:
    """Findings by check."""
    return {finding.check: finding for finding in check_duplicates(audit_rows(examples))[0]}


def flagged(findings: Mapping[str, Finding], check: str) -> set[int]:
    """Row numbers under a check."""
    return {row.index for row in findings[check].rows}


@pytest.fixture(scope="module")
def planted() -> Planted:
    """300 clean rows and ten copies of each kind."""
    return plant()


@pytest.fixture(scope="module")
def found(planted: Planted) -> dict[str, Finding]:
    """What the checks say of them."""
    return checked(planted.examples)


@pytest.mark.parametrize(
    ("check", "kinds"),
    [
        ("duplicate_row", ["duplicate_row"]),
        ("duplicate_messages", ["duplicate_messages"]),
        ("near_duplicate", ["polite", "substituted"]),
        ("template_variant", ["template_variant"]),
        ("duplicate_prompt", ["duplicate_prompt"]),
    ],
)
def test_planted_copies_are_found(
    planted: Planted, found: Mapping[str, Finding], check: str, kinds: Sequence[str]
) -> None:
    """Each check flags exactly the copies planted for it and names the row that each is of."""
    expected: set[int] = set()
    for kind in kinds:
        expected |= planted.rows_of[kind]
    assert flagged(found, check) == expected
    for row in found[check].rows:
        assert row.where == f"rows.jsonl:{row.index + 1}"
        assert f"rows.jsonl:{planted.original[row.index] + 1}" in row.related


def test_clean_rows_are_not_flagged() -> None:
    """Rows without a copy raise nothing, and every check is there to say so."""
    findings, data = check_duplicates(audit_rows(plant(each=0).examples))
    assert [finding.check for finding in findings] == [
        "duplicate_row",
        "duplicate_messages",
        "duplicate_prompt",
        "near_duplicate",
        "near_duplicate_prompt",
        "template_variant",
    ]
    for finding in findings:
        assert not finding.rows
        assert finding.as_json()["share"] == 0
        assert "{" not in finding.definition
    assert data["exact"] == {"row": 0, "messages": 0, "prompt": 0, "response": 0}


def test_answers_repeat_without_a_warning() -> None:
    """Equal answers to different prompts are counted and not flagged."""
    answers = ["yes", "18", "The answer is B.", PASSAGE]
    rows = []
    for answer in answers:
        for topic, question in QUESTIONS:
            rows.append(example(f"Question about {topic}: {question}?", answer))
    findings, data = check_duplicates(audit_rows(_numbered(rows)))
    by_check = {finding.check: finding for finding in findings}
    assert data["exact"]["response"] == 8
    assert not by_check["duplicate_row"].rows
    assert not by_check["duplicate_messages"].rows
    # A long answer makes rows near-duplicates whatever the prompt; a short one never does.
    assert flagged(by_check, "near_duplicate") <= {10, 11}


QUESTIONS = [
    ("ships", "do they float on any sea"),
    ("trees", "can oaks grow here"),
    ("stars", "is Mars one of them"),
]


def _numbered(examples: Sequence[Example]) -> list[Example]:
    numbered = []
    for number, row in enumerate(examples):
        numbered.append(replace(row, source="rows.jsonl", row=number, line=number + 1))
    return numbered


def test_another_answer_is_no_duplicate() -> None:
    """Two questions on one passage with other answers are no near-duplicates.

    That holds however much text they share. A control token at the end of every answer does not
    make the answers alike.
    """
    rows = [
        example(f"{PASSAGE}\nDid fishermen build it?", "Yes<|endoftext|>"),
        example(f"{PASSAGE}\nDid the clerk build it?", "No<|endoftext|>"),
        example(f"Answer by this text: {PASSAGE}\nDid the clerk build it?", "No<|endoftext|>"),
    ]
    findings = checked(_numbered(rows))
    assert flagged(findings, "near_duplicate") == {2}
    assert findings["near_duplicate"].rows[0].related == ["rows.jsonl:2"]
    assert 1 in flagged(findings, "near_duplicate_prompt")
    assert findings["near_duplicate_prompt"].severity == "info"


def test_a_shared_system_prompt_is_no_similarity() -> None:
    """Rows that have only a long system prompt in common are not near-duplicates.

    Equal questions under it are duplicate prompts.
    """
    questions = [
        "Is rain water?",
        "Name a tree.",
        "Do oaks have leaves in the summer?",
        "Name a tree.",
    ]
    answers = ["Yes.", "Oak.", "Yes.", "A birch, for example."]
    rows = [example(*pair, system=PASSAGE) for pair in zip(questions, answers, strict=True)]
    findings = checked(_numbered(rows))
    assert {check for check, finding in findings.items() if finding.rows} == {"duplicate_prompt"}
    assert flagged(findings, "duplicate_prompt") == {3}


def _conversation(*texts: str) -> list[Message]:
    """User and assistant by turns."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_tools_and_roles_tell_rows_apart() -> None:
    """A row with other tools, or with the same words in other turns, is not the same row."""
    turns = _conversation("a b", "c", "d", "e")
    split = _conversation("a", "c", "b d", "e")
    rows = [
        Example(turns, "s", 0),
        Example(turns, "s", 1, tools=[{"name": "f"}]),
        Example(split, "s", 2),
        Example(turns, "s", 3),
    ]
    assert flagged(checked(rows), "duplicate_row") == {3}


def test_raw_text_rows() -> None:
    """Raw text has no prompt: equal texts are the same row, and no prompt is said to repeat."""
    texts = [PASSAGE, "Another text that is short.", PASSAGE]
    rows = [Example([], "s", row, text=text) for row, text in enumerate(texts)]
    findings = checked(rows)
    assert {check for check, finding in findings.items() if finding.rows} == {"duplicate_row"}


def test_data_for_the_report(planted: Planted) -> None:
    """The report gets counts, cluster sizes, a histogram and pairs around the threshold."""
    _, data = check_duplicates(audit_rows(planted.examples))
    json.dumps(data)
    near = data["near"]
    assert data["exact"]["messages"] == 20 and data["exact"]["row"] == 10
    assert near["rows"] == 20 and near["clusters_by_size"] == {"2": 20}
    assert 0 < near["rows_at_least_0.9"] < 20
    assert sum(near["histogram"]["counts"]) >= 20
    assert len(near["histogram"]["edges"]) == len(near["histogram"]["counts"]) + 1
    assert len(near["just_above"]) == 5
    assert min(pair["jaccard"] for pair in near["just_above"]) >= 0.7
    assert all(pair["jaccard"] < 0.7 for pair in near["just_below"])
    assert len(data["template_variants"]) == 5


def test_pairs_just_below_the_threshold_are_shown() -> None:
    """A pair at J = 41 / 59 is not flagged and stands among the pairs just below the threshold.

    Both texts are shown in full.
    """
    words = [f"w{chr(97 + place // 20)}{chr(97 + place % 20)}" for place in range(51)]
    other = [*words[:12], "changed", *words[13:30], "again", *words[31:45], "here", *words[46:]]
    # 52 words with the prompt's make 50 shingles, of which three changed words spoil nine.
    rows = _numbered([example("Say", " ".join(words)), example("Say", " ".join(other))])
    findings, data = check_duplicates(audit_rows(rows))
    (pair,) = data["near"]["just_below"]
    assert pair["jaccard"] == pytest.approx((50 - 9) / (50 + 9), abs=1e-4)
    assert pair["where"] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert pair["texts"] == ["Say\n" + " ".join(words), "Say\n" + " ".join(other)]
    assert not {finding.check: finding for finding in findings}["near_duplicate"].rows


def test_no_rows() -> None:
    """No rows give findings over nothing."""
    findings, data = check_duplicates([])
    assert all(finding.as_json()["share"] is None for finding in findings)
    assert data["rows"] == 0
