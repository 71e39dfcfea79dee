"""Mutation score of the gate: twenty faults put into the quickstart one at a time, and twenty healthy seeds of it.

    python -m benchmarks.gate_faults [--work DIR] [--jobs 2] [--seeds 20] [--only NAME ...] [--json]

Each case is the real loop: `check`, then `train`, then `evaluate --gate recipes/quickstart/gate.yaml` against the base
on the 600 test rows as they ship. It is stopped by the first that refuses. "Callback" stands for the metrics logged
inside training on 64 rows: raised where the last of them, by the gate's own one-sided 95 % bounds, break a limit of the
gate. The faults are in `fault_injections.py`. Wanted: at least 18 of 20 faults caught, at most 1 of 20 seeds flagged;
the exit code is 1 otherwise. An inconclusive gate is counted by itself.

Where a fault changes training rows, the evaluation also lists the rows that the model finds hardest (`--suspects`), and
the table says how many of those listed are rows with the fault: what a person would see of a fault that no gate does.

Two at a time on two cores a case took two minutes, and up to eight where others worked on them, too; twenty epochs took
fourteen. DIR keeps each finished case, so that the command may be stopped and given again, or run several times at
once: a case is run by one process, and again where code, recipe or rows are no longer those that it was run with.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.fault_injections import FAULTS, QUICKSTART, Fault, read_rows
from sft_recipes.data.chat_templates import load_chat_template
from sft_recipes.evaluation.gate import read_gate
from sft_recipes.evaluation.gate_bounds import ALPHA
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.evaluation.suspects import FILE as SUSPECTS
from sft_recipes.run_folder import write_json
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
# What a finished case depends on, with its library versions.
MEASURED = ("sft_recipes", "benchmarks", "recipes/quickstart")


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
    folder, started = work / folder_name(name), time.monotonic()
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
            # Code 3 is a run that went wrong, 1 and 2 are recipes that were never begun.
            case["caught_by"] = "training fault" if code == 3 else f"{step} refused"
            case["message"] = last_message(log)
            break
    else:
        case |= judge_run(injected, fault, folder, base_folder(work))
    shutil.rmtree(folder / "run", ignore_errors=True)
    return {**case, "seconds": round(time.monotonic() - started)}


def base_folder(work: Path) -> Path:
    """Where the base's answers stand, as this code asks for them."""
    return work / f"base-{fingerprint()}"


def folder_name(name: str) -> str:
    """The folder of a case, below DIR."""
    return name.replace("/", "-")


def last_message(log: Path) -> str:
    """What the last command in a log said was wrong."""
    said = log.read_text(encoding="utf-8").rpartition("\n$ ")[2].splitlines()[1:]
    for line in said:
        if "Fix: " in line:
            return line
    return said[-1] if said else ""


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
    if fault.data is not None:
        options.append("--suspects")
    output = ["--output", str(folder / "evaluation")]
    log = folder / "stderr.txt"
    code, said = run_command(injected, "evaluate", str(folder / "run"), *options, *output, log=log)
    if code == 2:
        return {"caught_by": "evaluate refused", "message": last_message(log)}
    content = json.loads(said)
    verdict = content["gate"]["verdict"]
    lines = [line for line in content["gate"]["lines"] if line["verdict"] != "pass"]
    broken = [f"{line['name']} {line['group']}".strip() for line in lines]
    found: dict[str, Any] = {"callback": callback, "gate": verdict, "broken": broken}
    if fault.data is not None:
        found["suspects"] = suspected_rows(folder)
    found |= {key: content["metrics"][key]["value"] for key in ("exact_match", "eos_rate")}
    by_gate = {"pass": "", "fail": "gate"}.get(verdict, "gate inconclusive")
    return {**found, "caught_by": "callback" if callback else by_gate}


