"""What other tools train of a row, known by hand; the tools themselves are asked in other tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.foreign.label_rules.comparison import LabelComparison, compare_labels
from sft_recipes.foreign.label_rules.display import difference_json, show_difference
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    LabelRules,
    NotComputed,
    TheirRow,
    their_rows,
)
from sft_recipes.foreign.label_rules.tools import label_rules
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.label_oracle import trained_texts
from tests.data.template_tokenizers import build_tokenizer, tokenizer_for

TWO_TURNS = Example(
    [
        {"role": "user", "content": "Name a colour, please."},
        {"role": "assistant", "content": "Blue is one."},
        {"role": "user", "content": "Another one now."},
        {"role": "assistant", "content": "Red it is, then."},
    ],
    "rows.jsonl",
    0,
    line=1,
)
TASK = {"role": "user", "content": "Add.\n\n1 2 3", "instruction": "Add.", "input": "1 2 3"}
INSTRUCTION = Example([TASK, {"role": "assistant", "content": "The sum is six."}], "rows.jsonl", 1)
TOOL = Example([*TWO_TURNS.messages], "rows.jsonl", 2, tools=[{"type": "function"}])


def axolotl(**keys: Any) -> LabelRules:
    """The rules of a config with one data set; keys that are a data set's are found there, too."""
    return label_rules("axolotl", {"datasets": [{"path": "x"}], **keys})


def llamafactory(**keys: Any) -> LabelRules:
    """The rules of a config."""
    return label_rules("llamafactory", keys)


def torchtune(tokenizer: str, dataset: str, **keys: Any) -> LabelRules:
    """The rules of a config."""
    components = {
        "dataset": {"_component_": f"torchtune.datasets.{dataset}", **keys},
        "tokenizer": {"_component_": f"torchtune.models.x.{tokenizer}", **keys},
    }
    return label_rules("torchtune", components)


def base() -> Any:
    return build_tokenizer("", "<s>", "</s>", "<pad>")


def texts(tokenizer: Any, rules: LabelRules, example: Example) -> tuple[str, list[str]]:
    """The text of a row and of its trained runs."""
    (row,) = their_rows([example], tokenizer, rules)
    assert isinstance(row, TheirRow), row
    return tokenizer.decode(row.input_ids), trained_texts(tokenizer, (row.input_ids, row.labels))


def compared(
    tokenizer: Any, rules: LabelRules, *examples: Example, template: str | None = None
) -> tuple[ChatRenderer, LabelComparison]:
    """Our rows of the examples beside the tool's."""
    theirs = their_rows(examples, tokenizer, rules)
    own = copy.deepcopy(tokenizer)
    labeller = Labeller(attach_chat_template(own, TemplateSettings(template)), LabelSettings())
    ours = labeller.label(examples)
    return labeller.renderer, compare_labels(examples, ours, theirs, labeller.renderer, rules)


def words(tokenizer: Any, rules: LabelRules, example: Example, template: str | None = None) -> Any:
    """What differs, in words."""
    _, comparison = compared(tokenizer, rules, example, template=template)
    return [list(difference.words) for difference in comparison.differences]


# -- what each tool makes --------------------------------------------------------------------------


def test_axolotl_alpaca() -> None:
    """The Alpaca prompt untrained, then the answer with EOS."""
    text, trained = texts(base(), axolotl(type="alpaca"), INSTRUCTION)
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2 3\n\n### Response:\nThe sum is six.</s>"
    )
    assert trained == ["The sum is six.</s>"]
    assert texts(base(), axolotl(type="alpaca", train_on_inputs=True), INSTRUCTION)[1] == [text]


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, ["Blue is one.<|im_end|>", "Red it is, then.<|im_end|>"]),
        ({"train_on_eos": "last"}, ["Blue is one.", "Red it is, then.<|im_end|>"]),
        ({"train_on_eos": "none"}, ["Blue is one.", "Red it is, then."]),
        (
            {"roles_to_train": ["human"]},
            ["Name a colour, please.<|im_end|>", "Another one now.<|im_end|>"],
        ),
    ],
)
def test_axolotl_chat_template(keys: dict[str, Any], trained: list[str]) -> None:
    """Contents of the trained roles, and the end of the turns that `train_on_eos` names."""
    rules = axolotl(type="chat_template", **keys)
    assert texts(tokenizer_for("qwen2_5"), rules, TWO_TURNS)[1] == trained


