"""The loss of each data set of a mixture, from the same pass over held-out rows that gives `eval_loss`.

It is the sum of the losses of a set's tokens over their number, as if its rows were evaluated alone in one batch.
`eval_loss` stays TRL's, a mean over batches.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.mixture import RowsByDataSet
from sft_recipes.data.prepared import PreparedData
from sft_recipes.training.known_rows import KnownRows


def held_out_losses(data: PreparedData, device: torch.device) -> "DataSetLosses | None":
    """For a run's held-out rows, where they are of several data sets."""
    if data.held_out is None:
        return None
    return DataSetLosses(data.held_out, data.summary["eval"]["longest"], device)


class DataSetLosses:
    """Sums losses by row, each known by its fingerprint, and tells their mean by data set.

    A row that fills up a batch of another process was seen twice and counts once.
    """

    def __init__(self, held_out: RowsByDataSet, longest: int, device: torch.device) -> None:
        self._held_out = held_out
        self._rows = KnownRows(held_out.fingerprints, longest, device)
        self.begin()

    @property
    def names(self) -> Collection[str]:
        """The data sets that held-out rows are of."""
        return self._held_out.present().values()

    def begin(self) -> None:
        """Forget what was added."""
        # Of each row, and of what is none: the sum of its losses, its tokens, and how often it was seen.
        shape = (3, len(self._rows.keys) + 1)
        self._totals = torch.zeros(shape, dtype=torch.float64, device=self._rows.device)

    def add(self, inputs: Mapping[str, Any], losses: torch.Tensor) -> None:
        """Add a batch as the model gets it. `losses` (rows, length - 1): at each position, of the token after it."""
        documents = self._rows.find(inputs)
        of_tokens = F.pad(losses.detach(), (1, 0)).to(self._totals)
        is_counted = F.pad(inputs["labels"][:, 1:] != IGNORE_INDEX, (1, 0)).to(self._totals)
        sums = documents.sum(of_tokens)
        tokens = documents.sum(is_counted)
        seen = documents.trained.to(self._totals)
        self._totals.index_add_(1, documents.places, torch.stack([sums, tokens, seen]))

    @contextmanager
    def noting(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], loss_type: str
    ) -> Iterator[None]:
        """Inside, what TRL's fused head returns of the batch is added, as `loss_type` has it."""

        def note(_module: Any, _inputs: Any, output: Any) -> None:
            losses = -output.log_probs
            if loss_type == "dft":
                losses = losses * output.log_probs.exp()
            self.add(inputs, losses)

        with model.register_forward_hook(note):
            yield

    def by_name(self, accelerator: Any) -> dict[str, float]:
        """The losses over all ranks by the name of the data set, of those that were seen; every rank must ask."""
        totals = accelerator.reduce(self._totals.clone(), reduction="sum").cpu().numpy()
        keys = self._rows.keys.cpu().numpy()
        places = np.searchsorted(keys, self._held_out.fingerprints)
        of_rows = (totals / np.maximum(totals[2], 1))[:, places]
        losses: dict[str, float] = {}
        for number, name in self._held_out.present().items():
            own = of_rows[:, self._held_out.numbers == number]
            total, tokens = own[:2].sum(axis=1).tolist()
            if tokens:
                losses[name] = total / tokens
        return losses
