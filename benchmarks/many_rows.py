"""`prepare` of many rows: time and memory by number of workers, and one that is killed and goes on.

    python -m benchmarks.many_rows [--rows 1000000] [--workers 1,2] [--tokenizer DIR] [--folder DIR]

Rows are generated: a prompt of three sentences, an answer of one, made of 30,000 words, some much
more frequent than others, 2 % of the prompts near-copies; one in a hundred rows is held out. Each
preparation is the command, in a process of its own. With the last number of workers it is run once
more, killed with all its workers when half of the shards are sealed, and called again; then every
file must be that of the undisturbed run.

What this process and its workers need for a row is measured, so for more workers than there are
cores the table says what follows from it: rows pass through as fast as the slower of the two, the
workers together or the process that reads and writes; the end (which prompts are alike) is added.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import psutil

from benchmarks.material import chatml_tokenizer, made_up_words
from sft_recipes import run_folder
from sft_recipes.data import prepared
from sft_recipes.data.prepared import file_sha256

VOCABULARY = 30_000
SENTENCES = 50_000
NEAR_COPIES = 0.02
EXTRAPOLATED = (1, 2, 4, 8, 16, 64)
POLL_SECONDS = 0.1
MEGA = 1e6


@dataclass
class Measured:
    """A preparation: seconds of the wall clock, processor seconds, peak bytes.

    `start`: until rows pass, `end`: behind the last shard. `memory`: private to the reading
    process (without files that are mapped), `worker_memory`: to the largest worker.
    """

    rows: int
    workers: int
    seconds: float = 0.0
    start: float = 0.0
    end: float = 0.0
    reading: float = 0.0
    labelling: float = 0.0
    memory: int = 0
    worker_memory: int = 0

    def seconds_with(self, workers: int, rows: int) -> float:
        """What a preparation of so many rows takes with so many workers, each on a core of its own."""
        a_row = max(self.reading, self.labelling / workers) / self.rows
        return self.start + rows * (a_row + self.end / self.rows)


def write_rows(path: Path, count: int) -> None:
    """Rows of three sentences and an answer; the seed is fixed."""
    draw = random.Random(0)
    pool: list[str] = []
    words = made_up_words(VOCABULARY)
    # By rank, as in texts (Zipf).
    weights = list(accumulate(1 / (rank + 3) for rank in range(VOCABULARY)))
    for _ in range(SENTENCES):
        pool.append(" ".join(draw.choices(words, cum_weights=weights, k=draw.randint(6, 18))) + ".")
    before = ""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            prompt = " ".join(draw.choices(pool, k=3))
            if before and draw.random() < NEAR_COPIES:
                prompt = f"{before} Please."
            before = prompt
            answer = draw.choice(pool)
            file.write(json.dumps({"prompt": prompt, "completion": f"{answer} ({row})"}) + "\n")


def command(recipe: Path, run: Path, workers: int) -> list[str]:
    """The command that prepares."""
    options = ["--output_dir", str(run), "--dataset_num_proc", str(workers), "--json"]
    return [sys.executable, "-m", "sft_recipes", "prepare", str(recipe), *options]


def seals(run: Path) -> list[Path]:
    """The seals of the shards that are there."""
    return sorted((run / run_folder.PREPARED / prepared.UNFINISHED).glob("train-*.json"))


def measure(recipe: Path, run: Path, workers: int, rows: int) -> Measured:
    """Prepare once, and watch."""
    result = Measured(rows, workers)
    began = time.time()
    process = psutil.Popen(command(recipe, run, workers), stdout=subprocess.DEVNULL)
    first_work = last_seal = 0.0
    sealed = 0
    before_rows = 0.0
    while process.poll() is None:
        watched = _watch(process, result)
        now = time.time()
        if watched and not first_work:
            first_work = now
            before_rows = result.reading
        count = len(seals(run))
        if count > sealed:
            sealed, last_seal = count, now
            reading_at_seal = result.reading
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    result.seconds = time.time() - began
    result.start = first_work - began
    result.end = began + result.seconds - last_seal
    result.reading = reading_at_seal - before_rows
    return result


def _watch(process: psutil.Process, result: Measured) -> bool:
    """Take note of what the process and its workers have used; returns whether there are workers."""
    try:
        with process.oneshot():
            used = process.cpu_times()
            memory = process.memory_info()
        result.reading = used.user + used.system
        result.memory = max(result.memory, memory.rss - memory.shared)
        ended = used.children_user + used.children_system
        running = 0.0
        workers = process.children()
        for worker in workers:
            with worker.oneshot():
                own = worker.cpu_times()
                size = worker.memory_full_info().uss
            running += own.user + own.system
            result.worker_memory = max(result.worker_memory, size)
        result.labelling = max(result.labelling, ended + running)
    except psutil.NoSuchProcess:
        return False
    return bool(workers)


def stopped_and_continued(recipe: Path, run: Path, workers: int, half: int) -> tuple[float, float]:
    """Seconds until it is killed, with `half` shards sealed, and of the call that goes on."""
    began = time.time()
    first = subprocess.Popen(
        command(recipe, run, workers), stdout=subprocess.DEVNULL, start_new_session=True
    )
    while len(seals(run)) < half:
        if first.poll() is not None:
            raise SystemExit("it ended before it could be killed")
        time.sleep(POLL_SECONDS)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    killed = time.time()
    subprocess.run(command(recipe, run, workers), check=True, stdout=subprocess.DEVNULL)
    return killed - began, time.time() - killed


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every prepared file."""
    files = sorted((run / run_folder.PREPARED).iterdir())
    return {path.name: file_sha256(path) for path in files}