def test_axolotl_drops_or_cuts_long_rows() -> None:
    """By default a row longer than `sequence_len` is left out; `truncate` keeps its beginning."""
    rules = {"type": "alpaca", "sequence_len": 99}
    (dropped,) = their_rows([INSTRUCTION], base(), axolotl(**rules))
    assert isinstance(dropped, DroppedThere) and "sequence_len is 99" in dropped.reason
    (row,) = their_rows([INSTRUCTION], base(), axolotl(**rules, excess_length_strategy="truncate"))
    assert isinstance(row, TheirRow) and row.whole is not None
    assert row.input_ids == row.whole.input_ids[:99]


def test_llamafactory_joins_instruction_and_input_by_a_line_break() -> None:
    """Its Alpaca template knows no input section; EOS and two line breaks are trained."""
    text, trained = texts(base(), llamafactory(template="alpaca"), INSTRUCTION)
    assert "### Instruction:\nAdd.\n1 2 3\n\n### Response:\nThe sum is six.</s>\n\n" in text
    assert trained == ["The sum is six.</s>\n\n"]


def test_llamafactory_cuts_questions_and_answers() -> None:
    """`cutoff_len` cuts the end of the longer side: of a long answer the end, EOS with it."""
    long = Example([TWO_TURNS.messages[0], {"role": "assistant", "content": "on " * 90}], "x", 0)
    (row,) = their_rows([long], base(), llamafactory(template="default", cutoff_len=80))
    assert isinstance(row, TheirRow) and row.whole is not None
    assert len(row.input_ids) == 80 and row.input_ids == row.whole.input_ids[:80]
    assert base().eos_token_id not in row.labels


def test_llamafactory_writes_a_system_prompt_into_rows_of_the_openai_format() -> None:
    """Its converter of `formatting: openai` adds one to every row without tools."""
    rules = llamafactory(template="chatml", formatting="openai")
    tokenizer = build_tokenizer("<|im_start|><|im_end|>", None, "</s>", "<pad>")
    text, _ = texts(tokenizer, rules, TWO_TURNS)
    assert text.startswith("<|im_start|>system\ndetailed thinking off<|im_end|>\n")


def test_llamafactory_trains_the_empty_think_block() -> None:
    """Under a reasoning template answers without reasoning begin with an empty block, and it is learned."""
    _, trained = texts(tokenizer_for("qwen3"), llamafactory(template="qwen3"), TWO_TURNS)
    assert trained[0] == "<think>\n\n</think>\n\nBlue is one.<|im_end|>\n"


def test_torchtune_trains_the_alpaca_prompt_inside_a_chat() -> None:
    """By default the whole prompt is trained, in the user's turn of the model's own format."""
    rules = torchtune("qwen2_5_tokenizer", "alpaca_dataset")
    text, trained = texts(tokenizer_for("qwen2_5"), rules, INSTRUCTION)
    assert text.startswith("<|im_start|>user\nBelow is an instruction")
    assert trained == [text]


def test_torchtune_never_trains_an_end_for_phi4() -> None:
    """No answer ends in `<|im_end|>`; the header before it is trained."""
    tokenizer = build_tokenizer("<|im_start|><|im_sep|><|im_end|>", None, "<|endoftext|>", "<pad>")
    rules = torchtune("phi4_tokenizer", "chat_dataset")
    assert texts(tokenizer, rules, TWO_TURNS)[1] == [
        "<|im_start|>assistant<|im_sep|>Blue is one.",
        "<|im_start|>assistant<|im_sep|>Red it is, then.",
    ]


def test_torchtune_masks_the_end_for_qwen_under_a_length_limit() -> None:
    """With `max_seq_len` the last token of every row is masked, however short the row is."""
    rules = torchtune("qwen2_5_tokenizer", "chat_dataset", max_seq_len=500)
    assert texts(tokenizer_for("qwen2_5"), rules, TWO_TURNS)[1][-1].endswith("Red it is, then.")


