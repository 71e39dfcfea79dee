"""Floating-point operations of a training step, and their share of a device's peak (MFU).

No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.gpu.shapes import ModelShape

# Dense bfloat16 operations a second, by a pattern of torch's device name. From the vendor's data
# sheets, whose headline figures are often twice as high, for sparse matrices. The PCIe and NVL
# boards of the H series are slower and not listed.
PEAKS = {
    r"\bH[12]00\b(?!.*(PCIe|NVL))": 989e12,
    r"\bA100\b": 312e12,
    r"\bL4\b": 121e12,
    r"\bL40S\b": 362e12,
    r"\bRTX 4090$": 165e12,
}

FORMULA = (
    "FLOP a token: (2 + B) x body parameters + (2 + B) x head parameters x share of trained tokens"
    " + 6 x adapter parameters + 6 x layers x hidden size x (sum of squared row lengths / tokens);"
    " B is 4 where all weights are trained, 2 where they are frozen; recomputation is not counted"
)


@dataclass(frozen=True, slots=True)
class Work:
    """What the operations of a step follow from.

    `adapter`: parameters of LoRA, 0 where all weights are trained. `squares`: the sum of squared
    lengths of the rows that hold `tokens` tokens, `trained` of them with a label.
    """

    model: ModelShape
    adapter: int
    tokens: int
    trained: int
    squares: int


def body_parameters(model: ModelShape) -> int:
    """Parameters of a Llama without embeddings and output layer."""
    head = model.hidden // model.heads
    attention = 2 * model.hidden * (model.heads + model.kv_heads) * head
    feed_forward = 3 * model.hidden * model.intermediate
    norms = 2 * model.hidden
    return model.layers * (attention + feed_forward + norms) + model.hidden


def flop_per_token(work: Work) -> float:
    """Operations that a token costs in a forward and a backward pass, by `FORMULA`.

    A product with a weight is 2 operations a parameter forward, 2 backward for what came in, 2 more
    for the weight's own gradient, which frozen weights do not need. Causal attention multiplies
    twice over half of a row's square: 2 x length^2 x hidden size forward, twice that backward.
    Logits are computed at trained positions only.
    """
    factor = 4 if work.adapter else 6
    head = work.model.hidden * work.model.vocabulary
    trained_share = work.trained / work.tokens
    matrices = factor * (body_parameters(work.model) + head * trained_share) + 6 * work.adapter
    attention = 6 * work.model.layers * work.model.hidden * work.squares / work.tokens
    return matrices + attention


def published_peak(device: str) -> float | None:
    """Dense bfloat16 operations a second of a device by its name; None if it is not listed."""
    for pattern, peak in PEAKS.items():
        if re.search(pattern, device):
            return peak
    return None


def mfu(work: Work, tokens_per_second: float, peak: float) -> float:
    """Percent of `peak` (operations a second) that the counted operations make up."""
    return 100 * flop_per_token(work) * tokens_per_second / peak
