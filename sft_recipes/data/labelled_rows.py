"""What becomes of examples: training rows, and rows that are dropped with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sft_recipes.data.encoding import Ids

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no equality of their own
class LabelledRow:
    """One training row.

    `spans` are the positions `start:end` that are trained, in order, none overlapping.

    `example` indexes the examples that were passed in; `turns` are the message indices trained in
    this row. `lost_tokens`: trained tokens removed with whole trailing turns by `overlength:
    truncate`. `neutralized`: text that spells control tokens was tokenized as text. `joined`: a
    token of the whole text would join the last trained turn to what stands before it.
    """

    example: int
    ids: Ids
    spans: Sequence[tuple[int, int]]
    turns: tuple[int, ...]
    lost_tokens: int = 0
    neutralized: bool = False
    joined: bool = False

    @property
    def input_ids(self) -> list[int]:
        """`ids` as a list, as a data set's column holds them."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """The id at every trained position, -100 elsewhere."""
        labels = np.full_like(self.ids, IGNORE_INDEX)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels.tolist()

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not trained, why, and how many trained tokens went with it if known."""

    example: int
    reason: str
    detail: str
    trained_tokens: int = 0


@dataclass(slots=True)
class LabelledBatch:
    """What became of a batch.

    Every example is in `rows`, in `dropped`, or in both (turns that became own rows).
    `masked_turns`: turns left untrained by `history: mask`. `stripped`: examples of which an answer
    ended in the text of an end token that was taken off.
    """

    rows: list[LabelledRow] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)
    masked_turns: int = 0
    stripped: set[int] = field(default_factory=set)
