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
from sft_recipes.data import prepare
from sft_recipes.data import prepared as prepared_files
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.row_fingerprint import row_fingerprints
from sft_recipes.data.row_table import SCHEMA
from sft_recipes.recipe_keys import load_recipe

CHUNK = 10_000


def write_prepared(folder: Path, rows: int, mean_tokens: int) -> None:
    """A prepared training split of `rows` rows, the last fifth of each trained."""
    generator = np.random.default_rng(0)
    with (
        pa.OSFile(str(folder / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            lengths = generator.integers(mean_tokens // 2, mean_tokens * 3 // 2, size=count).astype(
                np.int32
            )
            ends = np.cumsum(lengths)
            ids = generator.integers(10, 5000, size=int(ends[-1])).astype(np.int32)
            trained = lengths // 5
            place = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
            labels = np.where(place >= np.repeat(lengths - trained, lengths), ids, -100).astype(
                np.int32
            )
            offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(ids)),
                pa.ListArray.from_arrays(offsets, pa.array(labels)),
                pa.array(np.zeros(count, dtype=np.int16)),
                pa.array(np.arange(start, start + count, dtype=np.int32)),
                pa.array(generator.integers(0, 2**62, size=count)),
                pa.array(lengths),
                pa.array(trained.astype(np.int32)),
                pa.array(row_fingerprints(ids, labels, np.concatenate([[0], ends]))),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


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
        recipe = load_recipe(recipe_file)
        prepared = folder / "run" / run_folder.PREPARED
        prepared.mkdir(parents=True)
        write_prepared(prepared, options.rows, options.tokens)
        (prepared / prepared_files.EVAL_EXAMPLES).write_text("")
        (prepared / prepared_files.CHECK_EXAMPLES).write_text("")
        np.save(prepared / prepared_files.JOINED, np.empty((0, 2), dtype=np.int64))
        renderer = open_labeller(recipe).renderer
        run_folder.write_json(
            prepared / prepared_files.MANIFEST,
            {"fingerprint": prepare.fingerprint(recipe, renderer), "sources": []},
        )
        size = (prepared / "train.arrow").stat().st_size
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
