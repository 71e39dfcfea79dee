"""Real tokenizers, for those who have some: folders named by the environment, each with the templates that fit it.

SFT_RECIPES_TOKENIZERS names folders, separated by `:`, each with a tokenizer.json and a tokenizer_config.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer

from tests.data.label_oracle import Tokenizer, special_tokens
from tests.data.template_tokenizers import TEMPLATE_FOLDER

VARIABLE = "SFT_RECIPES_TOKENIZERS"
LLAMA2_TEMPLATE = Path(__file__).parent / "cases" / "llama2_chat.jinja"

# A control token that only one family has, and the template that is written for it; the first that fits counts.
FITTING = (
    ("<|start_header_id|>", TEMPLATE_FOLDER / "llama3.jinja"),
    ("<start_of_turn>", TEMPLATE_FOLDER / "gemma.jinja"),
    ("<|channel|>", TEMPLATE_FOLDER / "gptoss.jinja"),
    ("<｜Assistant｜>", TEMPLATE_FOLDER / "deepseekv3.jinja"),
    ("<think>", TEMPLATE_FOLDER / "qwen3.jinja"),
    ("<|im_start|>", TEMPLATE_FOLDER / "qwen2_5.jinja"),
    ("<|end|>", TEMPLATE_FOLDER / "phi3.jinja"),
    ("</s>", LLAMA2_TEMPLATE),
)
# Templates of this project that any tokenizer with an end of text can use.
SHIPPED = ("instruction", "alpaca", "chapter_chat")


@dataclass(frozen=True)
class Case:
    """A tokenizer folder and what a recipe would say as `chat_template`."""

    folder: Path
    chat_template: str

    def __str__(self) -> str:
        return f"{self.folder.name}-{Path(self.chat_template).stem}"


def folders() -> list[Path]:
    """The folders that the environment names."""
    return [Path(folder) for folder in os.environ.get(VARIABLE, "").split(":") if folder]


@lru_cache(maxsize=2)
def load(folder: Path, purpose: str) -> Tokenizer:
    """The tokenizer of a folder, one for each purpose: loading takes seconds, and many would fill the memory."""
    return AutoTokenizer.from_pretrained(folder)


def cases() -> list[Case]:
    """Every folder with its own template, with the one of TRL's that fits it, and with those of this project."""
    found = []
    for folder in folders():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        has_template = "chat_template" in config or (folder / "chat_template.jinja").is_file()
        templates = ["tokenizer"] if has_template else []
        tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        known = {token["content"] for token in tokens}
        templates += [str(path) for token, path in FITTING if token in known][:1]
        found += [Case(folder, template) for template in [*templates, *SHIPPED]]
    return found


def some_control_tokens(tokenizer: Tokenizer) -> list[str]:
    """The control tokens worth spelling: those that the template writes, and a few of the many reserved ones."""
    tokens = special_tokens(tokenizer)
    written = [token for token in tokens if token in str(tokenizer.chat_template)]
    return list(dict.fromkeys([*written, *tokens[:6]]))
