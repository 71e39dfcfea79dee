"""What a base answered before it went on with a section of its own making: known answers."""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.evaluation import answering
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.evaluator import evaluation_from_rows
from sft_recipes.evaluation.first_answer import first_answer, turn_tokens_of
from sft_recipes.evaluation.generation import Generation
from sft_recipes.messages import Example

INSTRUCTION = ("<bos>### Instruction:", "### Input:", "### Response:", "### Instruction:")
CHATML = ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>")
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<tool_call>"]


def first(text: str, segments: tuple[str, ...], reference: str = "48", question: str = "") -> str:
    answer = Answer(question, reference, text, "length", template_segments=segments)
    return first_answer(answer, turn_tokens_of(segments, SPECIAL))


@pytest.mark.parametrize(
    ("text", "segments", "expected"),
    [
        ("48", INSTRUCTION, "48"),
        ("48\n\n### Instruction:\nAnd now?\n\n### Response:\n12", INSTRUCTION, "48"),
        ("48, 3\n### Input:\nMore", INSTRUCTION, "48, 3"),
        # The header of the answer itself, written once more, is no answer.
        ("### Response:\n48\n\n### Instruction:\nx", INSTRUCTION, "48"),
        ("\n\n### Response:\n\n### Response:\n48", INSTRUCTION, "48"),
        # A heading of an answer is no section of the template.
        ("### Overview\nAll is well", INSTRUCTION, "### Overview\nAll is well"),
        ("48<|im_start|>user\nNext", CHATML, "48"),
        ("48\n<|im_start|>user\nNext<|im_start|>", CHATML, "48"),
        # A token that opens no turn is part of the answer.
        ("<tool_call>48", CHATML, "<tool_call>48"),
        # A role that no template wrote.
        ("48\nUser: and now?\nAssistant: 12", INSTRUCTION, "48"),
        ("", INSTRUCTION, ""),
        ("### Response:\n", INSTRUCTION, ""),
    ],
)
def test_the_answer_ends_where_the_next_section_or_role_begins(
    text: str, segments: tuple[str, ...], expected: str
) -> None:
    """Whichever comes first: a line of the template, a token that opens turns, a user's header."""
    assert first(text, segments) == expected


def test_what_the_reference_contains_ends_nothing() -> None:
    """A document that is meant to have these lines is not cut at them, nor a dialogue asked for."""
    document = "A form:\n### Input:\nyour name"
    assert first(document, INSTRUCTION, reference=document) == document
    dialogue = "Ann: hello\nUser: hi"
    assert first(dialogue, CHATML, question="Write a dialogue.") == dialogue
    marked = "48<|im_start|>x"
    assert first(marked, CHATML, reference=marked) == marked


def test_both_ways_of_scoring_one_generation(renderer: Any) -> None:
    """As it came it is wrong and cut by the budget; its first answer is right and complete, but did
    not end by itself. An answer that goes on with nothing is scored alike both ways."""
    question = {"role": "user", "content": "How many?"}
    examples = []
    for row in range(2):
        reference = {"role": "assistant", "content": "48"}
        examples.append(Example([question, reference], "test.jsonl", row))
    generations = [
        Generation([1, 2], "48\n### user:\nHow many more?", "length"),
        Generation([1], "48", "eos"),
    ]
    scorer = answering.Scorer(renderer, ["<eos>"], ("### user:", "### assistant:"), 16)
    answered = answering.Answered(scorer, examples, ["48", "48"], generations)
    came = answered.rows()
    by_first = answered.first_rows()
    assert [row["exact_match"] for row in came] == [False, True]
    assert [row["exact_match"] for row in by_first] == [True, True]
    assert by_first[0]["response"] == "48"
    assert by_first[0]["stop_reason"] == "stop_string"
    assert by_first[0]["complete"] and not by_first[0]["eos"]
    assert came[0]["flags"] and not by_first[0]["flags"]
    assert came[1] == by_first[1]
    assert evaluation_from_rows(by_first).metrics["eos_rate"].value == 0.5


def test_parts_are_joined_in_the_order_of_what_was_asked(renderer: Any) -> None:
    """What was asked in groups stands in the data's order again, each row with its own answer."""

    def part(rows: list[int]) -> answering.Answered:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
        examples = [Example(turns, "test.jsonl", row) for row in rows]
        generations = [Generation([row], f"answer {row}", "eos") for row in rows]
        scorer = answering.Scorer(renderer, ["<eos>"], (), 16)
        return answering.Answered(scorer, examples, ["x"] * len(rows), generations)

    rows = answering.joined([part([0, 3]), part([1]), part([2, 4])], [[0, 3], [1], [2, 4]]).rows()
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["response"] for row in rows] == [f"answer {row}" for row in range(5)]
