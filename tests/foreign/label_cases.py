"""Rows, settings and tokenizers by which label rules are compared with the tools themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from sft_recipes.data.formats import RowFormat, convert_row
from sft_recipes.foreign.label_rules.llamafactory import templates
from sft_recipes.foreign.label_rules.rows import LabelRules
from sft_recipes.foreign.label_rules.tools import label_rules
from sft_recipes.messages import Example
from tests.data.conversations import generate
from tests.data.real_tokenizers import folders
from tests.data.template_tokenizers import (
    build_metaspace_tokenizer,
    build_tokenizer,
    tokenizer_for,
)

INSTRUCTIONS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add the numbers.", "input": "1 2", "output": "3"},
    {"instruction": " Two lines:\n{braces} ", "input": "a\n\nb", "output": "\n- one\n- two\n"},
    {"instruction": "Grüße, 你好", "input": None, "output": " naïve café 🎉 "},
    {"instruction": "Repeat.", "input": "word " * 60, "output": "word " * 40},
    {"instruction": "Go on.", "input": "", "output": "and on " * 90},
]
KINDS = ("single", "multi", "system", "unicode", "near_empty", "sections", "whitespace")
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": generate(kind, seed).messages} for kind in KINDS for seed in range(2)
]


def composing(tokenizer: Any) -> Any:
    """The tokenizer, composing characters first as the real ones of Qwen do."""
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


# Tokens that templates of one family need, and the tokenizers made here that have them.
MADE = {
    "base": lambda: build_tokenizer("", "<s>", "</s>", "<pad>"),
    "metaspace": lambda: build_metaspace_tokenizer(""),
    "chatml": lambda: build_tokenizer("<|im_start|><|im_end|>", None, "<|endoftext|>", "<pad>"),
    "phi4": lambda: build_tokenizer(
        "<|im_start|><|im_sep|><|im_end|>", "<|endoftext|>", "<|im_end|>", "<|dummy_85|>"
    ),
    "llama3": lambda: tokenizer_for("llama3"),
    "llama3 base": lambda: build_tokenizer(
        "<|start_header_id|><|end_header_id|><|eot_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
    ),
    "gemma": lambda: tokenizer_for("gemma"),
    "gemma3": lambda: tokenizer_for("gemma3"),
    "qwen2_5": lambda: tokenizer_for("qwen2_5"),
    "qwen3": lambda: tokenizer_for("qwen3"),
    "qwen composed": lambda: composing(tokenizer_for("qwen2_5")),
    "phi3": lambda: tokenizer_for("phi3"),
}


@dataclass(frozen=True)
class Job:
    """Rows for a tool, and what its config says, in its own words."""

    tool: str
    tokenizer: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def rules(self) -> LabelRules:
        """The rules of the config."""
        if self.tool != "torchtune":
            return label_rules(self.tool, self.config)
        names = {key: {"_component_": f"torchtune.x.{self.config[key]}"} for key in COMPONENTS}
        names["dataset"] |= {"train_on_input": self.config.get("train_on_input")}
        names["tokenizer"] |= {"max_seq_len": self.config.get("max_seq_len")}
        return label_rules("torchtune", names)

    @property
    def examples(self) -> list[Example]:
        """The rows as this project reads them."""
        format = RowFormat("messages" if "messages" in self.rows[0] else "instruction", {})
        return [
            convert_row(row, format, "rows.jsonl", number, number + 1)
            for number, row in enumerate(self.rows)
        ]


COMPONENTS = ("dataset", "tokenizer")


def save_tokenizers(folder: Path) -> dict[str, str]:
    """The tokenizers made here, as folders that a tool can load, and the real ones that the environment names."""
    for name, make in MADE.items():
        make().save_pretrained(folder / name)
    saved = {name: str(folder / name) for name in MADE}
    return saved | {f"real {path.name}": str(path) for path in folders()}


def axolotl_jobs(names: Sequence[str]) -> Iterator[Job]:
    """Every option of the types `alpaca` and `chat_template`, over these tokenizers."""

    def job(tokenizer: str, dataset: dict[str, Any], rows: Any, **config: Any) -> Job:
        config = {"datasets": [{"path": "x", **dataset}], "sequence_len": 512, **config}
        return Job("axolotl", tokenizer, config, rows)

    for name in names:
        # A real vocabulary takes long to be hashed, which axolotl does for every row.
        rows = CONVERSATIONS[::2] if name.startswith("real") else CONVERSATIONS
        yield job(name, {"type": "alpaca"}, INSTRUCTIONS[:4])
        yield job(name, {"type": "chat_template"}, rows)
        yield job(name, {"type": "chat_template", "chat_template": "chatml"}, rows)
    alpaca = {"type": "alpaca"}
    yield job("base", alpaca, INSTRUCTIONS, train_on_inputs=True)
    for strategy in ("drop", "truncate"):
        options = {"sequence_len": 110, "excess_length_strategy": strategy}
        yield job("base", alpaca, INSTRUCTIONS, **options)
        yield job("llama3", {"type": "chat_template"}, CONVERSATIONS, **options)
    pairs = {
        "llama3": "llama3",
        "gemma": "gemma",
        "gemma3": "gemma3",
        "qwen_25": "qwen2_5",
        "qwen3": "qwen3",
    }
    for template, name in pairs.items():
        yield job(name, {"type": "chat_template"}, CONVERSATIONS, chat_template=template)
    for options in (
        {"train_on_eos": "all"},
        {"train_on_eos": "last"},
        {"train_on_eos": "none"},
        {"roles_to_train": ["gpt", "human"]},
        {"roles_to_train": [], "train_on_eos": "turn"},
        {"chat_template": "tokenizer_default_fallback_chatml"},
    ):
        yield job("qwen2_5", {"type": "chat_template", **options}, CONVERSATIONS)
    yield job("llama3", {"type": "chat_template"}, CONVERSATIONS, train_on_inputs=True)
    end = {"eot_tokens": ["<|im_end|>"]}
    yield job("chatml", {"type": "chat_template"}, CONVERSATIONS, chat_template="chatml", **end)
    eos = {"special_tokens": {"eos_token": "<|im_end|>"}}
    yield job("chatml", alpaca, INSTRUCTIONS, **eos)
    yield job("chatml", {"type": "chat_template"}, CONVERSATIONS, chat_template="chatml", **eos)
    last = {"type": "chat_template", "train_on_eot": "last"}
    yield job("chatml", last, CONVERSATIONS, chat_template="chatml", **end)


def llamafactory_jobs(names: Sequence[str]) -> Iterator[Job]:
    """Every template, and every option, over these tokenizers."""

    def job(tokenizer: str, template: str, rows: Any, **config: Any) -> Job:
        config = {"template": template, "formatting": "alpaca", **config}
        if "messages" in rows[0] and config["formatting"] == "alpaca":
            config["formatting"] = "sharegpt"
        return Job("llamafactory", tokenizer, config, rows)

    for template in templates():
        yield job("base", template, INSTRUCTIONS)
        yield job("base", template, CONVERSATIONS)
        yield job("base", template, CONVERSATIONS, mask_history=True)
        yield job("base", template, CONVERSATIONS, cutoff_len=60)
    for name in names:
        yield job(name, "alpaca", INSTRUCTIONS)
        yield job(name, "default", CONVERSATIONS)
    for template in ("qwen3", "llama3", "gemma2"):
        yield job("base", template, CONVERSATIONS, cutoff_len=90, mask_history=True)
        yield job("base", template, CONVERSATIONS, formatting="openai")
        yield job("base", template, CONVERSATIONS, default_system="Be brief.", packing=True)
    yield job("base", "qwen3", CONVERSATIONS, enable_thinking=False)
    yield job("base", "qwen", CONVERSATIONS, train_on_prompt=True, cutoff_len=100)
    reasoned = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
        for text in ("<think>\nR\n</think>\n\nSo.", "So.", "<think>\n\n</think>\n\nSo.")
    ]
    for options in ({}, {"enable_thinking": False}, {"mask_history": True}):
        yield job("qwen3", "qwen3", reasoned, **options)


def torchtune_jobs(names: Sequence[str]) -> Iterator[Job]:
    """Every tokenizer of torchtune's over a vocabulary that has its tokens."""
    vocabularies = {
        "llama3_tokenizer": ["llama3 base", "real llama3"],
        "qwen2_tokenizer": ["qwen composed", "real qwen2_5"],
        "qwen2_5_tokenizer": ["qwen composed", "real qwen2_5"],
        "gemma_tokenizer": ["gemma", "real gemma2"],
        "llama2_tokenizer": ["base", "metaspace", "real llama2"],
        "mistral_tokenizer": ["base", "metaspace"],
        "phi3_mini_tokenizer": ["phi3", "real phi3"],
        "phi4_tokenizer": ["phi4"],
    }
    for tokenizer, vocabulary in vocabularies.items():
        for name in set(vocabulary) & set(names):
            for length in (None, 60):
                alpaca = {"dataset": "alpaca_dataset", "tokenizer": tokenizer}
                chat = {"dataset": "chat_dataset", "tokenizer": tokenizer}
                limit = {"max_seq_len": length}
                yield Job("torchtune", name, alpaca | limit, INSTRUCTIONS)
                masked = {"train_on_input": False}
                yield Job("torchtune", name, alpaca | limit | masked, INSTRUCTIONS)
                yield Job("torchtune", name, chat | limit, CONVERSATIONS)
