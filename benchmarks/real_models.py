"""What the small recipes do to real weights: base, prompted base, LoRA, full, stock TRL; three seeds, intervals.

    python -m benchmarks.real_models --model DIR [--model DIR] [--seeds 3] [--jobs 1] [--rates] [--t0 ROWS.jsonl]
                                     [--general PROMPTS] [--trl_steps 60] [--work .bench-real] [--page docs/results.md]

DIR is a folder or Hub name of SmolLM2-135M-Instruct or Gemma-3-270m. `--rates` first tries learning rates on the
validation split and takes the best of each kind; otherwise the recipe's own is used. `--general` names prompts that a
chat model answers before it is tuned (`sft-recipes replay`): the same tuning with those rows mixed in is what the
forgetting table compares. `--seeds 0` leaves all but stock TRL out.

Each step is the real command, run in DIR's own folder below WORK; a step that is finished is not run again, so the
benchmark may be stopped and given again. `--page` writes the page and its JSON beside it from the steps that are
finished, of every folder given as `--work`; `--only_page` without running any.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from benchmarks.real_models_page import machine, write_page
from benchmarks.real_models_results import Results
from sft_recipes.devices import cpu_has_bf16

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
DATA = RECIPES / "smollm2-135m" / "data"
# By `model_type`: the only two that have such a recipe.
RECIPE_OF = {"llama": "smollm2-135m", "gemma3_text": "gemma-3-270m"}
KINDS = ("lora", "full")
RATES = {"lora": ("1e-4", "3e-4", "1e-3", "2e-3"), "full": ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")}
VALIDATION_ROWS = 160
NEW_TOKENS = 64
ANSWERS = ("--max_new_tokens", str(NEW_TOKENS), "--batch_size", "110", "--examples", "0", "--json")
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
T0_LENGTH, T0_ROWS, T0_HELD_OUT = 128, 900, 160
REPLAYED_ROWS = 500
Chain = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One model, its recipe folder, and where its steps work and leave their results.

    `max_steps` and `max_rows` shorten every run and every evaluation, to try the benchmark itself.
    """

    model: str
    recipe: str
    work: Path
    max_steps: int | None = None
    max_rows: int | None = None

    def recipe_file(self, kind: str) -> Path:
        """The shipped recipe of a kind."""
        return RECIPES / self.recipe / f"{kind}.yaml"

    @property
    def has_own_template(self) -> bool:
        """Whether the model was a chat model before."""
        return AutoTokenizer.from_pretrained(self.model).chat_template is not None

    def run(self, name: str, command: Sequence[str]) -> dict[str, Any]:
        """Run a command unless it is finished: its seconds, its peak of memory, and what it printed as JSON.

        Raises RuntimeError where it fails; its log lies beside the results.
        """
        result = self.work / f"{name}.json"
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
        self.work.mkdir(parents=True, exist_ok=True)
        log, printed = self.work / f"{name}.log", self.work / f"{name}.out"
        print(f"{self.recipe} {name}: {shlex.join(command)}", flush=True)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as errors, printed.open("w", encoding="utf-8") as out:
            environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT)}
            arguments = [sys.executable, "-m", *command]
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment, stdout=out, stderr=errors
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{name}: exit code {process.returncode}, see {log}")
        text = printed.read_text(encoding="utf-8")
        step = {
            "command": shlex.join(command),
            "seconds": time.monotonic() - started,
            "peak_bytes": usage.ru_maxrss * 1024,
            "printed": json.loads(text[text.index("{") :]),
        }
        result.write_text(json.dumps(step), encoding="utf-8")
        return step


def train(bench: Bench, name: str, recipe: Path, seed: int, **keys: Any) -> None:
    """One training run of a recipe with other keys."""
    keys = {"model_name_or_path": bench.model, "seed": seed, "data_seed": seed, **keys}
    if bench.max_steps is not None:
        keys["max_steps"] = bench.max_steps
    keys["output_dir"] = bench.work / name
    overrides = itertools.chain.from_iterable((f"--{key}", str(keys[key])) for key in keys)
    bench.run(f"train-{name}", ("sft_recipes", "train", str(recipe), *overrides, "--json"))


