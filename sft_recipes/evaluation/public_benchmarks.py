"""`evaluate --benchmark`: public benchmarks, asked and scored by lm-eval.

This project decides how the model is asked, since that moves a score more than most training does:
with the chat template that it was trained with, few-shot examples as turns, the recipe's system
prompt, no BOS but the template's. The settings are a file that lm-eval reads itself, so that anybody
can repeat them: `lm-eval run --config SETTINGS`. The scores are lm-eval's; intervals are ours.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from sft_recipes import run_folder, stop_request
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.errors import InputError, Problem, TrainingFault
from sft_recipes.evaluation.generation import default_batch_size
from sft_recipes.evaluation.lm_eval_process import TASKS
from sft_recipes.report.benchmark_report import render_benchmark_report
from sft_recipes.statistics import Estimate, proportion_of
from sft_recipes.text_files import interpreting, read_json, read_json_lines

WORK = "lm_eval"  # what lm-eval read and wrote in the last call
SETTINGS = "settings.yaml"
REPORT = "report.html"
_AGAIN = "run the benchmark again"
_POLL = 0.2  # seconds between two looks at the process
_Z95 = 1.96


@dataclass(frozen=True)
class BenchmarkRequest:
    """What is asked: a model folder or Hub name, tasks of lm-eval, and where results are written.

    `data` is a folder with rows for tasks; where it is None they come from the Hub. What is None
    else is left to the task.
    """

    model: str
    benchmarks: Sequence[str]
    folder: Path
    data: Path | None = None
    system_prompt: str | None = None
    max_rows: int | None = None
    max_new_tokens: int | None = None
    shots: int | None = None
    batch_size: int | None = None


def write_settings(request: BenchmarkRequest) -> dict[str, Any]:
    """Settle how the model is asked, and write it as the file that lm-eval reads.

    Raises InputError if lm-eval is not installed, or for a model or data that are not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        what = "lm-eval, which asks and scores, is not installed"
        fix = "pip install 'sft-recipes[benchmarks]'"
        raise InputError(Problem("command line", "--benchmark", what, fix))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        what = "one process runs benchmarks, and several were launched"
        raise InputError(Problem("launch", "--benchmark", what, "start it without a launcher"))
    if request.data is not None and not request.data.is_dir():
        what = "there is no such folder"
        fix = "name the folder that holds TASK/SPLIT.jsonl"
        raise InputError(Problem(str(request.data), "--benchmark_data", what, fix))
    has_template = bool(load_tokenizer(request.model).chat_template)
    work = request.folder / WORK
    if work.exists() and not (work / SETTINGS).is_file():
        what = "the folder exists, and no benchmark was written there"
        raise InputError(Problem(str(work), "--output", what, "name another folder"))
    shutil.rmtree(work, ignore_errors=True)
    model: dict[str, Any] = {"pretrained": request.model, "dtype": "auto"}  # that of the files
    if has_template:
        # The template writes what there is to be; the tokenizer would add one that was not trained.
        model["add_bos_token"] = False
    settings: dict[str, Any] = {
        "model": "hf",
        "model_args": model,
        "tasks": list(request.benchmarks),
        "num_fewshot": request.shots,
        "apply_chat_template": has_template,
        "fewshot_as_multiturn": has_template,
        "system_instruction": request.system_prompt,
        "gen_kwargs": {},
        "batch_size": request.batch_size or default_batch_size(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "limit": request.max_rows,
        "trust_remote_code": False,
        "log_samples": True,
        "output_path": str(work / "results.json"),
    }
    if request.max_new_tokens is not None:
        settings["gen_kwargs"] = {"max_gen_toks": request.max_new_tokens}
    if request.data is not None:
        settings["include_path"] = [str(request.data.absolute()), str(work / TASKS)]
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    run_folder.write_text(work / SETTINGS, text)
    return settings


def ask(request: BenchmarkRequest) -> int:
    """Run lm-eval on the settings that were written; its progress goes to stderr.

    Returns its exit code; what went wrong was said by it. Raises Preempted where a signal to this
    process ended it, and TrainingFault where something else did.
    """
    module = "sft_recipes.evaluation.lm_eval_process"
    command = [sys.executable, "-m", module, str(request.folder / WORK / SETTINGS)]
    environment = {
        **os.environ,
        stop_request.PARENT: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if request.data is not None:
        command.append(str(request.data.absolute()))
        if (request.data / "nltk_data").is_dir():
            environment["NLTK_DATA"] = str(request.data.absolute() / "nltk_data")
    with stop_request.listening():
        # lm-eval's own tables are left out: ours say the same, with intervals.
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if stop_request.asked():
                process.terminate()
            time.sleep(_POLL)
        stop_request.raise_if_asked("while lm-eval was at work")
    if process.returncode < 0:
        what = f"lm-eval was ended by signal {-process.returncode}"
        fix = "if memory was short, try a smaller --batch_size"
        raise TrainingFault(str(Problem("lm-eval", "", what, fix)))
    return process.returncode


def write_results(request: BenchmarkRequest, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What lm-eval found, one JSON file for each benchmark, and a report of all in the folder.

    A benchmark of an earlier call stays until it is run again.
    """
    work = request.folder / WORK
    path = max(work.glob("results_*.json"), default=None)
    if path is None:  # it only warns where it cannot write
        what = "lm-eval wrote no results; what it said above tells why"
        raise TrainingFault(str(Problem(str(work), "", what, _AGAIN)))
    found = read_json(path, _AGAIN)
    written = []
    with interpreting(path, _AGAIN):
        for name in _reported(found):
            result = _result(name, found, settings, work)
            file = run_folder.BENCHMARK_FILE.replace("*", name)
            run_folder.write_json(request.folder / file, result)
            written.append(result)
    files = sorted(request.folder.glob(run_folder.BENCHMARK_FILE))
    results = [run_folder.read_json(file, _AGAIN) for file in files]
    run_folder.write_text(request.folder / REPORT, render_benchmark_report(results))
    return written


def _reported(found: Mapping[str, Any]) -> list[str]:
    """The tasks and groups that lm-eval gave scores, without the parts of a group that has its own."""
    groups = found["group_subtasks"]
    scored = []
    parts: set[str] = set()
    for name, scores in found["results"].items():
        if not any("," in key for key in scores):
            continue
        scored.append(name)
        if name in groups:
            parts.update(groups[name], _tasks_of(name, groups))
    return [name for name in scored if name not in parts]


def _tasks_of(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group at any depth; a task is its own."""
    if name not in groups:
        return [name]
    tasks = []
    for part in groups[name]:
        tasks += _tasks_of(part, groups)
    return tasks


def _result(
    name: str, found: Mapping[str, Any], settings: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """One benchmark: its scores, and everything that they depend on."""
    scores = found["results"][name]
    task = found["configs"].get(name, {})
    counts = [found["n-samples"][part] for part in _tasks_of(name, found["group_subtasks"])]
    rows = sum(count["effective"] for count in counts)
    samples = _samples(name, work)
    metrics = []
    for key, value in scores.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = scores.get(f"{metric}_stderr,{filter_name}")
        rows_of_filter = [row for row in samples if row["filter"] == filter_name]
        values = [row[metric] for row in rows_of_filter if metric in row]
        estimate = estimate_of(value, stderr, values, rows)
        metrics.append(
            {
                "metric": metric,
                "filter": filter_name,
                "value": estimate.value,
                "stderr": stderr if isinstance(stderr, float | int) else None,
                "ci_low": estimate.ci_low,
                "ci_high": estimate.ci_high,
                "n": estimate.n,
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
        )
    return {
        "benchmark": name,
        "task_version": found["versions"].get(name),
        "model": settings["model_args"]["pretrained"],
        "model_dtype": found.get("config", {}).get("model_dtype"),
        "metrics": metrics,
        "rows": rows,
        "rows_of_benchmark": sum(count["original"] for count in counts),
        "shots": found["n-shot"].get(name),
        "generation": task.get("generation_kwargs"),
        "data": task.get("dataset_kwargs", {}).get("data_files") or task.get("dataset_path"),
        "settings": dict(settings),
        "chat_template_sha256": found.get("chat_template_sha"),
        "task_hash": found.get("task_hashes", {}).get(name),
        "seconds": float(found["total_evaluation_time_seconds"]),
        "versions": {library: version(library) for library in ("lm_eval", "transformers", "torch")},
    }


def _samples(name: str, work: Path) -> list[dict[str, Any]]:
    """Every scored answer to a benchmark; a group has none of its own."""
    rows = []
    for path in work.glob(f"samples_{name}_20??-*.jsonl"):
        for line in read_json_lines(path, _AGAIN):
            rows.append(line.content)
    return rows


def estimate_of(value: Any, stderr: Any, values: Sequence[Any], n: int) -> Estimate:
    """lm-eval's value with a 95 % interval: Wilson's where it is the mean of scores in [0, 1].

    lm-eval's standard error is 0 where all answers were wrong, and says nothing there. Other values
    have the interval of their standard error, those without one none.
    """
    numbers = [score for score in values if isinstance(score, int | float) and 0 <= score <= 1]
    if numbers and len(numbers) == len(values) and isclose(fmean(numbers), value, abs_tol=1e-9):
        return proportion_of(numbers)
    if isinstance(stderr, int | float):
        return Estimate(value, n, ci_low=value - _Z95 * stderr, ci_high=value + _Z95 * stderr)
    return Estimate(value, n)
