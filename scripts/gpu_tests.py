"""Run everything that needs a GPU on this machine and print a table: passed, failed or skipped, and why.

    python scripts/gpu_tests.py [more arguments for pytest]

Strategies run on as many GPUs as there are. Exit code: 0 all that could run passed, 1 something failed, 4 nothing ran.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """One test: its name, what became of it, seconds, and the first line of why."""

    name: str
    result: str
    seconds: float
    why: str


def read_rows(report: str) -> list[Row]:
    """The tests of a JUnit XML report as pytest writes it."""
    rows = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        ends = {child.tag: child.get("message") or "" for child in case}
        result = next((tag for tag in ("failure", "error", "skipped") if tag in ends), "passed")
        name = case.get("name", "").partition("[")[2].rstrip("]") or case.get("name", "")
        why = next(iter(ends.get(result, "").strip().splitlines()), "")
        shown = {"failure": "FAILED", "error": "FAILED"}.get(result, result)
        rows.append(Row(name, shown, float(case.get("time", 0)), why))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned, and their sum."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [
        f"{row.name:{width}}  {row.result:7}  {row.seconds:7.1f} s  {row.why[:160]}".rstrip()
        for row in rows
    ]
    counts = Counter(row.result for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            ", ".join(f"{counts[name]} {name}" for name in ("passed", "FAILED", "skipped")),
        ]
    )


def exit_code(rows: Sequence[Row]) -> int:
    """1 if something failed, 4 if nothing ran, else 0."""
    results = {row.result for row in rows}
    return 1 if "FAILED" in results else 0 if "passed" in results else 4


def gpus() -> str:
    """The GPUs by name, in words."""
    import torch

    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    found = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU"
    return f"{found}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> int:
    """Run pytest, then print what it found."""
    print(gpus(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            f"--junitxml={report}",
            *sys.argv[1:],
        ]
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        if not report.is_file():
            return code or 1
        rows = read_rows(report.read_text(encoding="utf-8"))
    print(f"\n{table(rows)}")
    return exit_code(rows) or (code if code not in (0, 5) else 0)


if __name__ == "__main__":
    sys.exit(main())
