"""What is seen of the tensors of files when each is read once: no numbers, zeros, no change."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from sft_recipes.doctor.tensors import OpenFiles, spans
from sft_recipes.doctor.weight_files import Tensor


@dataclass
class TensorFacts:
    """What was seen of a tensor. `equals_base`: None where the base has none of that name and shape."""

    tensor: Tensor
    nans: int = 0
    infinities: int = 0
    is_zero: bool = True
    equals_base: bool | None = None


def survey(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], progress: bool
) -> list[TensorFacts]:
    """Read tensors, and beside each the one of that name of the base, block by block."""
    facts: list[TensorFacts] = []
    bar = tqdm(tensors.values(), "reading weights", disable=not progress, leave=False)
    with OpenFiles() as files:
        for tensor in bar:
            if tensor.is_float and 0 not in tensor.shape:
                facts.append(_facts(files, tensor, base.get(tensor.name)))
    return facts


def _facts(files: OpenFiles, tensor: Tensor, before: Tensor | None) -> TensorFacts:
    facts = TensorFacts(tensor)
    if before is not None and before.shape == tensor.shape and before.is_float:
        facts.equals_base = True
    for span in spans(tensor):
        block = files.rows(tensor, span)
        facts.nans += int(block.isnan().sum())
        facts.infinities += int(block.isinf().sum())
        facts.is_zero = facts.is_zero and not block.any()
        if before is not None and facts.equals_base:
            # In the run's own precision: rounding alone is no training.
            facts.equals_base = torch.equal(block, files.rows(before, span).to(block.dtype))
    return facts
