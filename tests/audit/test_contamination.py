"""The four contamination rules, one by one and on planted rows, and clusters that cross a split."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from sft_recipes.audit.contamination import (
    RULES,
    check_contamination,
    check_split_leak,
    find_overlaps,
)
from sft_recipes.audit.finding import AuditRow, audit_rows
from sft_recipes.messages import Example
from sft_recipes.similarity import prompt_clusters
from tests.audit.planted import example, plant, substitute, text

QUESTION = (
    "A merchant from the coast sends three carts of salt to the market behind the mountains, where every sack is "
    "weighed twice before it is sold. How does the weather on the pass change what he earns?"
)
ANSWER = (
    "Rain makes the salt heavier at the first weighing and lighter at the second, so the merchant is paid less than "
    "he expects whenever the pass is wet."
)


def rows(pairs: list[tuple[str, str]], source: str = "train.jsonl") -> list[AuditRow]:
    """Rows of one file."""
    return audit_rows(
        [example(*pair, row=number, source=source) for number, pair in enumerate(pairs)]
    )


def hits(
    train: list[tuple[str, str]], held_out: list[tuple[str, str]]
) -> set[tuple[int, int, str]]:
    """Evaluation row, training row and rule."""
    return {
        (hit.eval_row, hit.train_row, hit.rule)
        for hit in find_overlaps(rows(train), rows(held_out))
    }


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
    assert {rule for _, _, rule in hits([train], [held_out])} == rules


def test_coverage_is_that_of_the_best_single_prompt() -> None:
    """Halves of a prompt in two training rows are not added up; .5 of the words in one row is enough."""
    parts = QUESTION.replace(".", "").split()
    assert len(parts) == 37
    first, second = " ".join(parts[:18]), " ".join(parts[18:36])
    assert hits([(first, "x"), (second, "x")], [(QUESTION, "y")]) == set()
    (hit,) = find_overlaps(rows([(" ".join(parts[:19]), "x")]), rows([(QUESTION, "y")]))
    assert hit.score == pytest.approx(19 / 37)
    assert hit.text == " ".join(parts[:19]).lower().replace(",", "")


def test_span_is_the_longest_shared_run() -> None:
    """The text shown is the longest run that both rows share; the coverage counts all runs, and no word between."""
    parts = QUESTION.split()
    train = [*parts[:9], "otherwise", "not", *parts[11:30]]
    (hit,) = find_overlaps(rows([(" ".join(train), "x")]), rows([(QUESTION, "y")]))
    assert hit.text == " ".join(parts[11:30]).lower().replace(",", "").replace(".", "")
    assert hit.score == pytest.approx((9 + 19) / 37)


def test_template_text_is_no_contamination() -> None:
    """A task description that all evaluation prompts share counts for nothing; the item behind it does."""
    random = Random(1)
    items = [text(random, 20) for _ in range(30)]
    held_out = [(f"{QUESTION} {item}", "y") for item in items]
    assert hits([(f"{QUESTION} {text(random, 20)}", "x") for _ in range(30)], held_out) == set()
    assert hits([(f"Once more: {QUESTION} {items[4]}", "x")], held_out) == {
        (4, 0, "prompt coverage")
    }


def test_frequent_phrases_are_no_contamination() -> None:
    """Thirteen words that stand in many training responses, as a refusal does, are no sign of a leaked answer."""
    random = Random(2)
    train = [(text(random, 12), f"{ANSWER} {text(random, 10)}") for _ in range(40)]
    assert hits(train, [(text(random, 12), ANSWER)]) == set()
    assert {rule for *_, rule in hits(train[:20], [(text(random, 12), ANSWER)])} == {
        "reference answer"
    }


def test_planted_rows_are_found_and_clean_ones_are_not() -> None:
    """Of 60 evaluation rows, 20 copied with one word in twenty replaced: those are found, no other is."""
    random = Random(3)
    clean = [(row.prompt, row.response) for row in audit_rows(plant(each=0).examples)]
    train, held_out = clean[:240], clean[240:]
    copies = [(substitute(random, prompt, 0.05), text(random, 50)) for prompt, _ in held_out[:20]]
    found = hits(train + copies, held_out)
    assert {(number, row) for number, row, _ in found} <= {
        (number, 240 + number) for number in range(20)
    }
    assert len({number for number, *_ in found}) >= 18


def test_finding_and_table() -> None:
    """The finding holds the training rows to remove over all sets; each table holds its set's share of rows hit."""
    train = rows(
        [("What is salt?", "x"), ("Name a tree that is green.", "x"), ("what is salt", "z")]
    )
    one = rows([("What is salt?", "y"), ("Who?", "y")], "one.jsonl")
    two = rows([("Name a tree that is green", "y"), ("What is salt?", "y")], "two.jsonl")
    finding, tables = check_contamination(train, {"one": one, "two": two, "none": []})
    assert (
        finding.severity == "error"
        and "Lexical only" in finding.definition
        and "{" not in finding.definition
    )
    assert [row.index for row in finding.rows] == [0, 1, 2]
    assert finding.rows[0].related == ["one.jsonl:1", "two.jsonl:2"]
    json.dumps(tables)
    assert [(table["rows_hit"], table["share"], table["train_rows"]) for table in tables] == [
        (1, 0.5, 2),
        (2, 1.0, 3),
        (0, None, 0),
    ]
    assert (
        set(tables[0]["rows_hit_by_rule"]) == set(RULES)
        and tables[0]["rows_hit_by_rule"]["exact prompt"] == 1
    )
    assert tables[0]["hits"][0] == {
        "eval": "one.jsonl:1",
        "train": "train.jsonl:1",
        "rule": "exact prompt",
        "text": "What is salt?",
        "texts": ["What is salt?", "What is salt?"],
    }


