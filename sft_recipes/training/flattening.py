"""Batches flattened to one sequence without padding: do rows stay apart in them, and is it faster?"""

from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

# Attention that isolates rows gave differences of 2e-7 in float32 on every backend tried; leaks are far larger.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def keeps_rows_apart(model: Any, pad_token_id: int) -> bool:
    """Whether a row's logits are the same alone and after another row in one flattened batch.

    Two rows of 6 and 5 tokens; the first is changed and the second must not notice. Attention masks made from
    position ids do this; recurrent layers without sequence boundaries do not.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)
    size = model.get_input_embeddings().weight.shape[0]
    second = [index % size for index in (5, 3, 9, 4, 7)]
    firsts = (
        [index % size for index in (2, 8, 6, 3, 5, 9)],
        [index % size for index in (7, 1, 4, 9, 8, 2)],
    )
    was_training = model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for first in firsts:
            batch = collator([{"input_ids": row, "labels": row} for row in (first, second)])
            batch.pop("labels")
            inputs = send_to_device(batch, model.device)
            logits.append(model(**inputs, use_cache=False).logits[0, len(first) :])
    model.train(was_training)
    difference = (logits[0] - logits[1]).abs().max().item()
    return difference <= TOLERANCE.get(logits[0].dtype, 1e-1)


def flattening_pays(model: Any, rows: Dataset, batch_size: int) -> bool:
    """Whether flattened batches need fewer floating-point operations than padded ones, on a sample of the rows.

    Padding wastes `batch x longest - sum` tokens in every matrix; a flattened batch of T tokens wastes attention,
    which without special kernels is computed for all T x T pairs and then masked.
    """
    config = model.config.get_text_config()
    body = model.num_parameters(exclude_embeddings=True)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    generator = np.random.default_rng(0)
    picked = rows.select(generator.integers(len(rows), size=64 * batch_size)).with_format("arrow")[
        :
    ]
    # As floats: operations of a real model do not fit the integers of the column.
    lengths = np.asarray(
        picked.column("input_ids").combine_chunks().value_lengths(), dtype=np.float64
    )
    lengths = lengths.reshape(64, batch_size)
    longest, total = lengths.max(axis=1), lengths.sum(axis=1)
    padded = 2 * body * longest * batch_size + attention * batch_size * longest**2
    flat = 2 * body * total + attention * total**2
    return bool(flat.sum() < padded.sum())
