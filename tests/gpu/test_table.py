"""The table of scripts/gpu_tests.py: known reports, and a machine without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import psutil
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
    assert rows == [
        script.Row("DDP, NCCL", "passed", 12.34, ""),
        script.Row("FSDP2", "FAILED", 1.0, "differ"),
        script.Row("ZeRO-3", "skipped", 0.0, "not installed: deepspeed"),
        script.Row("test_y", "FAILED", 0.5, "RuntimeError: CUDA"),
    ]
    lines = script.table(rows).splitlines()
    assert lines[-1] == "1 passed, 2 FAILED, 1 skipped"
    assert lines[2].split("  ")[0] == "ZeRO-3" and lines[2].endswith("not installed: deepspeed")


def test_every_test_has_its_process_and_its_limit(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that hangs is killed with what it started; one that cannot even report is FAILED with its last words."""
    started = tmp_path / "child"
    hang = (
        "import subprocess, time; from pathlib import Path\n"
        f"child = subprocess.Popen(['sleep', '300']); Path({str(started)!r}).write_text(str(child.pid))\n"
        "time.sleep(300)"
    )
    monkeypatch.setattr(script, "pytest_command", lambda *_: [sys.executable, "-c", hang])
    row = script.run_test("t.py::test_x[hangs]", tmp_path, 3.0)
    assert (row.name, row.result, row.why) == ("hangs", "FAILED", "not done within the limit")
    child = int(started.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    broken = [sys.executable, "-c", "raise SystemExit('no such module')"]
    monkeypatch.setattr(script, "pytest_command", lambda *_: broken)
    assert script.run_test("t.py::test_y", tmp_path, 60.0).why == "exit code 1: no such module"


def test_the_tests_are_listed(script: ModuleType) -> None:
    """All tests marked gpu are found, risky ones at the end of theirs."""
    tests = [script.short_name(test) for test in script.collect(["tests/gpu"])]
    assert {"DDP, NCCL", "one GPU, packed, varlen", "ZeRO-3, offload"} <= set(tests)
    assert tests.index("ZeRO-3, offload") > tests.index("ZeRO-3, LoRA")


@pytest.mark.parametrize(
    ("kept", "code"), [([0, 2], 0), ([0, 1, 2], 1), ([3], 1), ([2], 4), ([], 4)]
)
def test_exit_codes(kept: list[int], code: int, script: ModuleType) -> None:
    """Something failed: 1; nothing ran: 4; else 0."""
    rows = script.read_rows(REPORT)
    assert script.exit_code([rows[index] for index in kept]) == code
