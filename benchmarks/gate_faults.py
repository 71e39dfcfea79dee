"""Mutation score of the gate: twenty faults put into the quickstart one at a time, and twenty healthy seeds of it.

    python -m benchmarks.gate_faults [--work DIR] [--jobs 2] [--seeds 20] [--only NAME ...] [--json]

Each case is the real loop: `check`, then `train`, then `evaluate --gate recipes/quickstart/gate.yaml` against the base
on the 600 test rows as they ship. It is stopped by the first that refuses. "Callback" stands for the metrics logged
inside training on 64 rows: raised where the last of them, by the gate's own one-sided 95 % bounds, break a limit of the
gate. The faults are in `fault_injections.py`. Wanted: at least 18 of 20 faults caught, at most 1 of 20 seeds flagged;
the exit code is 1 otherwise. An inconclusive gate is counted by itself.

Two at a time on two cores a case took two minutes, and up to eight where others worked on them, too; twenty epochs took
fourteen. DIR keeps `results.jsonl`, and cases in it are not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.fault_injections import FAULTS, QUICKSTART, Fault, read_rows
from sft_recipes.data.chat_templates import load_chat_template
from sft_recipes.evaluation.gate import read_gate
from sft_recipes.evaluation.gate_bounds import ALPHA
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.statistics import proportion

ROOT = Path(__file__).resolve().parents[1]
GATE = QUICKSTART / "gate.yaml"
# As in the recipe, but generated at every epoch however long it takes: what is logged then depends on no clock.
IN_TRAINING = {"rows": 64, "max_new_tokens": 48, "batch_size": 64, "max_share": None}
ANSWERS = ("--max_new_tokens", "48", "--batch_size", "200", "--examples", "0", "--json")
# See scripts/quickstart/run.py.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
LEAST_CAUGHT, MOST_FLAGGED = 18, 1


def run_command(fault: str, *arguments: str, log: Path) -> tuple[int, str]:
    """Exit code and stdout of one command with the fault in it; what it said on stderr is appended to `log`.

    Raises RuntimeError where the command broke down instead of saying what is wrong: that catches nothing.
    """
    command = [sys.executable, "-m", "benchmarks.fault_injections", fault, *arguments]
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(arguments)}\n{done.stderr}")
    if "Traceback (most recent call last)" in done.stderr or done.returncode < 0:
        raise RuntimeError(
            f"{fault or 'healthy'} {arguments[0]}: exit code {done.returncode}, see {log}"
        )
    return done.returncode, done.stdout


def overrides(fault: Fault, folder: Path) -> list[str]:
    """Write what the fault changes on disk to `folder`; returns the recipe's overrides."""
    keys: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "evaluation": IN_TRAINING,
        "disable_tqdm": True,
    }
    if fault.data is not None:
        shutil.copytree(QUICKSTART / "data", folder / "data")
        lines = (
            json.dumps(row, ensure_ascii=False) + "\n" for row in fault.data(read_rows("train"))
        )
        (folder / "data" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        keys["dataset_name"] = str(folder / "data")
    if fault.template is not None:
        (folder / "template.jinja").write_text(
            fault.template(load_chat_template("instruction")), encoding="utf-8"
        )
        keys["chat_template"] = str(folder / "template.jinja")
    return [
        text
        for key, value in {**keys, **fault.keys}.items()
        for text in (f"--{key}", json.dumps(value))
    ]


def broken_limits(log: Path, gate: Path = GATE) -> list[str]:
    """Metrics whose last values inside training break a limit of the gate, beyond what 64 rows leave open."""
    entries = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if log.is_file()
        else []
    )
    logged: dict[str, float] = {
        key.removeprefix("eval_"): value for entry in entries for key, value in entry.items()
    }
    rows = int(IN_TRAINING["rows"] or 0)
    broken = []
    for bound in read_gate(gate):
        if (
            bound.metric in METRICS
            and METRICS[bound.metric].is_yes_or_no
            and bound.metric in logged
            and not (bound.by or bound.compared_with)
        ):
            found = proportion(logged[bound.metric] * rows, rows, confidence=1 - 2 * ALPHA)
            if not bound.keeps(
                float(found.ci_high or 0) if bound.at_most is None else float(found.ci_low or 0)
            ):
                broken.append(bound.metric)
    return broken


def run_case(name: str, fault: Fault, work: Path) -> dict[str, Any]:
    """Run one case to the end or to the first refusal. `caught_by` is "" where everything passed."""
    folder, started = work / name.replace("/", "-"), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, injected = folder / "stderr.txt", name if name in FAULTS else ""
    recipe = [str(QUICKSTART / f"{fault.recipe}.yaml"), *overrides(fault, folder)]
    case: dict[str, Any] = {"name": name, "what": fault.what, "where": fault.where}
    case |= {
        "caught_by": "",
        "message": "",
        "callback": [],
        "gate": "",
        "broken": [],
        "exact_match": None,
    }
    for step in ("check", "train"):
        code, _ = run_command(injected, step, *recipe, log=log)
        if code:
            said = log.read_text(encoding="utf-8").rpartition("\n$ ")[2].splitlines()[1:]
            message = next((line for line in said if "Fix: " in line), said[-1] if said else "")
            # Code 3 is a run that went wrong, 1 and 2 are recipes that were never begun.
            case |= {
                "caught_by": "training fault" if code == 3 else f"{step} refused",
                "message": message,
            }
            break
    else:
        case |= judge_run(injected, fault, folder, work / "base")
    shutil.rmtree(folder / "run", ignore_errors=True)
    return {**case, "seconds": round(time.monotonic() - started)}


