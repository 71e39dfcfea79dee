"""From `train` on a large prepared folder to the first optimizer step: seconds and peak memory of the process.

    python -m benchmarks.first_step [--rows 1000000] [--tokens 200]

The prepared folder is generated: random ids of 100 to 300 tokens a row (mean `--tokens`), so that no tokenizer has to
work for an hour; the source file behind it is real and is hashed at the start like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.material import chatml_tokenizer, small_model
from sft_recipes import run_folder
from sft_recipes.data.kept_examples import write_examples
from sft_recipes.data.labelled_rows import IGNORE_INDEX
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepared import (
    CHECK_EXAMPLES,
    EVAL_EXAMPLES,
    JOINED,
    MANIFEST,
    TRAIN,
    size_and_hash,
)
from sft_recipes.data.prepared_inputs import digest, prepared_inputs
from sft_recipes.data.row_fingerprint import row_fingerprints
from sft_recipes.data.row_table import SCHEMA
from sft_recipes.data.shards import SHARD_ROWS
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe


def write_shard(path: Path, first: int, count: int, mean_tokens: int) -> None:
    """A shard of the training table: `count` rows from number `first` on, the last fifth of each trained."""
    generator = np.random.default_rng(first)
    lengths = generator.integers(mean_tokens // 2, mean_tokens * 3 // 2, size=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = generator.integers(10, 5000, size=int(offsets[-1])).astype(np.int32)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    is_trained = place >= np.repeat(lengths - lengths // 5, lengths)
    labels = np.where(is_trained, ids, IGNORE_INDEX).astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "labels": pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels)),
        "source": pa.array(np.zeros(count, dtype=np.int16)),
        "row": pa.array(np.arange(first, first + count, dtype=np.int32)),
        "group": pa.array(generator.integers(0, 2**62, size=count)),
        "tokens": pa.array(lengths.astype(np.int32)),
        "trained_tokens": pa.array((lengths // 5).astype(np.int32)),
        "fingerprint": pa.array(row_fingerprints(ids, labels, offsets)),
    }
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


def write_prepared(recipe: Recipe, folder: Path, rows: int, mean_tokens: int) -> int:
    """The prepared folder of a recipe, as `prepare` would leave it; returns its bytes."""
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - first)
        write_shard(folder / f"{TRAIN}-{number:05d}.arrow", first, count, mean_tokens)
    write_examples(folder / EVAL_EXAMPLES, [])
    write_examples(folder / CHECK_EXAMPLES, [])
    np.save(folder / JOINED, np.empty((0, 2), dtype=np.int64))
    files = {path.name: size_and_hash(path) for path in sorted(folder.iterdir())}
    inputs = prepared_inputs(recipe, open_labeller(recipe).renderer, [])
    manifest = {"fingerprint": digest(inputs), "inputs": inputs, "files": files, "sources": []}
    run_folder.write_json(folder / MANIFEST, manifest)
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Generate, train one step in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = chatml_tokenizer(folder / "model")
        small_model(8000).save_pretrained(tokenizer)
        data = folder / "rows.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for row in range(options.rows):
                file.write(
                    json.dumps(
                        {"prompt": f"question {row} " + "words " * 100, "completion": "answer"}
                    )
                    + "\n"
                )
        recipe_file = folder / "recipe.yaml"
        keys = {
            "model_name_or_path": str(tokenizer), "dataset_name": str(data), "output_dir": str(folder / "run"),
            "max_steps": 1, "max_length": None, "eval_split": 1000, "logging_steps": 1, "save_strategy": "no",
            "per_device_train_batch_size": 4,
        }  # fmt: skip
        recipe_file.write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
        )
        prepared = folder / "run" / run_folder.PREPARED
        size = write_prepared(load_recipe(recipe_file), prepared, options.rows, options.tokens)
        print(
            f"{options.rows:,} rows, {size / 1e9:.2f} GB prepared, source file {data.stat().st_size / 1e9:.2f} GB"
        )
        started = time.time()
        subprocess.run(
            [sys.executable, "-m", "sft_recipes", "train", str(recipe_file)], check=True, env=dict(os.environ),
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        log = [
            json.loads(line) for line in (folder / "run" / run_folder.LOG).read_text().splitlines()
        ]
        assert log and log[0]["step"] == 1, log
        seconds = (folder / "run" / run_folder.LOG).stat().st_mtime - started
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"first optimizer step logged after at most {seconds:.1f} s; peak memory {memory:.2f} GiB"
        )


if __name__ == "__main__":
    main()
