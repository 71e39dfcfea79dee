"""What the small recipes do to real weights: base, prompted base, LoRA, full, stock TRL; three seeds, intervals.

    python -m benchmarks.real_models --model DIR [--model DIR] [--seeds 3] [--work .bench-real] [--t0 ROWS.jsonl]
                                     [--trl_steps 60] [--page docs/results.md]

DIR is a folder or Hub name of SmolLM2-135M-Instruct or Gemma-3-270m. Each step is the real command, run in DIR's own
folder below WORK; a step that is finished is not run again, so the benchmark may be stopped and given again. `--page`
writes the page and its JSON beside it from the steps that are finished, `--only_page` without running any.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.real_models_page import write_page
from sft_recipes.devices import cpu_has_bf16

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
DATA = RECIPES / "smollm2-135m" / "data"
# By `model_type`: the only two that have such a recipe.
RECIPE_OF = {"llama": "smollm2-135m", "gemma3_text": "gemma-3-270m"}
KINDS = ("lora", "full")
NEW_TOKENS = 64
ANSWERS = ("--max_new_tokens", str(NEW_TOKENS), "--batch_size", "110", "--examples", "0", "--json")
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
T0_LENGTH, T0_ROWS, T0_HELD_OUT = 128, 900, 160


@dataclass(frozen=True)
class Bench:
    """One model, its recipe folder, and where its steps work and leave their results."""

    model: str
    recipe: str
    work: Path

    def recipe_file(self, kind: str) -> Path:
        """The shipped recipe of a kind."""
        return RECIPES / self.recipe / f"{kind}.yaml"

    def run(self, name: str, command: Sequence[str]) -> dict[str, Any]:
        """Run a command unless it is finished; its seconds and what it printed as JSON.

        Raises RuntimeError where it fails; its log lies beside the results.
        """
        result = self.work / f"{name}.json"
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
        self.work.mkdir(parents=True, exist_ok=True)
        log = self.work / f"{name}.log"
        print(f"{self.recipe} {name}: {shlex.join(command)}", flush=True)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT)}
            arguments = [sys.executable, "-m", *command]
            done = subprocess.run(
                arguments,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{name}: exit code {done.returncode}, see {log}")
        content = json.loads(done.stdout[done.stdout.index("{") :])
        step = {
            "command": shlex.join(command),
            "seconds": time.monotonic() - started,
            "printed": content,
        }
        result.write_text(json.dumps(step), encoding="utf-8")
        return step


def train(bench: Bench, name: str, kind: str, seed: int, *overrides: str) -> dict[str, Any]:
    """One training run of a shipped recipe."""
    keys = ("--model_name_or_path", bench.model, "--seed", str(seed), "--data_seed", str(seed))
    output = ("--output_dir", str(bench.work / name))
    recipe = str(bench.recipe_file(kind))
    return bench.run(
        f"train-{name}", ("sft_recipes", "train", recipe, *keys, *output, *overrides, "--json")
    )


def evaluate(bench: Bench, name: str, *options: str) -> dict[str, Any]:
    """A run's answers to the test split, and its loss on the validation split."""
    data = ("--data", str(DATA), "--split", "test")
    command = ("sft_recipes", "evaluate", str(bench.work / name), *data, *options, *ANSWERS)
    return bench.run(f"evaluate-{name}", command)


def held_out_loss(bench: Bench, name: str) -> dict[str, Any]:
    """The loss of a run's model on the validation split under our labels, whoever trained it."""
    recipe = str(bench.recipe_file("lora"))
    command = ("benchmarks.held_out_loss", recipe, bench.model, str(bench.work / name))
    return bench.run(f"loss-{name}", command)


def base_folder(bench: Bench) -> Path:
    """The base's answers, asked beside the first LoRA run."""
    return bench.work / "lora-1" / "evaluations" / "test" / "base"


def main_runs(bench: Bench, seeds: int) -> None:
    """LoRA and full fine-tuning, some seeds each; the base is asked once, plainly and with shots."""
    for seed in range(1, seeds + 1):
        for kind in KINDS:
            name = f"{kind}-{seed}"
            train(bench, name, kind, seed)
            if name == "lora-1":
                evaluate(bench, name, "--base", bench.model, "--shots", "auto")
            else:
                evaluate(bench, name, "--base", str(base_folder(bench)))
            held_out_loss(bench, name)


def against_trl(bench: Bench, steps: int) -> None:
    """The LoRA recipe and stock TRL, the same number of steps on the same rows, one after the other."""
    ours, theirs = "ours-same-steps", "stock-trl"
    train(
        bench,
        ours,
        "lora",
        1,
        "--max_steps",
        str(steps),
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
    )
    recipe = str(bench.recipe_file("lora"))
    command = ["benchmarks.stock_trl", recipe, bench.model, str(bench.work / theirs)]
    command += ["--max_steps", str(steps)]
    if cpu_has_bf16():
        command.append("--bf16")
    bench.run(f"train-{theirs}", command)
    evaluate(bench, theirs)
    evaluate(bench, ours, "--compare", str(evaluation_of(bench, theirs)))
    for name in (ours, theirs):
        held_out_loss(bench, name)


def evaluation_of(bench: Bench, name: str) -> Path:
    """Where `evaluate` writes for a folder that is no run of ours."""
    return ROOT / "evaluations" / name / "test"


def with_t0(bench: Bench, rows: Path, seed: int = 1) -> None:
    """LoRA as `init` writes it for somebody's own rows: short ones of T0."""
    folder = bench.work / "t0"
    recipe = folder / "recipe.yaml"
    command = (
        "sft_recipes",
        "init",
        "--model",
        bench.model,
        "--data",
        str(rows),
        "--output",
        str(folder),
        "--json",
    )
    bench.run("init-t0", command)
    keys = {
        "max_length": T0_LENGTH,
        "max_lost": 1.0,
        "max_rows": T0_ROWS + T0_HELD_OUT,
        "eval_split": T0_HELD_OUT,
        "num_train_epochs": 1,
        "seed": seed,
    }
    overrides = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    bench.run("train-t0", ("sft_recipes", "train", str(recipe), *overrides, "--json"))
    asked = ("--base", bench.model, "--shots", "auto")
    bench.run("evaluate-t0", ("sft_recipes", "evaluate", str(folder / "run"), *asked, *ANSWERS))


def main() -> None:
    """Run what is not finished, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".bench-real"))
    parser.add_argument("--t0", type=Path)
    parser.add_argument("--trl_steps", type=int, default=60)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only_page", action="store_true")
    options = parser.parse_args()
    benches = []
    for model in options.model:
        recipe = RECIPE_OF[AutoConfig.from_pretrained(model).model_type]
        benches.append(Bench(model, recipe, options.work.resolve() / recipe))
    if not options.only_page:
        for bench in benches:
            main_runs(bench, options.seeds)
            against_trl(bench, options.trl_steps)
            if options.t0:
                with_t0(bench, options.t0)
    if options.page:
        write_page(options.page, {bench.recipe: bench.work for bench in benches})


if __name__ == "__main__":
    main()
