"""Run everything that needs a GPU on this machine and print a table: passed, failed or skipped, and why.

    python scripts/gpu_tests.py [-n 6] [--limit 170] [--output DIR] [more arguments for pytest]

Each test runs in a process of its own, `-n` of them at a time, and is printed when it ends: what is
stopped in the middle has shown what it knew. DIR keeps all that a failed test printed. Strategies
run on as many GPUs as there are. Exit code: 0 all that could run passed, 1 something failed, 4
nothing ran.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = {"failure": "FAILED", "error": "FAILED", "skipped": "skipped"}
LONGEST_REASON = 160


@dataclass(frozen=True)
class Row:
    """One test: its name, what became of it, seconds, and the first line of why."""

    name: str
    result: str
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        text = f"{self.name:40} {self.result:7} {self.seconds:6.1f} s  {self.why}"
        return text[: 58 + LONGEST_REASON].rstrip()


def short_name(test: str) -> str:
    """What stands in brackets behind a parametrized test, or the test's own name."""
    return test.partition("[")[2].rstrip("]") or test.rpartition("::")[2]


def read_rows(report: str) -> list[Row]:
    """The tests of a JUnit XML report as pytest writes it."""
    rows = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        result, why = "passed", ""
        for child in case:
            if child.tag in RESULTS:
                result = RESULTS[child.tag]
                lines = (child.get("message") or "").strip().splitlines()
                why = lines[0] if lines else ""
        rows.append(Row(short_name(case.get("name", "")), result, float(case.get("time", 0)), why))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows, and how many of them ended how."""
    counts = Counter(row.result for row in rows)
    ends = [f"{counts[result]} {result}" for result in ("passed", "FAILED", "skipped")]
    return "\n".join([*map(str, rows), "", ", ".join(ends)])


def exit_code(rows: Sequence[Row]) -> int:
    """1 if something failed, 4 if nothing ran, else 0."""
    results = {row.result for row in rows}
    if "FAILED" in results:
        return 1
    return 0 if "passed" in results else 4


def devices() -> str:
    """The GPUs by name, in words."""
    import torch

    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    listed = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU"
    return f"{listed}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def pytest_command(*arguments: str) -> list[str]:
    """pytest by the Python that runs this script."""
    return [sys.executable, "-m", "pytest", "-q", *arguments]


def collect(arguments: Sequence[str]) -> list[str]:
    """The tests that need a GPU, in their order. Raises SystemExit with pytest's words if it cannot list them."""
    command = pytest_command("--collect-only", "-m", "gpu", *arguments)
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode not in (0, 5):
        sys.exit(listed.stdout + listed.stderr)
    return tests


def run_test(test: str, folder: Path, limit: float, output: Path | None = None) -> Row:
    """Run one test; its whole group of processes is killed after `limit` seconds.

    What it printed is kept in `output` where it failed.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    report, printed = own / "report.xml", own / "printed.txt"
    command = pytest_command("-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", test)
    with (
        printed.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    row = row_of(test, report, printed, process.returncode, limit)
    if row.result == "FAILED" and output is not None:
        name = re.sub(r"[^\w-]+", "_", row.name)
        shutil.copy(printed, output / f"{name}.txt")
    return row


def row_of(test: str, report: Path, printed: Path, code: int, limit: float) -> Row:
    """What became of a test that has ended or was killed."""
    if report.is_file():
        return read_rows(report.read_text(encoding="utf-8"))[0]
    if code == -signal.SIGKILL:
        return Row(short_name(test), "FAILED", limit, "not done within the limit")
    lines = printed.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return Row(short_name(test), "FAILED", 0.0, f"exit code {code}: {lines[-1]}")


def main() -> int:
    """Run the tests, print each as it ends, then all in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=1, help="tests at a time")
    parser.add_argument("--limit", type=float, default=170, help="seconds for one test")
    parser.add_argument("--output", type=Path, help="folder for what failed tests printed")
    options, arguments = parser.parse_known_args()
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    print(devices(), flush=True)
    tests = collect(arguments)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.n) as pool:
        limits = (Path(folder), options.limit, options.output)
        running = {pool.submit(run_test, test, *limits): test for test in tests}
        for future in as_completed(running):
            row = future.result()
            rows[running[future]] = row
            print(row, flush=True)
    ordered = [rows[test] for test in tests]
    print(f"\n{table(ordered)}")
    return exit_code(ordered)


if __name__ == "__main__":
    sys.exit(main())