def judge_run(injected: str, fault: Fault, folder: Path, base: Path) -> dict[str, Any]:
    """What the callback and the gate say of a finished run."""
    callback = broken_limits(folder / "run" / "log.jsonl")
    options = [
        "--data",
        str(QUICKSTART / "data"),
        "--base",
        str(base),
        "--gate",
        str(GATE),
        *fault.options,
        *ANSWERS,
    ]
    output = ["--output", str(folder / "evaluation")]
    _, said = run_command(
        injected, "evaluate", str(folder / "run"), *options, *output, log=folder / "stderr.txt"
    )
    content = json.loads(said)
    verdict = content["gate"]["verdict"]
    lines = [line for line in content["gate"]["lines"] if line["verdict"] != "pass"]
    broken = [f"{line['name']} {line['group']}".strip() for line in lines]
    found = {"callback": callback, "gate": verdict, "broken": broken}
    found |= {key: content["metrics"][key]["value"] for key in ("exact_match", "eos_rate")}
    by_gate = {"pass": "", "fail": "gate"}.get(verdict, "gate inconclusive")
    return {**found, "caught_by": "callback" if callback else by_gate}


def healthy(seed: int) -> Fault:
    """The recipe as it ships, with other seeds."""
    return Fault(f"no fault, seed {seed}", "", keys={"seed": seed, "data_seed": seed})


def run_cases(cases: Mapping[str, Fault], work: Path, jobs: int) -> list[dict[str, Any]]:
    """All cases in order, those in DIR's `results.jsonl` as they stand there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base" / "samples.jsonl").is_file():
        data = ("--data", str(QUICKSTART / "data"), "--output", str(work / "base"))
        run_command(
            "", "evaluate", str(QUICKSTART / "base"), *data, *ANSWERS, log=work / "base.txt"
        )
    results, lock = work / "results.jsonl", threading.Lock()
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    done = {case["name"]: case for case in map(json.loads, lines)}

    def run(name: str) -> None:
        case = run_case(name, cases[name], work)
        with lock, results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(case, ensure_ascii=False) + "\n")
            done[name] = case

    waiting = [name for name in cases if name not in done]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(waiting), desc="cases") as bar:
        for _ in pool.map(run, waiting):
            bar.update()
    return [done[name] for name in cases]


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over the cases: of the faults who caught them first, of the healthy seeds what was said against them."""
    faults = [case for case in results if case["where"]]
    seeds = [case for case in results if not case["where"]]
    open_cases = "gate inconclusive"
    return {
        "faults": len(faults),
        "caught": sum(case["caught_by"] not in ("", open_cases) for case in faults),
        "faults_inconclusive": sum(case["caught_by"] == open_cases for case in faults),
        "caught_by": dict(Counter(case["caught_by"] or "nothing" for case in faults).most_common()),
        "seeds": len(seeds),
        "flagged": sum(case["caught_by"] not in ("", open_cases) for case in seeds),
        "seeds_inconclusive": sum(case["caught_by"] == open_cases for case in seeds),
    }


def as_text(results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The table, a case a line, and the counts."""
    form = "{:24} {:20} {:18} {:18} {:13} {:>6} {:>5}  {}"
    lines = [
        form.format("case", "injected into", "caught by", "callback", "gate", "exact", "EOS", "why")
    ]
    for case in results:
        numbers = [
            "" if case.get(key) is None else f"{case[key]:.3f}"
            for key in ("exact_match", "eos_rate")
        ]
        # Of one limit by task type, how many types broke it.
        broken = Counter(
            " ".join(name.split()[: 2 if name.startswith("flag") else 1]) for name in case["broken"]
        )
        why = case["message"] or ", ".join(
            f"{name} x{count}" if count > 1 else name for name, count in broken.items()
        )
        callback = ", ".join(case["callback"])
        head = (
            case["name"],
            case["where"],
            case["caught_by"] or "-",
            callback,
            case["gate"] or "not reached",
        )
        lines.append(form.format(*head, *numbers, why))
    by = ", ".join(f"{name} {count}" for name, count in summary["caught_by"].items())
    text = "{caught} of {faults} faults caught, {faults_inconclusive} more inconclusive"
    lines += ["", text.format(**summary) + f" ({by})"] if summary["faults"] else []
    text = "{flagged} of {seeds} healthy seeds flagged, {seeds_inconclusive} more inconclusive"
    return "\n".join([*lines, text.format(**summary)] if summary["seeds"] else lines)


def main() -> int:
    """Run what was asked for and print it; 1 if the score is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder to work in and to resume from (default: a temporary one)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--seeds", type=int, default=20, help="healthy seeds")
    parser.add_argument(
        "--only", nargs="*", choices=FAULTS, help="these faults; without names none"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args()
    cases = {
        name: fault
        for name, fault in FAULTS.items()
        if options.only is None or name in options.only
    }
    cases |= {f"seed-{seed}": healthy(seed) for seed in range(1, options.seeds + 1)}
    with tempfile.TemporaryDirectory() as temporary:
        results = run_cases(cases, (options.work or Path(temporary)).resolve(), options.jobs)
    summary = summarise(results)
    if options.json:
        print(json.dumps({**summary, "cases": results}, ensure_ascii=False, indent=2))
    else:
        print(as_text(results, summary))
    missed = summary["faults"] - summary["caught"]
    return int(missed > len(FAULTS) - LEAST_CAUGHT or summary["flagged"] > MOST_FLAGGED)


if __name__ == "__main__":
    sys.exit(main())
