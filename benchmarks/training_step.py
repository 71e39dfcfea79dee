"""Training steps per second on this machine, interleaved in one run: this project's loss, stock TRL's; losses compared.

    python -m benchmarks.training_step [--data ROWS.jsonl] [--tokenizer DIR] [--steps 10] [--rounds 2]

An 11-million-parameter Llama, batch 4, at most 512 tokens a row, float32, no activation checkpointing on both sides.
Then the share of this machine's matmul peak that a step of an 80-million-parameter model reaches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from benchmarks.material import chatml_tokenizer, small_model, write_rows
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.training.trainer import RecipeTrainer
from sft_recipes.training.varlen_attention import use_varlen

BATCH = 4


def build(
    kind: type[SFTTrainer],
    vocab_size: int,
    data: PreparedData,
    tokenizer: Any,
    folder: Path,
    size: int,
) -> Any:
    """A trainer of the given kind on a fresh model, the same weights each time."""
    model = small_model(vocab_size, hidden=size, layers=4 if size < 512 else 12)
    flattened = kind is RecipeTrainer
    if flattened:
        use_varlen(model)
    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, max_length=None,
        per_device_train_batch_size=BATCH, padding_free=flattened, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    return kind(model, args=config, train_dataset=data.train, processing_class=tokenizer)


def run_steps(trainer: Any, steps: int) -> tuple[float, list[float], int]:
    """(seconds per step, losses, tokens) of forward and backward on the first batches, one warm-up step aside."""
    batches = list(trainer.get_train_dataloader())[: steps + 1]
    losses, tokens, started = [], 0, 0.0
    trainer.model.train()
    for number, batch in enumerate(batches):
        started = time.perf_counter() if number == 1 else started
        inputs = trainer._prepare_inputs(dict(batch))
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad()
        losses.append(loss.item())
        tokens += inputs["input_ids"].numel() if number else 0
    return (time.perf_counter() - started) / (len(batches) - 1), losses, tokens


def matmul_peak() -> float:
    """Floating-point operations per second of a square float32 product, best of five."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_path = options.data or write_rows(folder / "rows.jsonl", 1000)
        tokenizer_folder = str(options.tokenizer or chatml_tokenizer(folder / "tokenizer"))
        keys = {
            "model_name_or_path": tokenizer_folder,
            "dataset_name": str(data_path),
            "max_length": 512,
        }
        recipe = make_recipe({**keys, "output_dir": name, "max_lost": 1.0, "max_rows": 1000})
        labeller = open_labeller(recipe)
        renderer = labeller.renderer
        data = prepare(recipe, labeller, folder / "prepared", progress=False)
        renderer.tokenizer.pad_token = renderer.tokenizer.convert_ids_to_tokens(1)
        # The vocabulary of the model, not of the tokenizer, sets the cost; ids are folded into it.
        vocabulary = 32_000
        train = data.train.map(
            lambda row: {key: _fold(row[key], vocabulary) for key in ("input_ids", "labels")}
        )
        data = replace(data, train=train, eval=None, eval_examples=[], check_examples=[])
        _compare(data, renderer.tokenizer, vocabulary, folder, options)
        _share_of_peak(data, renderer.tokenizer, vocabulary, folder, options.steps)


def _fold(ids: list[int], vocabulary: int) -> list[int]:
    return [token if token < 0 else token % vocabulary for token in ids]


def _compare(
    data: PreparedData, tokenizer: Any, vocabulary: int, folder: Path, options: Any
) -> None:
    speeds: dict[str, list[float]] = {"sft-recipes": [], "TRL": []}
    losses: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for label, kind in (("sft-recipes", RecipeTrainer), ("TRL", SFTTrainer)):
            seconds, found, _ = run_steps(
                build(kind, vocabulary, data, tokenizer, folder, 256), options.steps
            )
            speeds[label].append(1 / seconds)
            losses[label] = found
    for label, values in speeds.items():
        print(
            f"{label:12} {statistics.median(values):6.2f} steps/s median of {[round(value, 2) for value in values]}"
        )
    difference = max(
        abs(a - b) / b for a, b in zip(losses["sft-recipes"], losses["TRL"], strict=True)
    )
    ratio = statistics.median(speeds["sft-recipes"]) / statistics.median(speeds["TRL"])
    print(
        f"sft-recipes / TRL  {ratio:.2f}x, largest relative difference of a loss {difference:.1e}"
    )


def _share_of_peak(
    data: PreparedData, tokenizer: Any, vocabulary: int, folder: Path, steps: int
) -> None:
    trainer = build(RecipeTrainer, vocabulary, data, tokenizer, folder, 640)
    body = trainer.model.num_parameters(exclude_embeddings=True)
    seconds, _, tokens = run_steps(trainer, max(steps // 3, 2))
    rate = 6 * body * tokens / max(steps // 3, 2) / seconds
    peak = matmul_peak()
    size = trainer.model.num_parameters() / 1e6
    print(
        f"{size:.0f}M parameters: {rate / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s matmul peak ({rate / peak:.0%})"
    )
    print("counted: 6 x body parameters x tokens, attention and trained logits left out")


if __name__ == "__main__":
    main()
