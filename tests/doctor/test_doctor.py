"""What the doctor finds in runs of any tool: nothing in a healthy one, each fault in one that has it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft_recipes import cli
from sft_recipes.doctor.doctor import examine
from sft_recipes.errors import InputError
from tests.doctor.faults import FAULTS
from tests.doctor.runs import (
    ADAPTER,
    STATE,
    edit_json,
    edit_tensors,
    write_state,
)

# What a fault brings with it by itself: a finding of a second check that is right as well.
ALSO_FOUND = {
    "NaN": {"differs from its base"},
    "adapter NaN": {"merged weights"},
    "no effect": {"merged weights"},
    "alpha 0": {"merged weights"},
    "a part without effect": {"merged weights"},
    "other base": {"merged weights", "end of an answer"},
    "template broken": {"template of the base"},
    "end inside": {"template of the base"},
    "template of text": {"template of the base"},
    "no row for an id": {"shapes fit the config"},
    "no base": set(),
}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_is_found_in_a_healthy_run(kind: str, project: Path) -> None:
    """All checks that its files allow look, and none finds anything; what was not looked at says why."""
    base = project / "base" if kind == "full" else None
    report = examine(project / kind, base)
    assert not report.findings
    missed = {look.check: look.not_seen for look in report.looks if look.not_seen}
    expected = {
        "lora": {"checkpoints are whole", "shapes fit the config", "differs from its base"},
        "full": {
            "checkpoints are whole",
            "adapter has an effect",
            "base of the adapter",
            "merged weights",
            "new tokens",
        },
    }
    assert missed.keys() == expected[kind] and all(missed.values())
    assert all(look.seen for look in report.looked_at)
    assert report.not_read == ["training_args.bin"]
    assert "nothing is wrong with what was looked at" in report.verdict


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_no_other(name: str, project: Path) -> None:
    """One finding, in its check, as grave as it is, with a fix; other checks stay silent."""
    fault = FAULTS[name]
    run = project / fault.kind
    fault.damage(run)
    base = project / "base" if fault.kind == "full" else None
    report = examine(run, base)
    found = {finding.check for finding in report.findings}
    assert fault.check in found and found <= {fault.check} | ALSO_FOUND.get(name, set())
    finding = next(finding for finding in report.findings if finding.check == fault.check)
    assert fault.text in finding.what and finding.severity == fault.severity
    assert finding.fix and Path(finding.where).is_relative_to(project)
    assert report.findings[0].severity == min(
        (finding.severity for finding in report.findings), key=("error", "warning", "note").index
    )


class Canary:
    """Unpickled with code allowed, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "pytorch_model.bin"])
def test_pickles_are_never_opened(name: str, project: Path) -> None:
    """One with code in it is named as not read, and its code does not run."""
    canary = project / "canary"
    (project / "full" / name).write_bytes(pickle.dumps(Canary(canary), protocol=2))
    if name == "pytorch_model.bin":
        (project / "full/model.safetensors").unlink()
    report = examine(project / "full", project / "base")
    assert name in report.not_read and not canary.exists()


DAMAGED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "model.safetensors",
]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\0", b'{"log_history": 3}'])
@pytest.mark.parametrize("file", DAMAGED)
def test_damaged_files_are_findings(file: str, content: bytes, project: Path) -> None:
    """Whatever stands in a file, the doctor goes on, and names the file with a fix."""
    (project / "full" / file).write_bytes(content)
    report = examine(project / "full", project / "base")
    if content == b'{"log_history": 3}' and file in (
        "generation_config.json",
        "tokenizer_config.json",
    ):
        return  # what is not in it stands in another file as well
    assert any(
        file.split(".")[0].split("_")[0] in f"{finding.where} {finding.what}"
        for finding in report.findings
    )
    assert all(finding.fix for finding in report.findings)


