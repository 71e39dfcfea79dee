"""Our `alpaca` template, by texts written out: it is Stanford Alpaca's prompt as axolotl writes it.

With axolotl at hand `tests/foreign/test_tools_themselves.py` compares it with axolotl's own.
"""

from __future__ import annotations

from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.formats import RowFormat, convert_row
from sft_recipes.data.labels import Labeller
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.label_oracle import trained_texts
from tests.data.template_tokenizers import build_tokenizer

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ROW = {"instruction": "Add.", "output": "Three."}
CASES = {
    "without input": (ROW, f"{WITHOUT_INPUT}### Instruction:\nAdd.\n\n### Response:\nThree.</s>"),
    "an empty input": (
        ROW | {"input": ""},
        f"{WITHOUT_INPUT}### Instruction:\nAdd.\n\n### Response:\nThree.</s>",
    ),
    "with input": (
        ROW | {"input": "1 2"},
        f"{WITH_INPUT}### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\nThree.</s>",
    ),
    "a system prompt": (
        ROW | {"input": "1 2", "system": "Be brief."},
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\nThree.</s>",
    ),
    "a history": (
        ROW | {"history": [["Hi", "Hello"]]},
        f"{WITHOUT_INPUT}### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
        "### Instruction:\nAdd.\n\n### Response:\nThree.</s>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_alpaca_prompt(name: str) -> None:
    """Byte for byte; answers are trained through EOS, and nothing else is."""
    row, text = CASES[name]
    tokenizer: Any = build_tokenizer("", "<s>", "</s>", "<pad>")
    renderer = attach_chat_template(tokenizer, TemplateSettings("alpaca"))
    example = convert_row(row, RowFormat("instruction", {}), "rows.jsonl", 0, 1)
    (labelled,) = Labeller(renderer, LabelSettings()).label([example]).rows
    assert tokenizer.decode(labelled.input_ids) == text
    trained = trained_texts(tokenizer, (labelled.input_ids, labelled.labels))
    assert trained[-1] == "Three.</s>"
    assert len(trained) == text.count("### Response:")
