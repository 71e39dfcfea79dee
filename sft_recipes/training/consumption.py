"""Which rows the model was really trained on: counted where a batch enters a training step, on every rank.

Rows that are the same in ids and labels are one row here (`known_rows.py`), to be trained as often as it occurs.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from sft_recipes.data.prepared import TRAIN, PreparedData, open_table
from sft_recipes.data.reading.json_reader import display_path
from sft_recipes.data.row_table import column
from sft_recipes.messages import place as row_place
from sft_recipes.recipe import Recipe
from sft_recipes.training.known_rows import KnownRows
from sft_recipes.training.processes import reads_for_its_group

FILE = "consumption.npz"
SHOWN = 20


class Consumption:
    """Counts of the documents that this process trained, by row of the prepared data."""

    def __init__(self, data: PreparedData, recipe: Recipe, device: torch.device) -> None:
        self._folder = data.folder
        self._sources = [display_path(Path(source.path)) for source in recipe.data.datasets]
        # Of all rows, in their order.
        self.fingerprint = hashlib.sha256(data.fingerprints.tobytes()).hexdigest()
        self._rows = KnownRows(data.fingerprints, data.summary["train"]["longest"], device)
        # The last one counts documents that are no row.
        count = len(self._rows.keys) + 1
        self._counts = torch.zeros(count, dtype=torch.int64, device=self._rows.device)
        # Processes that share a batch would count its rows once each.
        self._counts_batches = reads_for_its_group()
        # Of each micro-step since the last optimizer step: the places of its documents.
        self.step: list[torch.Tensor] = []

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch as the model gets it, padded or flattened. Stays on its device and never waits for it."""
        documents = self._rows.find(inputs)
        if self._counts_batches:
            self._counts.index_add_(0, documents.places, documents.trained.long())
        self.step.append(documents.places)

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
        keys = self._rows.keys.cpu().numpy()
        np.savez(folder / FILE, keys=keys, counts=total.numpy(), tokens=tokens)

    def load(self, folder: Path, main: bool) -> int:
        """Go on counting from a checkpoint (all its counts on one rank); returns the tokens seen.

        With other data than at the checkpoint the earlier counts name no row any more: they are left out.
        """
        with np.load(folder / FILE, allow_pickle=False) as saved:
            if main and np.array_equal(saved["keys"], self._rows.keys.cpu().numpy()):
                self._counts += torch.from_numpy(saved["counts"]).to(self._counts.device)
            return int(saved["tokens"])

    def account(self, total: torch.Tensor, epochs: float) -> dict[str, Any]:
        """What `consumption.json` says. In a broken epoch a row is due once more or not."""
        epochs = round(epochs, 6)
        counts = total[:-1]
        repeated = (counts - math.ceil(epochs) * self._rows.occurrences).clamp(min=0)
        left_out = (math.floor(epochs) * self._rows.occurrences - counts).clamp(min=0)
        odd = (repeated + left_out).nonzero().flatten()[:SHOWN].tolist()
        shown = []
        for place, name in self.names(odd).items():
            shown.append({"row": name, "trained": int(counts[place])})
        return {
            "epochs": epochs,
            "rows": int(self._rows.occurrences.sum()),
            "times_trained": int(counts.sum()),
            "repeated": int(repeated.sum()),
            "left_out": int(left_out.sum()),
            "not_in_the_data": int(total[-1]),
            "shown": shown,
        }

    def names(self, places: Sequence[int]) -> dict[int, str]:
        """Source and row of each place, the first where equal rows occur several times."""
        place_of_key = {}
        for place in places:
            if place < len(self._rows.keys):
                place_of_key[int(self._rows.keys[place])] = place
        names: dict[int, str] = {}
        if not place_of_key:
            return names
        wanted = list(place_of_key)
        table = open_table(self._folder, TRAIN)
        keys, sources, rows = (column(table, name) for name in ("fingerprint", "source", "row"))
        for index in np.flatnonzero(np.isin(keys, wanted)):
            name = row_place(self._sources[sources[index]], int(rows[index]))
            names.setdefault(place_of_key[int(keys[index])], name)
        return names

    def rows_of_step(self, guilty: Sequence[bool]) -> list[str]:
        """Names of the rows in this step's guilty micro-steps, over all ranks; every rank must ask."""
        places: list[int] = []
        for micro_step, is_guilty in zip(self.step, guilty, strict=True):
            if is_guilty:
                places += micro_step.unique().tolist()
        return list(self.names(gather_object(places)).values())