def evaluate(bench: Bench, name: str, *options: str) -> None:
    """A model's answers to the test split."""
    output = bench.work / name / "evaluations" / "test"
    shorter = () if bench.max_rows is None else ("--max_rows", str(bench.max_rows))
    arguments = (str(bench.work / name), "--data", str(DATA), "--output", str(output))
    command = ("sft_recipes", "evaluate", *arguments, *options, *shorter, *ANSWERS)
    bench.run(f"evaluate-{name}", command)


def held_out_loss(bench: Bench, name: str) -> None:
    """The loss of a run's model on the validation split under our labels, whoever trained it."""
    recipe = str(bench.recipe_file("lora"))
    command = ("benchmarks.held_out_loss", recipe, bench.model, str(bench.work / name))
    bench.run(f"loss-{name}", command)


def try_rate(bench: Bench, kind: str, rate: str) -> None:
    """The recipe at another learning rate, judged on the whole validation split."""
    rows = bench.max_rows or VALIDATION_ROWS
    answers = f"{{rows: {rows}, max_new_tokens: {NEW_TOKENS}, batch_size: 80, max_share: null}}"
    keys = {"learning_rate": rate, "evaluation": answers, "save_strategy": "no"}
    train(bench, f"rate-{kind}-{rate}", bench.recipe_file(kind), 1, **keys)


def chosen_rate(bench: Bench, kind: str) -> dict[str, str]:
    """The learning rate with the best answers on the validation split; nothing where none was tried."""
    tried = Results(bench.work).rates(kind)
    if not tried:
        return {}
    best = max(tried, key=lambda rate: (tried[rate]["exact_match"], -tried[rate]["loss"]))
    return {"learning_rate": best}


def tuned(bench: Bench, kind: str, seed: int) -> None:
    """One seed: training, answers, loss; beside the first, the base is asked, plainly and with shots."""
    name = f"{kind}-{seed}"
    train(bench, name, bench.recipe_file(kind), seed, **chosen_rate(bench, kind))
    options = ["--retention"] if bench.has_own_template else []
    if name == "lora-1":
        options += ["--base", bench.model, "--shots", "auto"]
    evaluate(bench, name, *options)
    held_out_loss(bench, name)


def replay_rows(bench: Bench, prompts: Path) -> Path:
    """Rows that the model wrote before it was tuned."""
    rows = bench.work / "replay.jsonl"
    asked = ("--prompts", str(prompts), "--rows", str(bench.max_rows or REPLAYED_ROWS))
    length = ("--max_new_tokens", "192", "--batch_size", "125", "--json")
    command = ("sft_recipes", "replay", bench.model, *asked, "--output", str(rows), *length)
    bench.run("replay", command)
    return rows


def with_replay(bench: Bench, seed: int) -> None:
    """The LoRA recipe on the same rows and the model's own answers to general prompts."""
    name = f"replay-{seed}"
    content = yaml.safe_load(bench.recipe_file("lora").read_text(encoding="utf-8"))
    # Validation rows are of the task alone, as without replay.
    for key in ("dataset_name", "dataset_test_split"):
        del content[key]
    sources = [{"path": str(DATA)}, {"path": str(bench.work / "replay.jsonl")}]
    content |= {"datasets": sources, "eval_strategy": "no"}
    recipe = bench.work / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    train(bench, name, recipe, seed, **chosen_rate(bench, "lora"))
    evaluate(bench, name, "--retention")


