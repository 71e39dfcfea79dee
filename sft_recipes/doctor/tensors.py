"""Tensors of files, read block by block, so that a model of any size fits into memory."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open

from sft_recipes.doctor.weight_files import Tensor

# Numbers of a block: 128 MiB in float32.
BLOCK = 2**25


class OpenFiles:
    """Files of weights, each opened once; to be used in a `with`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _file(self, tensor: Tensor) -> Any:
        path = str(tensor.file)
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, "pt"))
        return self._files[path]

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a tensor, for small ones."""
        return self._file(tensor).get_tensor(tensor.name)

    def rows(self, tensor: Tensor, span: slice) -> torch.Tensor:
        """Some rows of a tensor, as they are stored."""
        if not tensor.shape:
            return self.whole(tensor)
        return self._file(tensor).get_slice(tensor.name)[span]


def spans(tensor: Tensor) -> Iterator[slice]:
    """The rows of a tensor in parts that are no larger than a block."""
    rows = tensor.shape[0] if tensor.shape else 1
    in_row = 1
    for size in tensor.shape[1:]:
        in_row *= size
    step = max(1, BLOCK // max(1, in_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