@pytest.mark.parametrize("name", ["", "nothing", "file.txt"])
def test_where_nothing_is_nothing_is_said_to_be_fine(name: str, project: Path) -> None:
    """A folder without a run, a file, and no folder at all are wrong input."""
    (project / "empty").mkdir()
    (project / "empty/file.txt").write_text("x")
    with pytest.raises(InputError, match="Fix: name the output folder of a training run"):
        examine(project / "empty" / name)


def test_the_newest_checkpoint_stands_for_a_run_without_a_model(project: Path) -> None:
    """By its number, and with the log that it holds."""
    run = project / "trl"
    for step in (5, 20, 100):
        shutil.copytree(project / "lora", run / f"checkpoint-{step}")
        write_state(run / f"checkpoint-{step}" / STATE)
    report = examine(run)
    assert report.model == run / "checkpoint-100" and not report.findings
    assert "looked at in checkpoint-100" in report.verdict


def test_summaries_stand_in_for_the_log(project: Path) -> None:
    """Where only `all_results.json` is left, its losses are looked at."""
    (project / "full" / STATE).unlink()
    edit_json(project / "full/all_results.json", train_loss=0.0, eval_loss=2.5)
    report = examine(project / "full", project / "base")
    assert [finding.check for finding in report.findings] == ["training loss"]


def test_a_base_that_moved_is_named(project: Path) -> None:
    """With `--base` an adapter is looked at as before."""
    (project / "base").rename(project / "moved")
    assert [finding.check for finding in examine(project / "lora").findings] == [
        "base of the adapter"
    ]
    assert not examine(project / "lora", project / "moved").findings


def test_a_merge_in_bfloat16_is_rounding(project: Path) -> None:
    """Nothing is found in a merged model that was only rounded; one from which rounding took the change is."""

    def rounded(tensors: dict) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    edit_tensors(project / "lora/merged/model.safetensors", rounded)
    assert not examine(project / "lora").findings


def test_rows_are_read_in_blocks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of a few numbers the same is found as with whole tensors."""
    from sft_recipes.doctor import tensors

    monkeypatch.setattr(tensors, "BLOCK", 50)
    assert not examine(project / "lora").findings
    FAULTS["merged twice"].damage(project / "lora")
    FAULTS["adapter NaN"].damage(project / "lora")
    found = {finding.check for finding in examine(project / "lora").findings}
    assert found == {"merged weights", "weights are numbers"}


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and stdout of `sft-recipes doctor ARGUMENTS`."""

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.run(["doctor", *map(str, arguments)])
        return code, capsys.readouterr().out

    return run


def test_exit_codes(project: Path, say: Callable[..., tuple[int, str]]) -> None:
    """0 where nothing is found, 1 with findings, 2 for what is no run."""
    assert say(project / "lora")[0] == 0
    (project / "lora" / ADAPTER).unlink()
    assert say(project / "lora")[0] == 1
    assert say(project)[0] == 2
    assert say(project / "lora", "--merged", project)[0] == 2


def test_the_text_says_what_and_how(project: Path, say: Callable[..., tuple[int, str]]) -> None:
    """A sentence first, findings with the gravest in front, what was looked at and what was not, then commands."""
    run = project / "lora"
    FAULTS["no evaluation"].damage(run)
    FAULTS["no effect"].damage(run)
    _, out = say(run)
    lines = out.splitlines()
    assert lines[0].startswith(f"{run} is a LORA adapter: 2 errors, 1 warning; 17 of 21")
    order = [
        out.index(part) for part in ("error: ", "warning: ", "looked at", "not looked at", "next:")
    ]
    assert order == sorted(order)
    assert f"  Fix: sft-recipes evaluate {run} --data FILE" in lines
    assert "training_args.bin" in out


def test_json_is_the_same(project: Path, say: Callable[..., tuple[int, str]]) -> None:
    """Findings and checks as plain data."""
    FAULTS["no evaluation"].damage(project / "lora")
    code, out = say(project / "lora", "--json")
    content = json.loads(out)
    assert code == 1 and [finding["check"] for finding in content["findings"]] == ["evaluated"]
    assert content["checked"] == sum(
        check["outcome"] != "not looked at" for check in content["checks"]
    )