def main() -> None:
    """Generate, prepare, kill, go on, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--tokenizer")
    parser.add_argument(
        "--folder", type=Path, help="where to write (some GB), else a temporary one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        words = made_up_words(VOCABULARY)
        tokenizer = options.tokenizer or str(chatml_tokenizer(folder / "tokenizer", words))
        data = folder / "rows.jsonl"
        write_rows(data, options.rows)
        recipe = folder / "recipe.yaml"
        keys = {
            "model_name_or_path": str(Path(tokenizer).resolve()), "dataset_name": str(data), "max_length": None,
            "output_dir": str(folder / "run"), "eval_split": options.rows // 100,
        }  # fmt: skip
        recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
        print(f"{options.rows:,} rows, {data.stat().st_size / MEGA:,.0f} MB")
        runs: list[Measured] = []
        for count in map(int, options.workers.split(",")):
            run = folder / f"workers-{count}"
            runs.append(measure(recipe, run, count, options.rows))
            _print_run(run, runs[-1])
        manifest = prepared.read_manifest(run / run_folder.PREPARED)
        shards = [name for name in manifest["files"] if prepared.is_shard(name)]
        stopped = folder / "stopped"
        first, second = stopped_and_continued(recipe, stopped, count, len(shards) // 2)
        verdict = "the same" if hashes(stopped) == hashes(run) else "NOT the same"
        print(
            f"killed after {first:.1f} s with {len(shards) // 2} of {len(shards)} shards sealed; "
            f"the same command went on and took {second:.1f} s more: "
            f"all {len(hashes(run))} files are {verdict} as undisturbed"
        )
        _print_table(runs)


def _print_run(run: Path, measured: Measured) -> None:
    folder = run / run_folder.PREPARED
    manifest = prepared.read_manifest(folder)
    sizes = [size for name, (size, _) in manifest["files"].items() if prepared.is_shard(name)]
    print(
        f"{measured.workers} workers: {measured.seconds:.1f} s, "
        f"{measured.rows / measured.seconds:,.0f} rows/s; {len(sizes)} shards of at most "
        f"{max(sizes) / MEGA:.0f} MB; memory {measured.memory / MEGA:,.0f} MB, the largest worker "
        f"{measured.worker_memory / MEGA:,.0f} MB; {manifest['near_duplicate_prompts']:,} prompts "
        "are near-copies"
    )


def _print_table(runs: Sequence[Measured]) -> None:
    last = runs[-1]
    reading, labelling, end = (
        part / last.rows * MEGA for part in (last.reading, last.labelling, last.end)
    )
    print(
        f"for a row: {reading:.0f} us to read and write, {labelling:.0f} us to label, {end:.0f} us at the end; "
        f"{last.start:.1f} s to start"
    )
    print("workers  measured  1 million  10 million rows (from these rates, a core each)")
    measured = {run.workers: f"{run.seconds:.0f} s" for run in runs}
    for count in EXTRAPOLATED:
        one, ten = (last.seconds_with(count, rows) for rows in (10**6, 10**7))
        print(f"{count:7}  {measured.get(count, ''):>8}  {one / 60:5.1f} min  {ten / 60:5.1f} min")


if __name__ == "__main__":
    main()
