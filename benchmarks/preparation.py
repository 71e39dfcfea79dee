"""Preparation speed, interleaved in one run: this project (verification on), bare `encode_batch`, stock TRL.

    python -m benchmarks.preparation [--data ROWS.jsonl] [--tokenizer DIR] [--rounds 3]

Without arguments the rows and the tokenizer are made here. Each measurement has a process of its own, as a preparation
has one: what stays behind of another would slow it. Prints seconds per round, the ratios of medians, and what a second
core gains: for this project from one process to two workers, for `encode_batch` from one thread to all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching
from datasets.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from benchmarks.material import chatml_tokenizer, small_model, write_rows
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.opening import load_tokenizer, open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import make_recipe


@dataclass(frozen=True)
class Measurement:
    """What is measured; `processes` and `threads`: None for as many as there are cores."""

    work: Callable[[Recipe, Path], float]
    processes: int | None = None
    threads: int | None = None


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", choices=MEASUREMENTS, help="measure this one here, once, and print its seconds"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or write_rows(folder / "rows.jsonl", 5000)
        tokenizer = str(options.tokenizer or chatml_tokenizer(folder / "tokenizer"))
        if options.only:
            print(_measure(MEASUREMENTS[options.only], data, tokenizer, folder))
            return
        times: dict[str, list[float]] = {name: [] for name in MEASUREMENTS}
        for _ in range(options.rounds):
            for name, measurement in MEASUREMENTS.items():
                times[name].append(_measure_apart(name, measurement, data, tokenizer))
        with data.open(encoding="utf-8") as file:
            _print(times, sum(1 for _ in file))


def _measure_apart(name: str, measurement: Measurement, data: Path, tokenizer: str) -> float:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.preparation", "--only", name]
    command += ["--data", str(data), "--tokenizer", tokenizer]
    environment = dict(os.environ)
    if measurement.threads is not None:
        environment["RAYON_NUM_THREADS"] = str(measurement.threads)
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _measure(measurement: Measurement, data: Path, tokenizer: str, folder: Path) -> float:
    disable_caching()
    disable_progress_bar()
    values = {
        "model_name_or_path": tokenizer,
        "dataset_name": str(data),
        "output_dir": str(folder),
        "max_length": None,
        "dataset_num_proc": measurement.processes,
    }
    return measurement.work(make_recipe(values), folder)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ours(recipe: Recipe, folder: Path) -> float:
    labeller = open_labeller(recipe)
    return _seconds(lambda: write_prepared(recipe, labeller, folder / "data", progress=False))


def _messages(recipe: Recipe) -> list[Sequence[Any]]:
    rejects = RejectLog(recipe.data)
    examples = iter_examples(recipe.data.datasets[0], recipe.data, rejects=rejects)
    return [list(example.messages) for example in examples]


def _encode_batch(recipe: Recipe, _: Path) -> float:
    """The rows, rendered before the clock runs, in one call."""
    renderer = open_labeller(recipe).renderer
    texts = renderer.render_batch(_messages(recipe))
    backend = renderer.tokenizer.backend_tokenizer
    return _seconds(lambda: backend.encode_batch(texts, add_special_tokens=False))


def _stock_trl(recipe: Recipe, folder: Path) -> float:
    rows = Dataset.from_list([{"messages": messages} for messages in _messages(recipe)])

    def work() -> None:
        tokenizer = load_tokenizer(recipe.model_name)
        config = SFTConfig(
            output_dir=str(folder / "trl"),
            assistant_only_loss=True,
            max_length=None,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
        )
        SFTTrainer(
            small_model(len(tokenizer)), args=config, train_dataset=rows, processing_class=tokenizer
        )

    return _seconds(work)


OURS, OURS_ALONE = "sft-recipes", "sft-recipes, one process"
ENCODE, ENCODE_ALONE = "encode_batch", "encode_batch, one thread"
TRL = "TRL"
MEASUREMENTS: Mapping[str, Measurement] = {
    OURS: Measurement(_ours),
    OURS_ALONE: Measurement(_ours, processes=1, threads=1),
    ENCODE: Measurement(_encode_batch),
    ENCODE_ALONE: Measurement(_encode_batch, threads=1),
    TRL: Measurement(_stock_trl),
}


def _print(times: Mapping[str, Sequence[float]], rows: int) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        shown = " ".join(f"{value:.2f}" for value in values)
        print(
            f"{name:26} {medians[name]:7.2f} s median of [{shown}], {rows / medians[name]:,.0f} rows/s"
        )
    our_gain = medians[OURS_ALONE] / medians[OURS]
    encode_gain = medians[ENCODE_ALONE] / medians[ENCODE]
    print(f"TRL / sft-recipes           {medians[TRL] / medians[OURS]:.2f}x")
    print(f"sft-recipes / encode_batch  {medians[OURS] / medians[ENCODE]:.2f}x")
    gains = f"sft-recipes {our_gain:.2f}x, encode_batch {encode_gain:.2f}x"
    print(f"gain of more cores          {gains}: {our_gain / encode_gain:.0%} of it")


if __name__ == "__main__":
    main()
