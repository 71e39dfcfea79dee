"""Sizes of a real run and of a dry run, side by side. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama by its sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences a step, and tokens of each: the longest row, or the length of a pack."""

    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Steps:
    """Optimizer steps: first those to warm up, then those that count.

    `rounds` is how often two sides take turns.
    """

    warm_up: int
    measured: int
    rounds: int

    @property
    def total(self) -> int:
        """Steps of one run."""
        return self.warm_up + self.measured


@dataclass(frozen=True, slots=True)
class Quickstart:
    """The quickstart's run: rows prepared, optimizer steps, rows and tokens of the evaluation."""

    rows: int
    steps: int
    evaluated_rows: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Answers:
    """Prompts, their longest, tokens generated for each, and batch sizes in turn."""

    prompts: int
    longest_prompt: int
    new_tokens: int
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """All that differs between a real run and a dry run.

    `full`, `lora` and `small` are models; `shortest_row` and the batches are in tokens;
    `copy_bytes` is what the copy reads, `matmul` the side of square matrices.
    """

    full: ModelShape
    lora: ModelShape
    small: ModelShape
    shortest_row: int
    padded: Batch
    packed: tuple[Batch, ...]
    lora_batch: Batch
    steps: Steps
    quickstart: Quickstart
    answers: Answers
    matmul: int
    copy_bytes: int


# Llama-3.2-1B, Llama-3-8B; the small one is for what depends on the machinery and not on the size.
LLAMA_1B = ModelShape(2048, 16, 32, 8, 8192, 128_256, tied=True)
LLAMA_8B = ModelShape(4096, 32, 32, 8, 14_336, 128_256, tied=False)
SMALL = ModelShape(1024, 8, 16, 8, 4096, 32_000, tied=True)
TINY = ModelShape(64, 2, 4, 2, 128, 512, tied=True)
TINY_UNTIED = ModelShape(64, 2, 4, 2, 128, 512, tied=False)

REAL = Shape(
    full=LLAMA_1B,
    lora=LLAMA_8B,
    small=SMALL,
    shortest_row=100,
    padded=Batch(8, 2000),
    packed=(Batch(2, 4096), Batch(1, 8192)),
    lora_batch=Batch(1, 4096),
    steps=Steps(warm_up=2, measured=5, rounds=2),
    quickstart=Quickstart(rows=2000, steps=200, evaluated_rows=64, new_tokens=32),
    answers=Answers(128, longest_prompt=400, new_tokens=64, batch_sizes=(16, 64, 128)),
    matmul=8192,
    copy_bytes=2**32,
)
DRY = Shape(
    full=TINY,
    lora=TINY_UNTIED,
    small=TINY,
    shortest_row=8,
    padded=Batch(4, 64),
    packed=(Batch(2, 128), Batch(1, 256)),
    lora_batch=Batch(1, 128),
    steps=Steps(warm_up=1, measured=2, rounds=2),
    quickstart=Quickstart(rows=256, steps=40, evaluated_rows=8, new_tokens=8),
    answers=Answers(8, longest_prompt=24, new_tokens=6, batch_sizes=(2, 4, 8)),
    matmul=512,
    copy_bytes=2**24,
)
