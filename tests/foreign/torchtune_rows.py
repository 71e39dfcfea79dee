"""Run by the python of an environment with torchtune: rows as torchtune itself makes them.

Reads `[{"tokenizer": FOLDER, "config": {...}, "rows": [...]}, ...]` from stdin and writes to the file that is named as
its argument, for each row, `{"input_ids", "labels"}`, or a text where torchtune raises an error.

torchtune's tokenizers read files that few folders have beside their tokenizer.json. What they read from them is only
how a piece of text is encoded; that is taken from tokenizer.json here, all else is torchtune's.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torchtune.data import AlpacaToMessages, OpenAIToMessages
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms.tokenizers import _sentencepiece
from transformers import AutoTokenizer


class Vocabulary:
    """Stands in for SentencePiece's processor, and for the encoders of the other tokenizers."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tokenizer = CURRENT[0]

    def load(self, path: str) -> None:
        """There is no file."""

    def encode(
        self, text: str, add_bos: bool = False, add_eos: bool = False, **_: Any
    ) -> list[int]:
        assert not add_bos and not add_eos
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def bos_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    def pad_id(self) -> int | None:
        return self.tokenizer.pad_token_id

    def vocab_size(self) -> int:
        return len(self.tokenizer)


CURRENT: list[Any] = []
load = cache(AutoTokenizer.from_pretrained)
_sentencepiece.SentencePieceProcessor = Vocabulary


def model_tokenizer(name: str, max_seq_len: int | None) -> Any:
    """torchtune's tokenizer of a family over the current vocabulary."""
    family = name.removesuffix("_tokenizer").removesuffix("_mini")
    module = import_module(f"torchtune.models.{family}._tokenizer")
    special = {token.content: index for index, token in CURRENT[0].added_tokens_decoder.items()}
    if family in ("llama2", "mistral", "gemma"):
        return getattr(import_module(f"torchtune.models.{family}"), name)(
            "", max_seq_len=max_seq_len
        )
    if family == "phi3":
        return module.Phi3MiniTokenizer("", special, max_seq_len)
    if family == "phi4":
        module.GPT2BaseTokenizer = Vocabulary
        return module.Phi4Tokenizer("", "", special, max_seq_len)
    if family == "llama3":
        for token in ("<|step_id|>", "<|image|>", "<|finetune_right_pad_id|>", "<|eom_id|>"):
            special.setdefault(token, -1)
        special.setdefault("<|python_tag|>", -1)
        module.TikTokenBaseTokenizer = Vocabulary
        return module.Llama3Tokenizer("", special, max_seq_len)
    content = json.loads(CURRENT[0].backend_tokenizer.to_str())["model"]
    folder = Path(sys.argv[1]).parent
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    kind = {"qwen2": "Qwen2Tokenizer", "qwen2_5": "Qwen2_5Tokenizer"}[family]
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return getattr(module, kind)(*files, special, max_seq_len)


def to_messages(config: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The transform that a data set builder of torchtune uses."""
    train_on_input = config.get("train_on_input")
    if config["dataset"].startswith("alpaca"):
        return AlpacaToMessages(train_on_input=train_on_input is None or train_on_input)
    return OpenAIToMessages(train_on_input=bool(train_on_input))


def row_of(row: dict[str, Any], transform: Any) -> Any:
    try:
        made = transform(dict(row))
    except (ValueError, TemplateError) as error:
        return f"{type(error).__name__}: {error}"
    return {
        "input_ids": list(map(int, made["tokens"])),
        "labels": list(map(int, made["labels"])),
    }


if __name__ == "__main__":
    answers = []
    for job in json.load(sys.stdin):
        CURRENT[:] = [copy.deepcopy(load(job["tokenizer"]))]
        config = job["config"]
        tokenizer = model_tokenizer(config["tokenizer"], config.get("max_seq_len"))
        transform = SFTTransform(to_messages(config), tokenizer)
        answers.append([row_of(row, transform) for row in job["rows"]])
    Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")
