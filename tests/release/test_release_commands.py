"""`sft-recipes export` and `push`: what they print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_recipes import cli
from tests.release.conftest import write_evaluation
from tests.release.hub_server import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `sft-recipes ARGUMENTS`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sft-recipes", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_export_prints_what_it_found(
    make_run: Callable[..., Path], run_command: Callable[..., tuple]
) -> None:
    """Text names the differences, the checks and the next commands; --json prints nothing but the same as JSON."""
    run = make_run("lora")
    code, out, _ = run_command("export", run, "--force")
    assert code == 0
    for text in (
        "merged against trained",
        "saved against trained",
        "EOS",
        "training ids are serving ids",
    ):
        assert text in out
    for command in (
        "transformers serve",
        "trl dpo --model_name_or_path",
        f"sft-recipes push {run} --repo",
    ):
        assert command in out
    code, out, _ = run_command("export", run, "--output", run / "second", "--json")
    assert code == 0 and json.loads(out)["folder"] == str(run / "second")


def test_export_refuses_with_code_2(tmp_path: Path, run_command: Callable[..., tuple]) -> None:
    """A folder that is no run is wrong input."""
    code, _, err = run_command("export", tmp_path)
    assert code == 2 and "the folder holds no model. Fix:" in err


def test_push_prints_files_and_address(
    make_run: Callable[..., Path], hub: Hub, run_command: Callable[..., tuple]
) -> None:
    """Every pushed file is named; --json says the same; a failed gate is code 1 and can be overruled."""
    run = make_run("lora")
    code, out, _ = run_command("push", run, "--repo", "me/model")
    assert code == 0 and "model.safetensors\n" in out and f"pushed: {hub.url}/me/model" in out
    arguments = (
        "push",
        run,
        "--repo",
        "me/adapter",
        "--adapter_only",
        "--base_model",
        "me/base",
        "--public",
        "--json",
    )
    code, out, _ = run_command(*arguments)
    pushed = json.loads(out)
    assert (
        code == 0 and "adapter_model.safetensors" in pushed["files"] and pushed["private"] is False
    )
    write_evaluation(run, gate={"verdict": "fail", "exit_code": 1, "smoke": False, "lines": []})
    code, _, err = run_command("push", run, "--repo", "me/model")
    assert code == 1 and "the gate says fail" in err
    assert run_command("push", run, "--repo", "me/model", "--allow_failed_gate")[0] == 0