def test_hits_show_the_text_around_what_is_shared() -> None:
    """Both texts are shown as they are spelled, cut to where the shared words stand; answers where answers overlap."""
    before = text(Random(4), 400)
    train = rows([(f"{before} {QUESTION.upper()} {before}", "x"), ("Why?", f"{before}\n{ANSWER}")])
    _, (table,) = check_contamination(
        train, {"one": rows([(QUESTION, "y"), ("Who is he?", f"So: {ANSWER}")])}
    )
    (prompt, answer) = table["hits"]
    assert (prompt["rule"], answer["rule"]) == ("prompt coverage", "reference answer")
    assert prompt["texts"][0] == QUESTION and QUESTION.upper() in prompt["texts"][1]
    assert answer["texts"][0] == f"So: {ANSWER}" and answer["texts"][1].endswith(f"\n{ANSWER}")
    assert all(
        shown.startswith("... ") and len(shown) <= 1004
        for shown in (prompt["texts"][1], answer["texts"][1])
    )


def test_system_prompts_do_not_count() -> None:
    """Rows that share a long system message only are no contamination."""
    train, held_out = (
        audit_rows([example(prompt, "x", system=QUESTION)])
        for prompt in ("What is salt?", "Who wrote the poem?")
    )
    assert find_overlaps(train, held_out) == []


def test_raw_text_counts_as_a_whole() -> None:
    """Raw text rows, which have no prompt, are compared by their text."""
    train, held_out = (
        audit_rows([Example(messages=[], source="s", row=0, text=said)])
        for said in (f"{QUESTION} End.", QUESTION)
    )
    assert {hit.rule for hit in find_overlaps(train, held_out)} >= {"prompt coverage"}


def test_split_leak() -> None:
    """A near-duplicate prompt on the other side is an error; other numbers and other prompts are not."""
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
    apart = np.isin(clusters, np.unique(clusters)[::5])
    parts = [
        [row for row, chosen in zip(all_rows, apart, strict=True) if chosen == side]
        for side in (False, True)
    ]
    assert not check_split_leak(*parts).rows
    assert check_split_leak(all_rows[:100], all_rows[100:]).rows
