"""The label rules of TRL against its own SFTTrainer: what it prepares, and what its collator hands to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from trl import SFTConfig, SFTTrainer

from sft_recipes.data.formats import RowFormat, convert_row
from sft_recipes.foreign.label_rules.rows import DroppedThere, TheirOutcome, TheirRow, their_rows
from sft_recipes.foreign.label_rules.tools import label_rules
from tests.conftest import build_model
from tests.data.template_tokenizers import build_tokenizer, tokenizer_for
from tests.foreign.label_cases import CONVERSATIONS

PAIRS = [
    {"prompt": "Name a colour: ", "completion": "blue"},
    {"prompt": "Add 1 and 2.", "completion": "\n3"},
    {"prompt": "Go on.", "completion": "and on " * 40},
]
TURN_PAIRS = [
    {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CONVERSATIONS
]
TEXTS = [{"text": "A text."}, {"text": "Another one.</s>"}, {"text": "long " * 60}]


def plain() -> Any:
    return build_tokenizer("", "<s>", "</s>", "<pad>")


# name -> tokenizer, rows, keys of the config, what the rules are told of the rows
CASES: dict[str, tuple[Callable[[], Any], Sequence[Mapping[str, Any]], dict[str, Any], str]] = {
    "conversations": (lambda: tokenizer_for("llama3"), CONVERSATIONS, {}, "messages"),
    "cut conversations": (
        lambda: tokenizer_for("qwen3"),
        CONVERSATIONS,
        {"max_length": 40},
        "messages",
    ),
    "assistant only": (
        lambda: tokenizer_for("qwen3"),
        CONVERSATIONS,
        {"assistant_only_loss": True, "max_length": 60},
        "messages",
    ),
    "pairs": (plain, PAIRS, {"max_length": None}, "prompt_completion"),
    "cut pairs": (plain, PAIRS, {"max_length": 20}, "prompt_completion"),
    "whole pairs": (plain, PAIRS, {"completion_only_loss": False}, "prompt_completion"),
    "pairs of turns": (lambda: tokenizer_for("gemma3"), TURN_PAIRS, {}, "turns"),
    "texts": (plain, TEXTS, {"max_length": 50}, "raw"),
    "another EOS": (
        lambda: build_tokenizer("<|im_start|><|im_end|>", None, "</s>", "<pad>"),
        TEXTS,
        {"eos_token": "<|im_end|>"},
        "raw",
    ),
}


def prepared(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, Any], folder: Path
) -> list[TheirOutcome]:
    """Each row as TRL prepares and collates it, alone, so that what it drops is seen."""
    arguments = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        **keys,
    )
    trainer = SFTTrainer(
        model=build_model(len(tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
    )
    kept = iter(trainer.train_dataset)
    made: list[TheirOutcome] = []
    for row in rows:
        alone = trainer._prepare_dataset(
            Dataset.from_list([dict(row)]), tokenizer, arguments, False, None, "one"
        )
        if len(alone) == 0:
            made.append(DroppedThere("by TRL"))
            continue
        batch = trainer.data_collator([next(kept)])
        made.append(TheirRow(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return made


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_trl(name: str, tmp_path: Path) -> None:
    """Ids and labels are what TRL's trainer hands to the model, and dropped rows are those that it drops."""
    make, rows, keys, kind = CASES[name]
    format = {"turns": "prompt_completion"}.get(kind, kind)
    examples = [
        convert_row(row, RowFormat(format, {}), "rows.jsonl", number, number + 1)
        for number, row in enumerate(rows)
    ]
    rules = label_rules("trl", {**keys, "format": format, "turns": kind == "turns"})
    ours = their_rows(examples, make(), rules)
    theirs = prepared(make(), rows, keys, tmp_path)
    for number, (computed, made) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(made, DroppedThere):
            assert isinstance(computed, DroppedThere), number
        else:
            assert isinstance(computed, TheirRow), (number, computed)
            assert (computed.input_ids, computed.labels) == (made.input_ids, made.labels), number
