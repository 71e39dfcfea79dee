"""The table of scripts/gpu_tests.py: known reports, and a machine without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_tests.py"
REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="t" name="test_x[DDP, NCCL]" time="12.34"/>
<testcase classname="t" name="test_x[FSDP2]" time="1"><failure message="differ&#10;more"/></testcase>
<testcase classname="t" name="test_x[ZeRO-3]" time="0"><skipped message="not installed: deepspeed"/></testcase>
<testcase classname="t" name="test_y" time="0.5"><error message="RuntimeError: CUDA"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_tests", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_known_report(script: ModuleType) -> None:
    """Name, result, time and the first line of the reason of each test, and the sums."""
    rows = script.read_rows(REPORT)
    assert [(row.name, row.result, row.seconds, row.why) for row in rows] == [
        ("DDP, NCCL", "passed", 12.34, ""),
        ("FSDP2", "FAILED", 1.0, "differ"),
        ("ZeRO-3", "skipped", 0.0, "not installed: deepspeed"),
        ("test_y", "FAILED", 0.5, "RuntimeError: CUDA"),
    ]
    assert script.table(rows).splitlines()[-1] == "1 passed, 2 FAILED, 1 skipped"
    assert (
        script.table(rows).splitlines()[2]
        == "ZeRO-3     skipped      0.0 s  not installed: deepspeed"
    )


@pytest.mark.parametrize(
    ("kept", "code"), [([0, 2], 0), ([0, 1, 2], 1), ([3], 1), ([2], 4), ([], 4)]
)
def test_exit_codes(kept: list[int], code: int, script: ModuleType) -> None:
    """Something failed: 1; nothing ran: 4; else 0."""
    rows = script.read_rows(REPORT)
    assert script.exit_code([rows[index] for index in kept]) == code
