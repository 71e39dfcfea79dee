"""The loss of prepared rows under a model, row by row; a model is asked for each row once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.row_table import Integers

TOKENS_A_BATCH = 4096


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Of each row the sum of its losses, and how many tokens it is of."""

    sums: npt.NDArray[np.float64]
    tokens: Integers

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """The mean loss a trained token; 0 for a row without any."""
        return self.sums / np.maximum(self.tokens, 1)


def row_losses(model: Any, rows: Dataset, lengths: Integers, title: str, shown: bool) -> RowLosses:
    """The losses of rows (input_ids, labels); every process computes its share, all get the result."""
    state = PartialState()
    batches = list(_batches(lengths))[state.process_index :: state.num_processes]
    hidden = None if shown and state.is_main_process else True
    own: list[tuple[int, float, int]] = []
    for places in tqdm(batches, desc=title, disable=hidden, leave=False):
        batch = rows[places]
        losses = _losses_of_batch(model, batch["input_ids"], batch["labels"])
        own += zip(places.tolist(), losses.sums.tolist(), losses.tokens.tolist(), strict=True)
    of_all = RowLosses(np.zeros(len(lengths)), np.zeros(len(lengths), dtype=np.int64))
    for index, total, tokens in gather_object(own):
        of_all.sums[index] = total
        of_all.tokens[index] = tokens
    return of_all


def _batches(lengths: Integers) -> Iterator[Integers]:
    """Places of rows of like length, so many that they have about `TOKENS_A_BATCH` tokens."""
    # Longest first: what does not fit into memory fails at once.
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, TOKENS_A_BATCH // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def _losses_of_batch(
    model: Any, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> RowLosses:
    longest = max(map(len, ids))
    shape = (len(ids), longest)
    inputs = torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, IGNORE_INDEX)
    mask = torch.zeros(shape, dtype=torch.long)
    for number, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        inputs[number, : len(row_ids)] = torch.tensor(row_ids)
        mask[number, : len(row_ids)] = 1
        # A position predicts the token after it.
        targets[number, : len(row_ids) - 1] = torch.tensor(row_labels[1:])
    targets = targets.to(model.device)
    is_trained = targets != IGNORE_INDEX
    # Logits of all positions would take gigabytes of a large vocabulary.
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, hidden: (hidden[0][is_trained], *hidden[1:])):
        output = model(
            input_ids=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
        )
    of_tokens = F.cross_entropy(output.logits.float(), targets[is_trained], reduction="none")
    row_of_token = is_trained.nonzero()[:, 0]
    sums = torch.zeros(len(ids), device=of_tokens.device).index_add_(0, row_of_token, of_tokens)
    return RowLosses(sums.double().cpu().numpy(), is_trained.sum(dim=1).cpu().numpy())