def suspected_rows(folder: Path) -> dict[str, int] | None:
    """How many of the rows that the evaluation lists have the fault; None where rows were added or left out."""
    clean = read_rows("train")
    text = (folder / "data" / "train.jsonl").read_text(encoding="utf-8")
    trained = [json.loads(line) for line in text.splitlines()]
    if len(trained) != len(clean):
        return None
    faulty = set()
    for number, (row, original) in enumerate(zip(trained, clean, strict=True), 1):
        if row != original:
            faulty.add(f"train.jsonl:{number}")
    listed = []
    for line in (folder / "evaluation" / SUSPECTS).read_text(encoding="utf-8").splitlines():
        listed.append(Path(json.loads(line)["where"]).name)
    return {
        "listed": len(listed),
        "faulty_listed": len(faulty.intersection(listed)),
        "faulty": len(faulty),
        "rows": len(clean),
    }


def healthy(seed: int) -> Fault:
    """The recipe as it ships, with other seeds."""
    return Fault(f"no fault, seed {seed}", "", keys={"seed": seed, "data_seed": seed})


def run_cases(cases: Mapping[str, Fault], work: Path, jobs: int) -> list[dict[str, Any]]:
    """All cases in order; those that DIR holds are not run again."""
    work.mkdir(parents=True, exist_ok=True)
    code = fingerprint()
    with only_process(work / "base.lock"):
        base = base_folder(work)
        if not (base / "samples.jsonl").is_file():
            data = ("--data", str(QUICKSTART / "data"), "--output", str(base))
            log = work / "base.txt"
            run_command("", "evaluate", str(QUICKSTART / "base"), *data, *ANSWERS, log=log)

    def run(name: str) -> None:
        with only_process(work / f"{folder_name(name)}.lock"):
            # Another process may have run it while this one waited.
            if finished_case(work, name, code) is None:
                case = {**run_case(name, cases[name], work), "code": code}
                write_json(work / f"{folder_name(name)}.json", case)

    waiting = [name for name in cases if finished_case(work, name, code) is None]
    # Processes at work on the same cases begin with different ones and meet as late as can be.
    start = os.getpid() % max(len(waiting), 1)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(waiting), desc="cases") as bar:
        for _ in pool.map(run, waiting[start:] + waiting[:start]):
            bar.update()
    return [finished_case(work, name, code) or {} for name in cases]


def finished_case(work: Path, name: str, code: str) -> dict[str, Any] | None:
    """A case that was run to its end with this very code, if there is one."""
    path = work / f"{folder_name(name)}.json"
    if not path.is_file():
        return None
    case: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return case if case["code"] == code else None


@contextlib.contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Wait until no other process holds this lock; one that is killed lets go of it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint() -> str:
    """What is measured: the contents of the package, the benchmark and the quickstart."""
    digest = hashlib.sha256()
    for name in MEASURED:
        for path in sorted((ROOT / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, and whether files differ from it; nothing outside of git."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


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
        if case.get("suspects"):
            why = f"{why}; " * bool(why) + suspects_as_text(case["suspects"])
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


def suspects_as_text(suspects: Mapping[str, int]) -> str:
    """Of the listed training rows how many have the fault, beside what a draw would find."""
    rate = suspects["faulty"] / suspects["rows"]
    return (
        f"of {suspects['listed']} rows listed as hardest {suspects['faulty_listed']} have the fault, "
        f"which {suspects['faulty']} of {suspects['rows']} have ({100 * rate:.1f} %)"
    )


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
        print(
            json.dumps(
                {"commit": commit(), **summary, "cases": results}, ensure_ascii=False, indent=2
            )
        )
    else:
        print(f"commit {commit()}, code {fingerprint()}\n\n{as_text(results, summary)}")
    missed = summary["faults"] - summary["caught"]
    return int(missed > len(FAULTS) - LEAST_CAUGHT or summary["flagged"] > MOST_FLAGGED)


if __name__ == "__main__":
    sys.exit(main())
