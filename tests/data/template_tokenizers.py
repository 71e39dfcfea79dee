"""One tokenizer per chat template, made in-process: byte-level BPE plus the control tokens the real model has.

The BPE merges runs of newlines and spaces like the real vocabularies do, because that is where token borders stop
coinciding with text borders.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE_FOLDER = Path(trl.__file__).parent / "chat_templates"
TRAINING_SUFFIX = "_training"

# Spelled in a template like `<|...|>` or `<tag>`, but plain text to the real tokenizer.
PLAIN_TEXT = re.compile(
    r"</?(?:IMPORTANT|description|enum|function|name|parameter|parameters|required|tools|type|tool_output|tool)>"
    r"|</?(?:arg_key|arg_value)>|<\|final\|>|</?SYS>"
)
TOKEN_SHAPES = re.compile(
    r"<\|[^|<>\s{}']+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|</?[a-zA-Z_]+>|\[/?[A-Z]+\]|\[gMASK\]|</s>"
)

# Added tokens that the real tokenizers do not flag as special.
NOT_SPECIAL = re.compile(r"</?(?:think|tool_call|tool_response)>")

# bos, eos, pad as in the real model's tokenizer_config.json; the longest matching prefix of the template name counts.
IDENTITIES: dict[str, tuple[str | None, str, str]] = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>"),
    "diffusion_gemma": ("<bos>", "<eos>", "<pad>"),
    "gemma": ("<bos>", "<eos>", "<pad>"),
    "glm4moe": (None, "<|endoftext|>", "<pad>"),
    "gptoss": ("<|startoftext|>", "<|return|>", "<|endoftext|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>", "<pad>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>", "<|pad|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "llava_next": ("<s>", "</s>", "<pad>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>", "<|pad|>"),
    "nemotron": ("<s>", "<|im_end|>", "<unk>"),
    "phi3": ("<s>", "<|endoftext|>", "<unk>"),
    "qwen": (None, "<|im_end|>", "<|endoftext|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<pad>"),
}

# How today's vocabularies cut text before merging: a run of line breaks is one piece, with the spaces before it.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CORPUS = [
    "You are a helpful assistant. system user assistant model tool final analysis commentary User Assistant thought",
    "### Instruction:\nWrite a haiku.\n\n### Input:\ncode\n\n### Response:\nCode flows like water\n\n\nDone.\n\n",
    "Reasoning: first  this,   then that.\n\n\n\n\tTabs and    spaces.  \n \n",
    "def add(a, b):\n    return a + b\n\n\n{'name': 'get_weather', 'arguments': {'city': 'Paris'}}\n",
    "Grüße, naïve café, 你好世界, 日本語, שלום עולם, مرحبا, Здравствуйте",
] * 20


def template_names(training: bool | None = None) -> list[str]:
    """Names of trl's templates; `training` True: only the training twins, False: only the originals, None: all."""
    names = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))
    return [
        name for name in names if training is None or name.endswith(TRAINING_SUFFIX) == training
    ]


def read_template(name: str) -> str:
    """The Jinja source of one of trl's templates."""
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def control_tokens(template: str) -> list[str]:
    """Control tokens spelled in a template, in order of appearance."""
    found = dict.fromkeys(TOKEN_SHAPES.findall(template))
    return [token for token in found if not PLAIN_TEXT.fullmatch(token)]


@cache
def base_vocabulary() -> str:
    """A byte-level BPE trained once on a few lines, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def build_tokenizer(template: str, bos: str | None, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer that has `template` attached and every control token the template spells."""
    backend = Tokenizer.from_str(base_vocabulary())
    known = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    spelled = dict.fromkeys(
        [*control_tokens(template), *(token for token in known.values() if token)]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in spelled])
    special = [token for token in spelled if not NOT_SPECIAL.fullmatch(token)]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{key: token for key, token in known.items() if token},
    )
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer for one of trl's templates (a new object per call: attaching a template changes it)."""
    return build_tokenizer(read_template(name), *IDENTITIES[identity_of(name)])


def identity_of(name: str) -> str:
    """The key of IDENTITIES that fits the name of a template."""
    return max((prefix for prefix in IDENTITIES if name.startswith(prefix)), key=len)


def build_metaspace_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the SentencePiece kind: it writes spaces as `▁` and puts one before the beginning of a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = template
    return tokenizer
