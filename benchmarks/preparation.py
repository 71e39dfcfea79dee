"""Preparation speed, interleaved in one run: this project (verification on), bare `encode_batch`, stock TRL.

    python -m benchmarks.preparation [--data ROWS.jsonl] [--tokenizer DIR] [--rounds 3]

Without arguments the rows and the tokenizer are made here. Each measurement has a process of its own, as a preparation
has one: what stays behind of another would slow it. Prints seconds per round and the ratios of medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching
from datasets.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from benchmarks.material import chatml_tokenizer, small_model, write_rows
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.prepare import prepare
from sft_recipes.models import load_tokenizer
from sft_recipes.recipe import DatasetSource, DataSettings, TemplateSettings
from sft_recipes.recipe_keys import make_recipe


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=WORK, help="measure this one here, once, and print its seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or write_rows(folder / "rows.jsonl", 5000)
        tokenizer_folder = options.tokenizer or chatml_tokenizer(folder / "tokenizer")
        if options.only:
            disable_caching()
            disable_progress_bar()
            print(WORK[options.only](Material(data, str(tokenizer_folder), folder)))
            return
        times: dict[str, list[float]] = {name: [] for name in WORK}
        for _ in range(options.rounds):
            for name in WORK:
                command = [sys.executable, "-m", "benchmarks.preparation", "--only", name]
                command += ["--data", str(data), "--tokenizer", str(tokenizer_folder)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                times[name].append(float(done.stdout.split()[-1]))
        with data.open() as file:
            _print(times, sum(1 for _ in file))


class Material:
    """Rows and tokenizer, read before any clock runs."""

    def __init__(self, data: Path, tokenizer: str, folder: Path) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder
        self.renderer = attach_chat_template(load_tokenizer(tokenizer), TemplateSettings())
        source = DatasetSource(path=str(data))
        settings = DataSettings(datasets=(source,))
        examples = list(iter_examples(source, settings, rejects=RejectLog(settings)))
        self.messages = [list(example.messages) for example in examples]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ours(material: Material) -> float:
    keys = {"model_name_or_path": material.tokenizer, "dataset_name": str(material.data), "max_length": None}
    recipe = make_recipe({**keys, "output_dir": str(material.folder)})
    return _seconds(lambda: prepare(recipe, material.renderer, material.folder / "data", progress=False))


def _encode_batch(material: Material) -> float:
    texts = material.renderer.render_batch(material.messages)
    backend = material.renderer.tokenizer.backend_tokenizer
    return _seconds(lambda: backend.encode_batch(texts, add_special_tokens=False))


def _stock_trl(material: Material) -> float:
    rows = Dataset.from_list([{"messages": messages} for messages in material.messages])

    def work() -> None:
        tokenizer = load_tokenizer(material.tokenizer)
        config = SFTConfig(
            output_dir=str(material.folder / "trl"), assistant_only_loss=True, max_length=None, use_cpu=True,
            bf16=False, activation_checkpointing=False,
        )  # fmt: skip
        SFTTrainer(small_model(len(tokenizer)), args=config, train_dataset=rows, processing_class=tokenizer)

    return _seconds(work)


WORK = {"sft-recipes": _ours, "encode_batch": _encode_batch, "TRL": _stock_trl}


def _print(times: dict[str, list[float]], rows: int) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        shown = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:14} {medians[name]:7.2f} s median of [{shown}], {rows / medians[name]:,.0f} rows/s")
    ours = medians["sft-recipes"]
    print(f"TRL / sft-recipes           {medians['TRL'] / ours:.2f}x")
    print(f"sft-recipes / encode_batch  {ours / medians['encode_batch']:.2f}x")


if __name__ == "__main__":
    main()