def against_trl(bench: Bench, steps: int) -> None:
    """The LoRA recipe and stock TRL, the same number of steps on the same rows, one after the other."""
    ours, theirs = "ours-same-steps", "stock-trl"
    steps = bench.max_steps or steps
    once = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
    rate = chosen_rate(bench, "lora")
    train(bench, ours, bench.recipe_file("lora"), 1, **once, **rate)
    recipe = str(bench.recipe_file("lora"))
    command = ["benchmarks.stock_trl", recipe, bench.model, str(bench.work / theirs)]
    command += ["--max_steps", str(steps)]
    if rate:
        command += ["--learning_rate", rate["learning_rate"]]
    if torch.cuda.is_available() or cpu_has_bf16():
        command.append("--bf16")
    bench.run(f"train-{theirs}", command)
    template = bench.work / ours / "chat_template.jinja"
    evaluate(bench, theirs, "--chat_template", str(template))
    evaluate(bench, ours)
    for name in (ours, theirs):
        held_out_loss(bench, name)


def with_t0(bench: Bench, rows: Path) -> None:
    """LoRA as `init` writes it for somebody's own rows: short ones of T0."""
    folder = bench.work / "t0-recipe"
    given = ("--model", bench.model, "--data", str(rows), "--output", str(folder), "--json")
    bench.run("init-t0", ("sft_recipes", "init", *given))
    keys = {
        "max_length": T0_LENGTH,
        "max_lost": 1.0,
        "max_rows": T0_ROWS + T0_HELD_OUT,
        "eval_split": T0_HELD_OUT,
        "num_train_epochs": 1,
    }
    train(bench, "t0", folder / "recipe.yaml", 1, **keys)
    asked = ("--base", bench.model, "--shots", "auto")
    bench.run("evaluate-t0", ("sft_recipes", "evaluate", str(bench.work / "t0"), *asked, *ANSWERS))


def plan(benches: Sequence[Bench], options: argparse.Namespace) -> Iterator[list[Chain]]:
    """What is to be run: chains of steps that do not need one another, and what has to be over before the next."""
    if options.rates:
        tried = [(kind, rate) for kind in KINDS for rate in RATES[kind]]
        yield [partial(try_rate, bench, *one) for bench in benches for one in tried]
    replayed = [bench for bench in benches if options.general and bench.has_own_template]
    yield [partial(replay_rows, bench, options.general) for bench in replayed]
    seeds = range(1, options.seeds + 1)
    runs = [(kind, seed) for seed in seeds for kind in KINDS]
    chains: list[Chain] = [partial(tuned, bench, *run) for run in runs for bench in benches]
    chains += [partial(with_replay, bench, seed) for seed in seeds for bench in replayed]
    chains += [partial(against_trl, bench, options.trl_steps) for bench in benches]
    if options.t0:
        chains += [partial(with_t0, bench, options.t0) for bench in benches]
    yield chains


def note_machine(folder: Path, jobs: int) -> None:
    """What the figures below a folder were measured on, for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**machine(), "jobs": jobs}
    (folder / "machine.json").write_text(json.dumps(content), encoding="utf-8")


def run_all(benches: Sequence[Bench], options: argparse.Namespace) -> int:
    """Run what is not finished, `jobs` chains at a time; how many failed."""
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for chains in plan(benches, options):
            for future in [pool.submit(chain) for chain in chains]:
                if (error := future.exception()) is not None:
                    failed += 1
                    print(f"FAILED {error}", flush=True)
    return failed


def main() -> int:
    """Run what is not finished, and write the page; 1 where a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--rates", action="store_true", help="try learning rates first")
    parser.add_argument("--work", type=Path, action="append", help="default: .bench-real")
    parser.add_argument("--t0", type=Path)
    parser.add_argument("--general", type=Path)
    parser.add_argument("--trl_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, help="shorten every run")
    parser.add_argument("--max_rows", type=int, help="shorten every evaluation")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only_page", action="store_true")
    options = parser.parse_args()
    works = [work.resolve() for work in options.work or [Path(".bench-real")]]
    failed = 0
    if not options.only_page:
        note_machine(works[0], options.jobs)
        benches = []
        for model in options.model:
            recipe = RECIPE_OF[AutoConfig.from_pretrained(model).model_type]
            shorter = (options.max_steps, options.max_rows)
            benches.append(Bench(model, recipe, works[0] / recipe, *shorter))
        failed = run_all(benches, options)
    if options.page:
        write_page(options.page, works)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
