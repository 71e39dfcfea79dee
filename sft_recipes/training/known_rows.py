"""Prepared rows, known again in a batch.

Columns do not survive packing and collation, token ids and labels do. So each document in a batch is known by a
fingerprint of both; rows that are the same in both are one row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.row_fingerprint import multipliers
from sft_recipes.data.row_table import Integers


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, one behind the other; as many places as there are tokens, since their count stays on
    the device.

    `numbers`: of each token its document. Of each document `places` says which row it is, `trained` whether it has a
    label: without one it is padding.
    """

    numbers: torch.Tensor
    places: torch.Tensor
    trained: torch.Tensor

    def sum(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """Sums of numbers of tokens over each document."""
        return _sum_by_document(of_tokens, self.numbers)


class KnownRows:
    """Rows by fingerprint. `keys` are those that occur, rising, `occurrences` how often.

    Beside their places there is one more, `len(keys)`, for documents that are no row.
    """

    def __init__(self, fingerprints: Integers, longest: int, device: torch.device) -> None:
        if device.type == "mps":  # which lacks some operations on integers
            device = torch.device("cpu")
        self.device = device
        self._factors = torch.from_numpy(multipliers(longest)).to(device)
        keys, self.occurrences = torch.unique(torch.from_numpy(fingerprints), return_counts=True)
        self.keys = keys.to(device)

    def find(self, inputs: Mapping[str, Any]) -> Documents:
        """The documents of a batch as the model gets it, padded or flattened. Never waits for the device."""
        batch = self._on_own_device(inputs)
        ids = batch["input_ids"]
        labels = batch["labels"]
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # Each token's document, counted through the batch: one begins at every position 0.
        documents = (positions == 0).flatten().cumsum(0) - 1
        terms = self._terms(ids, labels, positions)
        if "attention_mask" in batch:
            terms = terms * batch["attention_mask"].long()
        keys = _sum_by_document(terms, documents)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        is_trained = _sum_by_document((labels != IGNORE_INDEX).long(), documents) > 0
        is_known = (self.keys[places] == keys) & is_trained
        return Documents(documents, places.where(is_known, len(self.keys)), is_trained)

    def _on_own_device(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        batch = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                batch[name] = value.to(self.device)
        return batch

    def _terms(
        self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What each token adds to its document's fingerprint (`row_fingerprint.py`)."""
        factors = self._factors[positions.clamp(max=len(self._factors) - 1)]
        of_ids = (ids.long() + 1) * factors[..., 0]
        return of_ids + labels.long() * factors[..., 1]


def _sum_by_document(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    flat = values.flatten()
    return torch.zeros_like(flat).index_add_(0, documents, flat)
