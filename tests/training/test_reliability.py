"""Runs that are killed, stopped and starved, for real, and then run again: they end as if nothing had happened.

R1 to R17 as in the README's section on reliability; what needs no process of its own is in test_checkpoints.py.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.killable import Fault, finish, start, until
from tests.training.test_two_processes import launcher
from tests.training.tiny import file_hashes, logged

pytestmark = pytest.mark.slow
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
STEPS = {"save_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 2}
EVALUATED = {
    "eval_split": 8,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "evaluation": {"rows": 2, "max_new_tokens": 4},
}
EVALUATED["evaluation"]["max_share"] = None  # the clock must not decide what stands in the log
TIMES = ("runtime", "per_second", "total_flos")


def entries(run: Path) -> list[dict[str, Any]]:
    """The log without what the clock decides."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    plain = [
        {key: one for key, one in line.items() if not any(word in key for word in TIMES)}
        for line in lines
    ]
    return [line for line in plain if "train_loss" not in line]


def tensors(content: Any) -> list[torch.Tensor]:
    """All tensors in a nested state, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = (
        content.values()
        if isinstance(content, dict)
        else content
        if isinstance(content, (list, tuple))
        else []
    )
    return [one for part in parts for one in tensors(part)]


def assert_same_run(run: Path, whole: Path) -> None:
    """Model, last checkpoint and log of two runs are the same; so is the account of their rows."""
    (model,) = whole.glob("*.safetensors")
    assert (run / model.name).read_bytes() == model.read_bytes(), "the weights differ"
    last = max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    for name in (model.name, "scheduler.pt"):
        assert (run / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    left, right = (
        torch.load(one / last / "optimizer.pt", weights_only=True) for one in (run, whole)
    )
    assert all(
        torch.equal(*both) for both in zip(tensors(left), tensors(right), strict=True)
    ) and tensors(left)
    assert entries(run) == entries(whole)
    accounts = [json.loads((one / "consumption.json").read_text()) for one in (run, whole)]
    for account in accounts:  # the folders of the data differ
        account["shown"] = [
            {**one, "row": one["row"].rpartition("/")[2]} for one in account["shown"]
        ]
    assert accounts[0] == accounts[1]
    assert (accounts[0]["not_in_the_data"], accounts[0]["left_out"]) == (0, 0)


def state(run: Path) -> dict[str, Any]:
    """What run_state.json says."""
    return json.loads((run / "run_state.json").read_text())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same recipe without any fault, in a folder of its own; trained once for all cases."""
    known: dict[tuple[str, int], Path] = {}

    def run(path: Path, ranks: int = 1) -> Path:
        recipe = path.read_text(), ranks
        if recipe not in known:
            known[recipe] = tmp_path_factory.mktemp("whole") / "run"
            finish(path, "--output_dir", str(known[recipe]), ranks=ranks)
        return known[recipe]

    return run