@pytest.mark.parametrize(
    ("rules", "example", "reason"),
    [
        (axolotl(type="sharegpt"), TWO_TURNS, "type 'sharegpt' is not known"),
        (axolotl(type="alpaca"), TWO_TURNS, "reads an instruction"),
        (axolotl(chat_template="falcon_h1"), TWO_TURNS, "'falcon_h1' is not known"),
        (axolotl(), TOOL, "tool calls"),
        (llamafactory(template="glm4"), TWO_TURNS, "glm4 is not known"),
        (llamafactory(), TWO_TURNS, "taken from the tokenizer"),
        (torchtune("x_tokenizer", "chat_dataset"), TWO_TURNS, "'x_tokenizer' is not known"),
        (
            torchtune("gemma_tokenizer", "samsum_dataset"),
            TWO_TURNS,
            "'samsum_dataset' is not known",
        ),
    ],
)
def test_what_is_not_known_is_said(rules: LabelRules, example: Example, reason: str) -> None:
    """No row is guessed: what no rule covers is named."""
    (outcome,) = their_rows([example], base(), rules)
    assert isinstance(outcome, NotComputed) and reason in outcome.reason


def test_the_tokenizer_is_left_as_it_was() -> None:
    """LLaMA-Factory adds tokens and replaces EOS, on a copy."""
    tokenizer = base()
    before = (len(tokenizer), tokenizer.eos_token)
    their_rows([TWO_TURNS], tokenizer, llamafactory(template="llama3"))
    assert (len(tokenizer), tokenizer.eos_token) == before


# -- what differs, in words ------------------------------------------------------------------------


def test_the_same_rows_differ_in_nothing() -> None:
    """axolotl's defaults on a model whose EOS ends its turns, and its Alpaca rows under our template."""
    assert words(tokenizer_for("qwen2_5"), axolotl(type="chat_template"), TWO_TURNS) == []
    assert words(base(), axolotl(type="alpaca"), INSTRUCTION, template="alpaca") == []


@pytest.mark.parametrize(
    ("tokenizer", "rules", "expected"),
    [
        ("qwen2_5", axolotl(train_on_inputs=True), ["axolotl trains the prompt, too: "]),
        ("qwen2_5", axolotl(train_on_eos="none"), ["axolotl never trains the end of the answer"]),
        ("qwen2_5", axolotl(sequence_len=50), ["axolotl makes no row of it: "]),
        (
            "qwen2_5",
            axolotl(sequence_len=85, excess_length_strategy="truncate"),
            ["axolotl cuts the row to 85 tokens: "],
        ),
        ("qwen2_5", axolotl(chat_template="chatml"), ["axolotl writes another text: "]),
        (
            "qwen3",
            llamafactory(template="qwen3_nothink", mask_history=True),
            ["LLaMA-Factory does not train answer 1"],
        ),
        (
            "qwen2_5",
            torchtune("qwen2_5_tokenizer", "chat_dataset"),
            ["torchtune writes another text: ", "torchtune trains '<|im_start|>assistant"],
        ),
        ("qwen2_5", label_rules("trl", {}), ["TRL trains the prompt, too: "]),
        (
            "gemma3",
            label_rules("trl", {"assistant_only_loss": True}),
            ["TRL trains '…<end_of_turn>"],
        ),
    ],
)
def test_differences_are_said(tokenizer: str, rules: LabelRules, expected: Sequence[str]) -> None:
    """Each way to differ has its sentence."""
    (found,) = words(tokenizer_for(tokenizer), rules, TWO_TURNS)
    for beginning in expected:
        assert any(sentence.startswith(beginning) for sentence in found), found


def test_a_row_is_shown_both_ways() -> None:
    """For people: the place, both rows, the sentences; for programs: ids and labels of both."""
    rules = axolotl(train_on_inputs=True)
    renderer, comparison = compared(tokenizer_for("qwen2_5"), rules, TWO_TURNS, TOOL)
    assert comparison.not_computed == ["how other tools write tool calls is not followed here"]
    (difference,) = comparison.differences
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        show_difference(renderer, difference, rules.tool, console)
    shown = capture.get()
    assert shown.count("Blue is one.<|im_end|>") == 2
    assert "rows.jsonl:1" in shown and "axolotl:" in shown and "here:" in shown
    assert "- axolotl trains the prompt, too: " in shown
    record = json.loads(json.dumps(difference_json(renderer, difference, rules.tool)))
    assert (record["row"], record["source"], record["tool"]) == (0, "rows.jsonl", "axolotl")
    assert record["theirs"]["input_ids"] == record["ours"]["input_ids"]
    assert record["theirs"]["labels"].count(-100) < record["ours"]["labels"].count(-100)
    assert record["differs"] == list(difference.words)
