"""The weights that a process holds: their sum, and what a checkpoint of them takes."""

from typing import Any

import torch


def sum_of_trained(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Over what is trained, of this rank's part where it is partitioned. No weight that is not finite hides in it,
    and no update leaves it as it was.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64  # which MPS has not
    sums = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            held = _part_of_this_rank(parameter).detach()
            sums.append(held.sum(dtype=exact).to(device))
    return torch.stack(sums).sum()


def _part_of_this_rank(parameter: Any) -> Any:
    """What this rank holds of a parameter: FSDP2 keeps it behind `to_local`, ZeRO-3 in `ds_tensor`."""
    held = getattr(parameter, "ds_tensor", parameter)
    return held.to_local() if hasattr(held, "to_local") else held


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """About what a checkpoint takes: all weights or the adapter's, and two moments of those that are trained."""
    only_adapter = hasattr(model, "peft_config")
    total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad:
            total += size * (parameter.element_size() + 8)
        elif not only_adapter:
            total += size * parameter.element_size()
    return total
