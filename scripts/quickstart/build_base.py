"""Build the quickstart's base model: train its tokenizer, pretrain it on generated text, save it.

    python scripts/quickstart/build_base.py                                   # rewrites recipes/quickstart/base
    python scripts/quickstart/build_base.py --steps 150 --hidden 64 --heads 4 --output runs/base   # reduced

One document a row, and drills first: in an earlier trial, packed rows at 3e-3 had learned no copying after 6M tokens.
"""

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretraining_text import documents
from tasks import (
    CITIES,
    GIFTS,
    INSTRUCTIONS,
    KINDS,
    NAMES,
    NUMBERS,
    OPPOSITE_OF,
    PLACES,
    THINGS,
    WISHES,
)

OUTPUT = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "base"
EOS, PAD = "<|endoftext|>", "<|pad|>"
IGNORED = -100  # label that cross_entropy leaves out
ENTITIES = (
    *THINGS,
    *KINDS,
    *OPPOSITE_OF,
    *NAMES,
    *PLACES,
    *CITIES,
    *GIFTS,
    *WISHES,
    *map(str, NUMBERS),
)
# Words that shall be one token: the entities, what instructions and their template are made of, and questions.
WORDS = sorted(
    {
        *ENTITIES,
        *re.findall(r"\w+", " ".join(INSTRUCTIONS)),
        *("Instruction", "Input", "Response"),
        *("Who", "who", "person", "Where", "where", "In", "which", "place", "Find"),
    }
)


@dataclass(frozen=True)
class Plan:
    """Size of the model and length of its pretraining; the first `drills` documents only repeat lists."""

    hidden: int = 160
    layers: int = 4
    heads: int = 10
    vocabulary: int = 1280
    steps: int = 5600
    tokens_per_step: int = 1024
    drills: int = 12_000
    learning_rate: float = 2e-3
    seed: int = 1


def train_tokenizer(plan: Plan, n_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word is the same token wherever it stands.

    Text is cut into words, line breaks, and what stands between words, so that "pear" after a quote, a space or a
    line break is one and the same token; with GPT-2's cut, " pear" and "pear" would have to be learned apart.
    """
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"\w+|\n+|[^\w\n]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(documents(plan.seed), n_documents)
    # The words are counted in again, so that the rarest of them becomes one token too.
    tokenizer.train_from_iterator(itertools.chain(texts, [" ".join(WORDS)] * 2_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def split_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Those of `WORDS` that are more than one token; none at the default vocabulary."""
    return [word for word in WORDS if len(tokenizer.encode(word)) != 1]


def batches(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> Iterator[list[list[int]]]:
    """Endless batches of token ids, each of documents of about one length, together about `tokens_per_step` tokens.

    Drawn 4,000 documents at a time and sorted by length, so that hardly anything is padding.
    """
    rng = random.Random(plan.seed)
    stream = documents(plan.seed + 1, plan.drills)
    while True:
        ids = tokenizer(list(itertools.islice(stream, 4_000)))["input_ids"]
        ids.sort(key=len)
        groups: list[list[list[int]]] = [[]]
        for row in ids:
            if groups[-1] and len(row) * (len(groups[-1]) + 1) > plan.tokens_per_step:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from groups


def to_tensors(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), each (rows, longest); padded on the right, which causal attention never sees."""
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
    return inputs, labels


def new_model(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.hidden,
            intermediate_size=plan.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            # The usual 0.02 suits wide models. In a trial on drills it copied 8 % of words after 0.48M tokens;
            # this width's own scale copied 39 % after 0.17M.
            initializer_range=plan.hidden**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def rate_at(step: int, plan: Plan) -> float:
    """Share of the learning rate: 100 steps of warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Plan
) -> list[float]:
    """Next-token loss over all positions, in nats a token; returns it step by step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, plan))
    losses: list[float] = []
    began, tokens = time.perf_counter(), 0
    for step, rows in enumerate(itertools.islice(batches(tokenizer, plan), plan.steps), start=1):
        inputs, labels = to_tensors(rows, tokenizer.pad_token_id)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(map(len, rows))
        if step % 100 == 0:
            mean, seconds = sum(losses[-100:]) / 100, time.perf_counter() - began
            print(
                f"step {step}/{plan.steps}  loss {mean:.3f}  {tokens / 1e6:.2f}M tokens  {seconds:.0f} s",
                flush=True,
            )
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Weights in bfloat16 (half the size; the README's scores are those of the saved weights) and tokenizer."""
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Command line; returns the losses, for the test that rebuilds a reduced base."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the saved base was built with one"
    )
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    output: Path = options.pop("output")
    torch.set_num_threads(options.pop("threads"))
    plan = Plan(**options)
    began = time.perf_counter()
    tokenizer = train_tokenizer(plan)
    print(f"vocabulary {len(tokenizer)}, words of more than one token: {split_words(tokenizer)}")
    model = new_model(tokenizer, plan)
    print(f"{model.num_parameters():,} parameters; {json.dumps(asdict(plan))}")
    losses = pretrain(model, tokenizer, plan)
    save(model, tokenizer, output)
    print(f"saved to {output} after {time.perf_counter() - began:.0f} s")
    return losses


if __name__ == "__main__":
    main()