# R1: what is trained, and after how many forward passes the signal comes.
RESUMED: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 11),
    "lora with dropout": (LORA, 11),
    "end of an epoch": ({}, 20),
    "second epoch": ({}, 27),
    "accumulation with a remainder": ({"gradient_accumulation_steps": 3}, 12),
    "two workers": ({"dataloader_num_workers": 2}, 11),
    "packed": ({"packing": True, "max_length": 64}, 7),
    "padded": ({"padding_free": False}, 11),
    "evaluated": ({**LORA, **EVALUATED}, 7),
    "evaluated and saved by epoch": ({**EVALUATED, "eval_strategy": "epoch", "eval_steps": None, "save_steps": None,
                                      "save_strategy": "epoch"}, 16),
    "best model": ({**EVALUATED, "save_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_r1_preempted_equals_whole(
    case: str, write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Stopped by SIGTERM in a forward pass and run again: model, optimizer, scheduler and log are the whole run's."""
    keys, forward = RESUMED[case]
    path = write_recipe(**{**STEPS, **keys})
    expected = whole(path)
    nth = forward + 3 * ("eval_strategy" in keys)
    stopped = start(path, faults=[Fault("forward", nth=nth, signal=signal.SIGTERM, children=True)])
    assert stopped.wait() == [75], stopped.text()[-3000:]
    assert (
        state(tmp_path / "run")["state"] == "preempted"
        and state(tmp_path / "run")["exit_code"] == 75
    )
    assert not list((tmp_path / "run").glob("*.safetensors")), "a stopped run saves no final model"
    finish(path)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize(
    "keys", [{}, LORA, {"packing": True, "max_length": 64}], ids=["full", "lora", "packed"]
)
@pytest.mark.parametrize("late", [0, 1], ids=["rank 0 first", "rank 1 first"])
def test_r2_r7_two_ranks_with_skewed_signals(
    keys: dict[str, Any],
    late: int,
    write_recipe: Callable[..., Path],
    whole: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """One rank gets the signal half a second before the other: both stop after the same step, and resume exactly."""
    path = write_recipe(**{**STEPS, **keys, "num_train_epochs": 4})
    expected = whole(path, ranks=2)
    run = tmp_path / "run"
    faults = [Fault("forward", nth=9, signal=signal.SIGTERM, rank=late)]
    stopped = start(path, ranks=2, faults=faults)
    until(lambda: "signal: stopping" in stopped.text(), stopped)
    time.sleep(0.5)
    stopped.send(signal.SIGTERM, rank=1 - late)
    assert stopped.wait() == [75, 75], stopped.text()[-3000:]
    assert state(run)["state"] == "preempted"
    finish(path, ranks=2)
    assert_same_run(run, expected)


def test_rows_that_accelerate_repeats_are_listed(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """38 rows in batches of 4 on two ranks, two epochs: 2 rows are filled in each time, and the account names them."""
    finish(write_recipe(per_device_train_batch_size=4, max_rows=38, num_train_epochs=2), ranks=2)
    account = json.loads((tmp_path / "run/consumption.json").read_text())
    assert (
        account["rows"],
        account["times_trained"],
        account["repeated"],
        account["left_out"],
    ) == (38, 80, 4, 0)
    assert sum(one["trained"] - 2 for one in account["shown"]) == 4
    assert all("train.jsonl:row " in one["row"] for one in account["shown"])


def test_r3_kill_9_at_random_moments(
    write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed ten times at moments drawn at random and run again each time: the end is that of the whole run."""
    path = write_recipe(**{**STEPS, **LORA, "save_steps": 1, "num_train_epochs": 4})
    expected = whole(path)
    draw, log = random.Random(0), tmp_path / "run/log.jsonl"
    for number in range(10):
        run = start(path)
        steps = len(log.read_text().splitlines()) if log.is_file() else 0
        if number % 5:  # some steps on, or else while it starts
            goal = steps + draw.randint(-1, 4)
            until(lambda goal=goal: log.is_file() and len(log.read_text().splitlines()) > goal, run)
        time.sleep(draw.uniform(0, 0.1 if number % 5 else 1))
        run.send(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL], run.text()[-3000:]
    finish(path)
    assert_same_run(tmp_path / "run", expected)


SAVING = (
    "begin_save",
    "save_model",
    "save_optimizer",
    "save_rng",
    "save_state",
    "save_counts",
    "seal",
    "rotate",
)


@pytest.mark.parametrize("point", [*SAVING, "remove"])
def test_r4_kill_9_between_files(
    point: str, write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed after the third save got so far (`remove`: before a folder is rotated away): one good checkpoint stays."""
    path = write_recipe(**{**STEPS, "num_train_epochs": 1, "save_total_limit": 1})
    expected = whole(path)
    killed = start(
        path,
        faults=[
            Fault(point, nth=2 if point == "remove" else 3, before=point == "remove", signal=9)
        ],
    )
    assert killed.wait() == [-9]
    sealed = [one.parent.name for one in (tmp_path / "run").glob("checkpoint-*/manifest.json")]
    after_seal = point in ("seal", "rotate", "remove")
    assert ("checkpoint-6" if after_seal else "checkpoint-4") in sealed
    text = finish(path)
    assert ("skipped checkpoint-6: its save was interrupted" in text) == (not after_seal)
    assert_same_run(tmp_path / "run", expected)


def test_kill_9_in_the_first_save_starts_over(
    write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Where only the first save was interrupted there is nothing to lose: the run says so and begins again."""
    path = write_recipe(**{**STEPS, "num_train_epochs": 1})
    expected = whole(path)
    assert start(path, faults=[Fault("save_optimizer", signal=9)]).wait() == [-9]
    assert "skipped checkpoint-2: its save was interrupted" in finish(path)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("point", ["save", "save_state"])
def test_killed_at_the_end_takes_no_step_more(
    point: str, write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed after the last checkpoint, before the model is saved, with max_steps in mid-epoch: no further step."""
    path = write_recipe(**{**STEPS, "max_steps": 6})
    expected = whole(path)
    fault = (
        Fault("save", before=True, signal=9)
        if point == "save"
        else Fault("rotate", nth=3, signal=9)
    )
    assert start(path, faults=[fault]).wait() == [-9]
    finish(path)
    assert logged(tmp_path / "run") == logged(expected) and len(logged(expected)) == 6
    assert_same_run(tmp_path / "run", expected)


# R7: when the signals come, the exit code, and the step that was sealed.
STOPPED: dict[str, tuple[list[Fault], int, int | None]] = {
    "while data is prepared": ([Fault("prepare", signal=signal.SIGTERM)], 75, None),
    "while the model loads": ([Fault("build", before=True, signal=signal.SIGTERM)], 75, None),
    "in the first forward pass": ([Fault("forward", nth=2, before=True, signal=signal.SIGTERM)], 75, 1),
    "in a save": ([Fault("save_optimizer", signal=signal.SIGTERM)], 75, 3),
    "in an evaluation": ([Fault("evaluate", before=True, signal=signal.SIGTERM)], 75, 4),
    "ctrl-c": ([Fault("forward", nth=8, signal=signal.SIGINT)], 130, None),
    "the same signal twice at once": ([Fault("forward", nth=8, signal=15)] * 2, 75, None),
    "at the very end": ([Fault("save", before=True, signal=signal.SIGTERM)], 0, None),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_r7_stopped_by_a_signal(
    case: str, write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """A signal at any moment: exit code 75 (130 for Ctrl-C), a sealed checkpoint, no model; then it resumes exactly."""
    faults, code, step = STOPPED[case]
    path = write_recipe(**{**STEPS, **EVALUATED})
    expected = whole(path)
    run = tmp_path / "run"
    stopped = start(path, faults=faults)
    assert stopped.wait() == [code], stopped.text()[-3000:]
    assert state(run)["state"] == ("preempted" if code else "finished")
    assert bool(list(run.glob("*.safetensors"))) == (code == 0)
    if step is not None:
        assert (run / f"checkpoint-{step}/manifest.json").is_file()
    assert not (run / "run.lock").exists()
    finish(path)
    assert_same_run(run, expected)


def test_r7_second_signal_aborts(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A second signal, four seconds after the first, ends the process at once, by that signal and within the step:
    the checkpoint that the first would have written is not there, the one before it is, and the run goes on from it.
    """
    path = write_recipe(**STEPS)
    # The fault that is installed last comes first: the signal, and then the process stands still.
    hang = Fault("forward", nth=8, before=True, signal=signal.SIGSTOP)
    first = Fault("forward", nth=8, before=True, signal=signal.SIGTERM)
    run = start(path, faults=[hang, first])
    time.sleep(0.2)
    until(lambda: (tmp_path / "run/checkpoint-6/manifest.json").is_file(), run)
    time.sleep(4.5)
    # It waits for the process to go on, and is the first thing that it gets then.
    run.send(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.wait() == [-signal.SIGTERM]
    assert (tmp_path / "run/checkpoint-6/manifest.json").is_file()
    assert not (tmp_path / "run/checkpoint-8").exists()
    finish(path)


def test_r8_killed_rank(
    write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """kill -9 of rank 1 of 2 under accelerate: the launcher fails in under 30 s; then it resumes exactly."""
    path = write_recipe(**{**STEPS, "num_train_epochs": 8})
    begun: list[float] = []
    with launcher(path, KILL_RANK="1", KILL_STEP="7") as process:
        while process.poll() is None:
            if (
                not begun
                and (tmp_path / "run/log.jsonl").is_file()
                and len(logged(tmp_path / "run")) >= 6
            ):
                begun.append(time.monotonic())
            time.sleep(0.05)
    assert process.returncode and begun and time.monotonic() - begun[0] < 30
    finish(path, ranks=2)
    assert_same_run(tmp_path / "run", whole(path, ranks=2))


def signalled(process: subprocess.Popen[str], run: Path) -> int:
    """The exit code after SIGTERM to a launcher, once some steps are trained."""
    for _ in range(2000):
        if (run / "log.jsonl").is_file() and len(logged(run)) >= 3:
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return process.returncode


def test_r7_launchers_pass_the_signal_on(
    write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGTERM to `sft-recipes train --launch` gives 75, to `accelerate launch` an error; both leave a sealed run."""
    path = write_recipe(**{**STEPS, "num_train_epochs": 60, "save_steps": 1000})
    with launcher(path) as process:
        assert signalled(process, tmp_path / "run")
    assert state(tmp_path / "run")["state"] == "preempted"
    command = [
        sys.executable,
        "-m",
        "sft_recipes",
        "train",
        str(path),
        "--launch",
        "ddp_cpu",
        "--num_processes",
        "2",
    ]
    command += ["--output_dir", str(tmp_path / "ours")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as ours:
        assert signalled(ours, tmp_path / "ours") == 75
    assert state(tmp_path / "ours")["state"] == "preempted"
    for run in (tmp_path / "run", tmp_path / "ours"):
        step = max(
            int(one.parent.name.split("-")[1]) for one in run.glob("checkpoint-*/manifest.json")
        )
        assert step == logged(run, "step")[-1] < 600 and not list(run.glob("*.safetensors"))


FULL: dict[str, tuple[Fault, str]] = {
    "before the save": (Fault("save_state", nth=2, free_bytes=1000), "no space left: need "),
    "in the model": (Fault("begin_save", nth=3, file_bytes=100_000), "saving to .*run failed: .*"),
    "in the optimizer": (
        Fault("begin_save", nth=3, file_bytes=250_000),
        "saving to .*run failed: .*",
    ),
}


@pytest.mark.parametrize("case", FULL)
def test_r9_disk_full(
    case: str, write_recipe: Callable[..., Path], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """The disk is full before or in a save: exit code 3, said so, earlier checkpoints good, resumes exactly."""
    fault, message = FULL[case]
    path = write_recipe(**STEPS)
    expected = whole(path)
    full = start(path, faults=[fault])
    assert full.wait() == [3], full.text()[-3000:]
    assert (
        re.search(message, full.text())
        and "Earlier checkpoints" in full.text()
        and "Fix:" in full.text()
    )
    assert state(tmp_path / "run")["exit_code"] == 3
    assert (tmp_path / "run/checkpoint-4/manifest.json").is_file()
    finish(path)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize(
    "keys", [{"max_steps": 3}, {"num_train_epochs": 1}], ids=["max_steps", "epochs"]
)
def test_r10_finished_run_stays_finished(
    keys: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Run again three times by new processes, on one rank and on two: `already complete`, not a byte changes."""
    path = write_recipe(**{**STEPS, **keys})
    finish(path, ranks=2)
    before = file_hashes(tmp_path / "run")
    for ranks in (1, 2, 1):
        assert "already complete" in finish(path, ranks=ranks)
        assert file_hashes(tmp_path / "run") == before


def test_r14_second_process_is_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """While one process trains, another in the same folder is refused with its pid, and harms nothing."""
    path = write_recipe(**STEPS)
    first = start(path, faults=[Fault("forward", nth=5, before=True, signal=signal.SIGSTOP)])
    until(
        lambda: (tmp_path / "run/log.jsonl").is_file() and len(logged(tmp_path / "run")) >= 4, first
    )
    time.sleep(0.5)
    before = file_hashes(tmp_path / "run")
    second = start(path)
    assert second.wait() == [2]
    assert (
        f"process {first.processes[0].pid} on " in second.text()
        and "is training here" in second.text()
    )
    assert file_hashes(tmp_path / "run") == before
    first.send(signal.SIGCONT)
    assert first.wait() == [0]


def test_copied_checkpoint_folder_is_no_run(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A run folder copied to another place while unfinished resumes there, without a lock in the way."""
    path = write_recipe(**STEPS)
    assert start(path, faults=[Fault("forward", nth=9, signal=9)]).wait() == [-9]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    finish(path, "--output_dir", str(tmp_path / "copy"))
    finish(path)
    assert_same_run(tmp_path / "copy", tmp_path / "run")
