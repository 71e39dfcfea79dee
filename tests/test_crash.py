"""Every way out of the command line has its own exit code, and none but a gate or check says 1."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import cli, cli_init, crash
from sft_recipes.data.opening import loading
from sft_recipes.errors import CheckFailed, HubUnavailable, InputError, Preempted, Problem

ENDINGS: dict[str, tuple[BaseException, int, str]] = {
    "wrong input": (InputError(Problem("f", "k", "is wrong", "mend it")), 2, "f: k: is wrong"),
    "a check": (CheckFailed("no"), 1, "no"),
    "no Hub": (HubUnavailable("no answer"), 3, "no answer"),
    "SIGTERM": (Preempted("stopped"), 75, "stopped"),
    "SIGINT": (Preempted("stopped", signal.SIGINT), 130, "stopped"),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
    "a fault": (KeyError("rows"), 70, "internal error at"),
    "a fault with lines": (ValueError("a\nb"), 70, "ValueError: a b"),
    "memory": (MemoryError(), 70, "MemoryError"),
    "recursion": (RecursionError("deep"), 70, "RecursionError"),
    "an assertion": (AssertionError(), 70, "AssertionError"),
    "no space": (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left on device"),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only"),
    "no space in safetensors": (
        RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),
        2,
        "no space left on device",
    ),
    "an OSError of a library": (OSError("something"), 70, "OSError: something"),
    "exit 1 of a gate": (cli.typer.Exit(1), 1, ""),
    "nobody reads": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_codes(
    ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a command raises ends with its code and at most one line, without a traceback."""
    error, code, message = ENDINGS[ending]

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli_init, "list_shipped", broken)
    assert cli.run(["init"]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert said.count("\n") <= 1


def test_a_fault_says_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the place and the command; with --debug, before or behind the command, the traceback is shown."""

    def broken(*_: Any) -> None:
        return {}["rows"]

    monkeypatch.setattr(cli_init, "list_shipped", broken)
    monkeypatch.setattr(sys, "argv", ["/bin/sft-recipes", "init"])
    monkeypatch.setenv(crash.DEBUG, "")
    cli.run(["init"])
    said = capsys.readouterr().err
    assert "sft_recipes/cli_init.py:" in said
    assert (
        "KeyError: 'rows'. Fix: report it with what this prints: sft-recipes --debug init" in said
    )
    for arguments in (["--debug", "init"], ["init", "--debug"]):
        monkeypatch.setenv(crash.DEBUG, "")
        assert cli.run(arguments) == 70
        assert "Traceback" in capsys.readouterr().err


def test_no_space_behind_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is found below what a library made of it, and the folders with their free space are named."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/rows.arrow")
        except OSError as error:
            raise RuntimeError("could not generate the data set") from error
    except RuntimeError as error:
        assert crash.tell(error) == 2
    said = capsys.readouterr().err
    assert "/tmp/rows.arrow: no space left on device" in said
    assert "GB left at" in said and "TMPDIR" in said


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    """For a model and a data set alike a server that refuses the connection is exit code 3 with the name, and the wish
    to stay offline is wrong input.
    """

    def raised(kinds: Sequence[BaseException]) -> BaseException:
        error: BaseException | None = None
        for kind in kinds:
            kind.__cause__ = error
            error = kind
        return error or ValueError()

    class TransportError(Exception):
        """As the Hub's client calls it."""

    class OfflineModeIsEnabled(ConnectionError):
        """As the Hub's client calls it."""

    for kinds, silent in (
        ([TransportError(), OSError("could not connect")], True),
        ([ConnectionRefusedError(), RuntimeError(), OSError()], True),
        ([TimeoutError()], True),
        ([OfflineModeIsEnabled(), OSError()], False),
        ([ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")], False),
        ([FileNotFoundError()], False),
        ([ValueError("no such repository")], False),
    ):
        error = raised(kinds)
        assert crash.is_network_down(error) == silent
        expected = HubUnavailable if silent else InputError
        with pytest.raises(expected, match="org/model"), loading("org/model", "model"):
            raise error


COMMANDS = {
    "command": ["sft_recipes", "train", "{}"],
    "module": ["sft_recipes.training.train", "--config", "{}"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_while_modules_load(name: str, number: int, code: int, tmp_path: Path) -> None:
    """A signal that comes before torch is imported ends the run with its code, and no traceback."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: ./none\ndataset_name: ./none.jsonl\noutput_dir: ./run\n")
    command = [sys.executable, "-X", "importtime", "-m"]
    command += [part.format(recipe) for part in COMMANDS[name]]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True) as process:
        for line in process.stderr:
            if line.endswith(" torch.version\n"):  # one of the first things that torch imports
                break
        os.kill(process.pid, number)
        said = process.stderr.read()
        process.wait(60)
    assert process.returncode == code, said[-2000:]
    assert "Traceback" not in said
    assert "while modules were loaded" in said
