"""Preparation speed, interleaved in one run: this project (verification on), bare `encode_batch`, stock TRL.

    python -m benchmarks.preparation [--data ROWS.jsonl] [--tokenizer DIR] [--rounds 3]

Without arguments the rows and the tokenizer are made in-process. Prints seconds per round and the ratios of medians.
"""

from __future__ import annotations

import argparse
import statistics
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


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    disable_caching()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or write_rows(folder / "rows.jsonl", 5000)
        tokenizer_folder = options.tokenizer or chatml_tokenizer(folder / "tokenizer")
        source = DatasetSource(path=str(data))
        settings = DataSettings(datasets=(source,))
        examples = list(iter_examples(source, settings, rejects=RejectLog(settings)))
        renderer = attach_chat_template(load_tokenizer(str(tokenizer_folder)), TemplateSettings())
        texts = renderer.render_batch([example.messages for example in examples])
        messages = Dataset.from_list([{"messages": list(example.messages)} for example in examples])
        keys = {"model_name_or_path": str(tokenizer_folder), "dataset_name": str(data), "max_length": None}
        times: dict[str, list[float]] = {"sft-recipes": [], "encode_batch": [], "TRL": []}
        for number in range(options.rounds):
            output = folder / f"run{number}"
            recipe = make_recipe({**keys, "output_dir": str(output)})
            times["sft-recipes"].append(seconds(lambda: prepare(recipe, renderer, output, progress=False)))  # noqa: B023
            backend = renderer.tokenizer.backend_tokenizer
            times["encode_batch"].append(seconds(lambda: backend.encode_batch(texts, add_special_tokens=False)))  # noqa: B023
            times["TRL"].append(seconds(lambda: _stock_trl(str(tokenizer_folder), messages, folder)))
    _print(times, len(examples))


def _stock_trl(tokenizer_folder: str, messages: Dataset, folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    config = SFTConfig(
        output_dir=str(folder / "trl"), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False,
        activation_checkpointing=False,
    )  # fmt: skip
    SFTTrainer(small_model(len(tokenizer)), args=config, train_dataset=messages, processing_class=tokenizer)


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
