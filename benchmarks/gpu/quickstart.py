"""The quickstart as a user runs it, on this device: train, stop by a signal, resume, evaluate."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.children import Setting
from benchmarks.gpu.results import ItemReport
from sft_recipes import run_folder
from sft_recipes.errors import Preempted

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/quickstart/full.yaml"
LOOK_EVERY_S = 0.05


def quickstart(setting: Setting, report: ItemReport) -> None:
    """Seconds of each command, whether all end as they should, and leave what they should."""
    shape = setting.shape.quickstart
    run = setting.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    options = {
        "output_dir": run,
        "max_rows": shape.rows,
        "max_steps": shape.steps,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    training = ["train", RECIPE]
    for name, value in options.items():
        training += [f"--{name}", str(value)]
    stopped = stop_midway(training, run / run_folder.LOG, shape.steps)
    expect(report, "train, stopped by SIGTERM", stopped, Preempted.exit_code)
    checkpoints = sorted(folder.name for folder in run.glob("checkpoint-*"))
    report.require(bool(checkpoints), "the stopped run left no checkpoint")
    report.note("checkpoint of the stopped run", ", ".join(checkpoints))
    expect(report, "train, resumed", run_to_end(training))
    evaluation = ["evaluate", str(run), "--max_rows", str(shape.evaluated_rows)]
    evaluation += ["--max_new_tokens", str(shape.new_tokens)]
    expect(report, "evaluate", run_to_end(evaluation))
    steps = run_folder.read_state(run).get("step")
    report.require(steps == shape.steps, f"{steps} of {shape.steps} steps were trained")
    environment = run_folder.read_json(run / run_folder.ENVIRONMENT)
    report.note("device", str(environment.get("device")))
    for missing in absent_files(run):
        report.require(False, f"{missing} is missing in the run folder")


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended: its exit code, and how many seconds it took."""

    code: int
    seconds: float


def expect(report: ItemReport, name: str, ended: Ended, code: int = 0) -> None:
    """Report how a command ended; another exit code than `code` is wrong."""
    report.number(name, ended.seconds, "s")
    report.require(ended.code == code, f"{name}: exit code {ended.code}, not {code}")


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command of this project; its output goes where this process's goes."""
    command = [sys.executable, "-m", "sft_recipes", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def run_to_end(arguments: Sequence[str]) -> Ended:
    """Run a command."""
    started = time.monotonic()
    code = start(arguments).wait()
    return Ended(code, time.monotonic() - started)


def stop_midway(arguments: Sequence[str], log: Path, steps: int) -> Ended:
    """Run a training that gets SIGTERM when a quarter of its steps are logged."""
    started = time.monotonic()
    process = start(arguments)
    while process.poll() is None and logged_steps(log) < steps // 4:
        time.sleep(LOOK_EVERY_S)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    return Ended(code, time.monotonic() - started)


def logged_steps(log: Path) -> int:
    """How many steps stand in a run's log."""
    return len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def absent_files(run: Path) -> list[str]:
    """What a run that was trained and evaluated must have left, and has not."""
    names = ["model.safetensors", "config.json", "tokenizer.json", run_folder.CONSUMPTION]
    absent = [name for name in names if not (run / name).is_file()]
    for name in ("metrics.json", "samples.jsonl", "report.html"):
        if not list(run.glob(f"{run_folder.EVALUATIONS}/*/{name}")):
            absent.append(name)
    return absent
