"""The four contamination rules, one by one and on planted rows, and clusters that cross a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from sft_recipes.audit.contamination import check_contamination, check_split_leak, find_overlaps
from sft_recipes.audit.finding import AuditRow, audit_rows
from sft_recipes.messages import Example
from sft_recipes.overlap import COVERED, EXACT, RULES, SHORT, trained_on
from sft_recipes.similarity import prompt_clusters
from tests.audit.planted import example, plant, substitute, text

QUESTION = (
    "A merchant from the coast sends three carts of salt to the market behind the mountains, where "
    "every sack is weighed twice before it is sold. How does the weather on the pass change what "
    "he earns?"
)
ANSWER = (
    "Rain makes the salt heavier at the first weighing and lighter at the second, so the merchant "
    "is paid less than he expects whenever the pass is wet."
)


def rows(pairs: Sequence[tuple[str, str]], source: str = "train.jsonl") -> list[AuditRow]:
    """Rows of one file."""
    examples = []
    for number, (prompt, response) in enumerate(pairs):
        examples.append(example(prompt, response, row=number, source=source))
    return audit_rows(examples)


def hits(
    train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]
) -> set[tuple[int, int, str]]:
    """Evaluation row, training row and rule."""
    found = find_overlaps(rows(train), rows(held_out))
    return {(hit.eval_row, hit.train_row, hit.rule) for hit in found}


def rules_hit(train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> set[str]:
    """The rules that hit any row."""
    return {hit.rule for hit in find_overlaps(rows(train), rows(held_out))}


@pytest.mark.parametrize(
    ("train", "held_out", "rules"),
    [
        (("What is salt?", "x"), ("what is  SALT", "y"), {"exact prompt"}),
        (("What is 5 + 3?", "x"), ("What is 5 - 3?", "y"), set()),
        (("Dear reader, " + QUESTION + " Explain.", "x"), (QUESTION, "y"), {"prompt coverage"}),
        ((QUESTION[: len(QUESTION) // 3], "x"), (QUESTION, "y"), set()),
        (
            ("Name the three largest rivers of the country!", "x"),
            ("Name the 3 largest rivers", "y"),
            set(),
        ),
        (
            ("Please name the largest rivers of Bolivia", "x"),
            ("Name the largest rivers of Bolivia.", "y"),
            {"short prompt"},
        ),
        (
            ("Name the 4 largest rivers of Bolivia now", "x"),
            ("Name the 5 largest rivers of Bolivia now", "y"),
            set(),
        ),
        (("Tell me.", f"As said: {ANSWER}"), ("Why is he poor?", ANSWER), {"reference answer"}),
        (
            ("Tell me.", "Paris is the capital of France."),
            ("Capital?", "Paris is the capital of France."),
            set(),
        ),
        (("", ""), ("", ""), set()),
        (("???", "x"), ("!!!", "y"), set()),
    ],
)
def test_each_rule(train: tuple[str, str], held_out: tuple[str, str], rules: set[str]) -> None:
    """Each rule hits what its definition says and nothing near it."""
    assert rules_hit([train], [held_out]) == rules


SHORT_PROMPT = "Name the largest rivers of Bolivia."


@pytest.mark.parametrize(
    ("train", "held_out", "rule"),
    [
        ((SHORT_PROMPT.upper(), "x"), (SHORT_PROMPT, "y"), "exact prompt"),
        ((f"So: {QUESTION}", "x"), (QUESTION, "y"), "prompt coverage"),
        ((f"Please: {SHORT_PROMPT}", "x"), (SHORT_PROMPT, "y"), "short prompt"),
        (("Tell me.", ANSWER), ("Why is he poor?", ANSWER), "reference answer"),
    ],
)
def test_each_rule_finds_what_no_other_does(
    train: tuple[str, str], held_out: tuple[str, str], rule: str
) -> None:
    """Of each rule a leak that the other three let pass: none of the four can go."""
    assert rules_hit([train], [held_out]) == {rule}


def test_coverage_is_that_of_the_best_single_prompt() -> None:
    """Halves of a prompt in two training rows are not added up.

    .5 of the words in one row is enough.
    """
    words = QUESTION.replace(".", "").split()
    assert len(words) == 37
    first = " ".join(words[:18])
    second = " ".join(words[18:36])
    assert hits([(first, "x"), (second, "x")], [(QUESTION, "y")]) == set()
    more_than_half = " ".join(words[:19])
    (hit,) = find_overlaps(rows([(more_than_half, "x")]), rows([(QUESTION, "y")]))
    assert hit.score == pytest.approx(19 / 37)
    assert hit.text == more_than_half.lower().replace(",", "")


def test_span_is_the_longest_shared_run() -> None:
    """The text shown is the longest run that both rows share.

    The coverage counts all runs, and no word between.
    """
    words = QUESTION.split()
    train = [*words[:9], "otherwise", "not", *words[11:30]]
    (hit,) = find_overlaps(rows([(" ".join(train), "x")]), rows([(QUESTION, "y")]))
    assert hit.text == " ".join(words[11:30]).lower().replace(",", "").replace(".", "")
    assert hit.score == pytest.approx((9 + 19) / 37)


def test_template_text_is_no_contamination() -> None:
    """A task description that all evaluation prompts share counts for nothing.

    The item behind it does.
    """
    random = Random(1)
    items = [text(random, 20) for _ in range(30)]
    held_out = [(f"{QUESTION} {item}", "y") for item in items]
    assert hits([(f"{QUESTION} {text(random, 20)}", "x") for _ in range(30)], held_out) == set()
    assert hits([(f"Once more: {QUESTION} {items[4]}", "x")], held_out) == {
        (4, 0, "prompt coverage")
    }


def test_frequent_phrases_are_no_contamination() -> None:
    """Thirteen words that stand in many training responses, as a refusal does, are no leak."""
    random = Random(2)
    train = [(text(random, 12), f"{ANSWER} {text(random, 10)}") for _ in range(40)]
    held_out = [(text(random, 12), ANSWER)]
    assert rules_hit(train, held_out) == set()
    assert rules_hit(train[:20], held_out) == {"reference answer"}


def test_planted_rows_are_found_and_clean_ones_are_not() -> None:
    """Of 60 evaluation rows 20 copies with one word in twenty replaced are found, and no other."""
    random = Random(3)
    clean = [(row.prompt, row.response) for row in audit_rows(plant(each=0).examples)]
    train, held_out = clean[:240], clean[240:]
    copies = [(substitute(random, prompt, 0.05), text(random, 50)) for prompt, _ in held_out[:20]]
    pairs = {(eval_row, train_row) for eval_row, train_row, _ in hits(train + copies, held_out)}
    planted = {(number, 240 + number) for number in range(20)}
    assert pairs <= planted
    assert len(pairs) >= 18


def test_finding_and_table() -> None:
    """The finding holds the training rows to remove over all sets.

    Each table holds its set's share of rows hit.
    """
    train = rows(
        [("What is salt?", "x"), ("Name a tree that is green.", "x"), ("what is salt", "z")]
    )
    eval_sets = {
        "one": rows([("What is salt?", "y"), ("Who?", "y")], "one.jsonl"),
        "two": rows([("Name a tree that is green", "y"), ("What is salt?", "y")], "two.jsonl"),
        "none": [],
    }
    finding, tables = check_contamination(train, eval_sets)
    assert finding.severity == "error"
    assert "Lexical only" in finding.definition
    assert "{" not in finding.definition
    assert [row.index for row in finding.rows] == [0, 1, 2]
    assert finding.rows[0].related == ["one.jsonl:1", "two.jsonl:2"]
    json.dumps(tables)
    assert [table["rows_hit"] for table in tables] == [1, 2, 0]
    assert [table["share"] for table in tables] == [0.5, 1.0, None]
    assert [table["train_rows"] for table in tables] == [2, 3, 0]
    assert set(tables[0]["rows_hit_by_rule"]) == set(RULES)
    assert tables[0]["rows_hit_by_rule"]["exact prompt"] == 1
    assert tables[0]["hits"][0] == {
        "eval": "one.jsonl:1",
        "train": "train.jsonl:1",
        "rule": "exact prompt",
        "text": "What is salt?",
        "texts": ["What is salt?", "What is salt?"],
    }


def test_hits_show_the_text_around_what_is_shared() -> None:
    """Both texts are shown as they are spelled, cut to where the shared words stand.

    Answers are shown where answers overlap.
    """
    before = text(Random(4), 400)
    train = rows([(f"{before} {QUESTION.upper()} {before}", "x"), ("Why?", f"{before}\n{ANSWER}")])
    held_out = rows([(QUESTION, "y"), ("Who is he?", f"So: {ANSWER}")])
    _, (table,) = check_contamination(train, {"one": held_out})
    prompt, answer = table["hits"]
    assert prompt["rule"] == "prompt coverage"
    assert prompt["texts"][0] == QUESTION
    assert QUESTION.upper() in prompt["texts"][1]
    assert answer["rule"] == "reference answer"
    assert answer["texts"][0] == f"So: {ANSWER}"
    assert answer["texts"][1].endswith(f"\n{ANSWER}")
    for hit in (prompt, answer):
        assert hit["texts"][1].startswith("... ")
        assert len(hit["texts"][1]) <= 1004


def test_system_prompts_do_not_count() -> None:
    """Rows that share a long system message only are no contamination."""
    train = audit_rows([example("What is salt?", "x", system=QUESTION)])
    held_out = audit_rows([example("Who wrote the poem?", "x", system=QUESTION)])
    assert find_overlaps(train, held_out) == []


def test_raw_text_counts_as_a_whole() -> None:
    """Raw text rows, which have no prompt, are compared by their text."""
    train = audit_rows([Example(messages=[], source="s", row=0, text=f"{QUESTION} End.")])
    held_out = audit_rows([Example(messages=[], source="s", row=0, text=QUESTION)])
    assert {hit.rule for hit in find_overlaps(train, held_out)} >= {"prompt coverage"}


def test_split_leak() -> None:
    """A near-duplicate prompt on the other side is an error.

    Other numbers and other prompts are not.
    """
    train = rows([(QUESTION, "x"), ("Add 12 and 30 and tell me.", "x"), ("Name a tree.", "x")])
    held_out = rows(
        [(f"Please: {QUESTION}", "y"), ("Add 12 and 31 and tell me.", "y")], "eval.jsonl"
    )
    finding = check_split_leak(train, held_out)
    assert finding.severity == "error" and "{" not in finding.definition
    assert [(row.index, row.related) for row in finding.rows] == [(0, ["eval.jsonl:1"])]


def test_a_split_by_cluster_has_no_leak() -> None:
    """Rows divided by `prompt_clusters` pass, the same rows divided in the middle do not."""
    all_rows = audit_rows(plant(clean=100, each=10).examples)
    clusters = prompt_clusters([row.question for row in all_rows])
    chosen = set(np.unique(clusters)[::5].tolist())
    train = []
    held_out = []
    for row, cluster in zip(all_rows, clusters.tolist(), strict=True):
        side = held_out if cluster in chosen else train
        side.append(row)
    assert not check_split_leak(train, held_out).rows
    assert check_split_leak(all_rows[:100], all_rows[100:]).rows


@pytest.mark.parametrize(
    ("by_rule", "words"),
    [
        ({EXACT: 3}, "trained on"),
        ({COVERED: 2, SHORT: 1}, "nearly trained on (prompts like trained ones)"),
        ({EXACT: 1, SHORT: 4}, "trained on, 4 of them nearly (prompts like trained ones)"),
    ],
)
def test_how_rows_relate_to_training_in_words(by_rule: dict[str, int], words: str) -> None:
    """Rows whose prompts are only like trained ones are not said to be trained on."""
    assert trained_on(by_rule) == words
