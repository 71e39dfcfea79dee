"""Which rows the model was really trained on: counted where a batch enters a training step, on every rank.

Columns do not survive packing and collation, token ids and labels do. So each document in a batch is known again by a
fingerprint of both; rows that are the same in both are one row here, to be trained as often as it occurs.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.reading.json_reader import display_path
from sft_recipes.data.row_fingerprint import multipliers
from sft_recipes.messages import place
from sft_recipes.recipe import Recipe

FILE = "consumption.npz"
SHOWN = 20


class Consumption:
    """Counts of the documents that this process trained, by row of the prepared data."""

    def __init__(self, data: PreparedData, recipe: Recipe, device: torch.device) -> None:
        device = (
            torch.device("cpu") if device.type == "mps" else device
        )  # which lacks some operations on integers
        self._stored = data.folder / "train.arrow"
        self._sources = [display_path(Path(source.path)) for source in recipe.data.datasets]
        self._factors = torch.from_numpy(multipliers(data.summary["train"]["longest"])).to(device)
        rows = torch.from_numpy(data.fingerprints)
        self.fingerprint = hashlib.sha256(
            rows.numpy().tobytes()
        ).hexdigest()  # of all rows, in their order
        self._keys, self._occurrences = torch.unique(rows, return_counts=True)
        self._keys = self._keys.to(device)
        # The last one counts documents that are no row.
        self._counts = torch.zeros(len(self._keys) + 1, dtype=torch.int64, device=device)
        self.step: list[
            torch.Tensor
        ] = []  # of each micro-step since the last optimizer step, the places in `_keys`

    def count(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count a batch as the model gets it, padded or flattened. Stays on its device and never waits for it."""
        tensors = {name: one for name, one in inputs.items() if isinstance(one, torch.Tensor)}
        inputs = {name: one.to(self._counts.device) for name, one in tensors.items()}
        ids, labels = inputs["input_ids"], inputs["labels"]
        real = inputs.get("attention_mask", torch.ones_like(ids))
        positions = inputs.get(
            "position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        )
        documents = (positions == 0).flatten().cumsum(0) - 1
        found = self._fingerprints(ids, labels, positions, documents, real)
        places = torch.searchsorted(self._keys, found).clamp(max=len(self._keys) - 1)
        places = places.where(self._keys[places] == found, len(self._keys))
        # Without a trained label it is padding, no document.
        trained = (
            torch.zeros_like(places).index_add_(
                0, documents, (labels != IGNORE_INDEX).flatten().long()
            )
            > 0
        )
        self._counts.index_add_(0, places, trained.long())
        self.step.append(places.where(trained, len(self._keys)))

    def _fingerprints(
        self, ids: Any, labels: Any, positions: Any, documents: Any, real: Any
    ) -> torch.Tensor:
        """One number for each document, in as many places as there are tokens."""
        factors = self._factors[positions.clamp(max=len(self._factors) - 1)]
        terms = ((ids.long() + 1) * factors[..., 0] + labels.long() * factors[..., 1]) * real.long()
        return torch.zeros_like(terms.flatten()).index_add_(0, documents, terms.flatten())

    @property
    def strangers(self) -> torch.Tensor:
        """Documents so far that were none of the prepared rows, on this rank: ids or labels were changed on the way."""
        return self._counts[-1]

    def total(self, accelerator: Any) -> torch.Tensor:
        """The counts of all ranks together; every rank must ask."""
        total: torch.Tensor = accelerator.reduce(self._counts.clone(), reduction="sum").cpu()
        return total

    def save(self, folder: Path, total: torch.Tensor, tokens: int) -> None:
        """Write the counts of all ranks into a checkpoint, with the tokens seen."""
        np.savez(folder / FILE, keys=self._keys.cpu().numpy(), counts=total.numpy(), tokens=tokens)

    def load(self, folder: Path, main: bool) -> int:
        """Go on counting from a checkpoint (all its counts on one rank); returns the tokens seen.

        With other data than at the checkpoint the earlier counts name no row any more: they are left out.
        """
        with np.load(folder / FILE, allow_pickle=False) as saved:
            if main and np.array_equal(saved["keys"], self._keys.cpu().numpy()):
                self._counts += torch.from_numpy(saved["counts"]).to(self._counts.device)
            return int(saved["tokens"])

    def account(self, total: torch.Tensor, epochs: float) -> dict[str, Any]:
        """What `consumption.json` says. In a broken epoch a row is due once more or not."""
        counts, epochs = total[:-1], round(epochs, 6)
        over, under = (
            counts - math.ceil(epochs) * self._occurrences,
            math.floor(epochs) * self._occurrences - counts,
        )
        odd = ((over > 0) | (under > 0)).nonzero().flatten()[:SHOWN].tolist()
        return {
            "epochs": epochs,
            "rows": int(self._occurrences.sum()),
            "times_trained": int(counts.sum()),
            "repeated": int(over.clamp(min=0).sum()),
            "left_out": int(under.clamp(min=0).sum()),
            "not_in_the_data": int(total[-1]),
            "shown": [
                {"row": name, "trained": int(counts[place])}
                for place, name in self.names(odd).items()
            ],
        }

    def names(self, places: Sequence[int]) -> dict[int, str]:
        """Source and row of each place, the first where equal rows occur several times."""
        wanted = {int(self._keys[place]): place for place in places if place < len(self._keys)}
        found: dict[int, str] = {}
        with pa.memory_map(str(self._stored)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches if wanted else ():
                keys, sources, rows = (
                    np.asarray(batch.column(name)) for name in ("fingerprint", "source", "row")
                )
                for index in np.flatnonzero(np.isin(keys, list(wanted))):
                    found.setdefault(
                        wanted[keys[index]], place(self._sources[sources[index]], int(rows[index]))
                    )
        return found

    def rows_of_step(self, guilty: Sequence[bool]) -> list[str]:
        """Names of the rows in this step's guilty micro-steps, over all ranks; every rank must ask."""
        places = [
            one.unique().tolist() for one, wrong in zip(self.step, guilty, strict=True) if wrong
        ]
        return list(
            self.names(gather_object([place for some in places for place in some])).values()
        )
