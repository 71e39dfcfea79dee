"""The benchmark for GPU machines: no item takes another with it, no number is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import flops, items, results, shapes
from benchmarks.gpu.children import Item, Setting, process_context, run_item
from benchmarks.gpu.results import Head, ItemReport, ItemResult, Measurement
from sft_recipes.errors import InputError

ROOT = Path(__file__).parents[1]
HEAD = Head("NVIDIA X", {"torch": "2.13.0", "CUDA": "13.0"}, "2026-01-31T12:00+00:00", False)

KNOWN_TABLE = """\
NVIDIA X; torch 2.13.0, CUDA 13.0; 2026-01-31T12:00+00:00

padded           failed     31.2 s
  copy                                                2,346 GB/s
  ratio                                                1.00 x          goal >= 1.00: met
  MFU                                                    39 %          goal >= 40.00: not met
  estimate / peak                                      0.80 x          goal 0.75 to 1.25: met
  attention                                     varlen_attn
  WRONG: losses differ

qlora            skipped     1.0 s  not installed: bitsandbytes"""


def hangs(setting: Setting, report: ItemReport) -> None:
    """An item that measures something and then hangs, with a process of its own that hangs, too."""
    report.number("before it hung", 1)
    child = subprocess.Popen(["sleep", "600"])
    (setting.folder / "pid").write_text(str(child.pid))
    time.sleep(600)


def fails(setting: Setting, report: ItemReport) -> None:
    """An item that breaks."""
    report.number("before it failed", 2)
    raise ValueError("no such kernel")


def finds_wrong(setting: Setting, report: ItemReport) -> None:
    """An item that ends well and whose numbers are wrong."""
    report.require(False, "losses differ")


def passes(setting: Setting, report: ItemReport) -> None:
    """An item that has nothing to complain of."""
    report.number("speed", 3, "tokens/s")


def says_nothing(setting: Setting, report: ItemReport) -> None:
    """An item that measures nothing."""


def item(function: Callable[..., None], limit: float = 30) -> Item:
    """An item of this file."""
    return Item(function.__name__, "", f"{__name__}:{function.__name__}", limit)


def run_all(folder: Path, *wanted: Item) -> list[ItemResult]:
    """Run items as the command does."""
    return command.run_all(wanted, folder, HEAD, process_context(forked=False))


def test_one_that_hangs_is_killed_with_its_group_and_the_next_runs(tmp_path: Path) -> None:
    """At its limit an item is killed with all it started; its numbers stay, the next item runs."""
    hung, passed = run_all(tmp_path, item(hangs, limit=6), item(passes))
    assert (hung.state, passed.state) == ("timeout", "passed")
    assert hung.measurements == [Measurement("before it hung", 1)]
    grandchild = int((tmp_path / "hangs" / "pid").read_text())
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie"


def test_one_that_fails_is_in_the_json_with_its_error(tmp_path: Path) -> None:
    """Its last words on stderr stand in the JSON beside its numbers, and the next item runs."""
    failed, passed = run_all(tmp_path, item(fails), item(passes))
    assert (failed.state, passed.state) == ("failed", "passed")
    written = json.loads((tmp_path / "gpu.json").read_text())["items"][0]
    assert "ValueError: no such kernel" in written["error"]
    assert written["measurements"][0]["name"] == "before it failed"


def test_wrong_numbers_and_no_numbers_are_failures(tmp_path: Path) -> None:
    """An item passes only if it measured something and found nothing wrong."""
    wrong, silent = run_all(tmp_path, item(finds_wrong), item(says_nothing))
    assert (wrong.state, wrong.wrong) == ("failed", ["losses differ"])
    assert (silent.state, silent.error) == ("failed", "it measured nothing")
    assert results.exit_code([wrong]) == results.exit_code([silent]) == 1


def test_json_and_table_after_each_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When an item begins, the ones before it are in the JSON and in the table that was printed."""
    names = ["first", "second", "third"]
    seen = []

    def run(wanted: Item, *_: Any) -> ItemResult:
        path = tmp_path / "gpu.json"
        written = json.loads(path.read_text())["items"] if path.is_file() else []
        printed = capsys.readouterr().out
        seen.append([entry["name"] for entry in written])
        assert all(name in printed for name in seen[-1])
        return ItemResult(wanted.name, "passed")

    monkeypatch.setattr(command, "run_item", run)
    run_all(tmp_path, *(Item(name, "", "", 30) for name in names))
    assert seen == [[], ["first"], ["first", "second"]]


def test_what_the_budget_does_not_reach_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items together keep to the budget: the last get what is left, or are not run."""
    limits = []

    def run(wanted: Item, _: Any, __: Any, limit: float) -> ItemResult:
        limits.append(limit)
        return ItemResult(wanted.name, "passed")

    monkeypatch.setattr(command, "run_item", run)
    clock = chain([0.0, 0.0, items.BUDGET_S - 20.0], repeat(items.BUDGET_S - 5.0)).__next__
    wanted = [Item(name, "", "", 60) for name in ("early", "late", "never")]
    found = command.run_all(wanted, tmp_path, HEAD, process_context(False), clock)
    assert limits == [60, 20]
    assert [result.state for result in found] == ["passed", "passed", "not run"]
    assert results.exit_code(found) == 1


def test_numbers_of_a_run_before_are_not_taken_over(tmp_path: Path) -> None:
    """An item that is run again in the same folder starts without its old numbers."""
    setting = Setting(shapes.DRY, tmp_path, True)
    ItemReport(tmp_path / "result.json", judge=False).number("old", 1)
    result = run_item(item(says_nothing), setting, process_context(False), 30)
    assert result.measurements == []


def test_workers_start_as_in_any_run(tmp_path: Path) -> None:
    """How an item was started itself is no default in it: loaders would import everything again."""
    result = run_item(
        item(tells_start_method), Setting(shapes.DRY, tmp_path, True), process_context(False), 30
    )
    assert result.measurements == [Measurement("start method", "None")]


def tells_start_method(setting: Setting, report: ItemReport) -> None:
    """An item that says what new processes start with."""
    import multiprocessing

    report.note("start method", str(multiprocessing.get_start_method(allow_none=True)))


def test_the_table_of_known_results(tmp_path: Path) -> None:
    """Head, states, numbers, goals, findings and reasons stand where a reader looks for them."""
    report = ItemReport(tmp_path / "result.json", judge=True)
    report.number("copy", 2345.6, "GB/s")
    report.goal("ratio", 0.9961, "x", at_least=1.0)
    report.goal("MFU", 39.0, "%", at_least=40.0)
    report.near("estimate / peak", 80.0, 100.0, share=0.25)
    report.note("attention", "varlen_attn")
    report.require(False, "losses differ")
    measured = results.read_item("padded", report.path, "", False, 31.24)
    skipped = ItemResult("qlora", "skipped", 1.0, error="not installed: bitsandbytes")
    assert results.table(HEAD, [measured, skipped]) == KNOWN_TABLE


def test_goals_are_not_judged_in_a_dry_run(tmp_path: Path) -> None:
    """A dry run's speed meets and misses nothing; whether things are equal is judged in any run."""
    report = ItemReport(tmp_path / "result.json", judge=False)
    report.goal("MFU", 39.0, "%", at_least=40.0)
    report.equal("resumed", holds=False)
    assert [measurement.met for measurement in report.measurements] == [None, False]


def test_a_number_that_is_not_finite_is_wrong(tmp_path: Path) -> None:
    """It stands in the JSON by its name, and the item fails."""
    report = ItemReport(tmp_path / "result.json", judge=True)
    report.number("loss", float("nan"))
    result = results.read_item("padded", report.path, "", False, 1.0)
    assert (result.state, result.measurements[0].value) == ("failed", "nan")


def test_body_parameters_of_known_models() -> None:
    """Llama-3.2-1B's and Llama-3-8B's: all parameters as published, less embeddings and head."""
    words = 128_256
    assert flops.body_parameters(shapes.LLAMA_1B) == 1_235_814_400 - words * 2048
    assert flops.body_parameters(shapes.LLAMA_8B) == 8_030_261_248 - 2 * words * 4096


def test_mfu_with_a_known_answer() -> None:
    """One layer small enough to count by hand, frozen and trained."""
    # Attention 2 x 4 x (2 + 1) x 2, feed-forward 3 x 4 x 8, norms 2 x 4 and 4: 156.
    model = shapes.ModelShape(4, 1, 2, 1, 8, vocabulary=10, tied=True)
    assert flops.body_parameters(model) == 48 + 96 + 8 + 4
    # Ten tokens in rows of 4 and 6, half of them trained.
    frozen = flops.Work(model, adapter=7, tokens=10, trained=5, squares=16 + 36)
    attention = 6 * 1 * 4 * 5.2
    assert flops.flop_per_token(frozen) == pytest.approx(4 * (156 + 20) + 6 * 7 + attention)
    trained = flops.Work(model, adapter=0, tokens=10, trained=5, squares=52)
    assert flops.flop_per_token(trained) == pytest.approx(6 * (156 + 20) + attention)
    expected = 100 * (6 * 176 + attention) * 1000 / 1e7
    assert flops.mfu(trained, tokens_per_second=1000, peak=1e7) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_peaks_by_device_name(device: str, peak: float | None) -> None:
    """A device gets the peak of its own board, and none where boards of like names differ."""
    assert flops.published_peak(device) == peak


def test_items_are_chosen_by_name() -> None:
    """In their own order; a name that does not exist is refused."""
    assert [item.name for item in items.chosen("packed, ceilings")] == ["ceilings", "packed"]
    assert items.chosen("") == items.ITEMS
    with pytest.raises(ValueError, match="no such item: speed"):
        items.chosen("ceilings,speed")


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds results is refused before anything runs."""
    (tmp_path / "gpu.json").write_text("{}")
    assert command.main(["--output", str(tmp_path), "--dry-run"]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_a_real_run_needs_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without CUDA nothing runs, and nothing is written."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert command.main(["--output", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_listing_is_light() -> None:
    """`--list` names every item and loads neither torch nor transformers."""
    code = (
        "import sys\nfrom benchmarks.gpu.__main__ import main\nassert main(['--list']) == 0\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(item.name in done.stdout for item in items.ITEMS)


def test_rows_are_the_same_each_time_and_a_third_trained() -> None:
    """Rows reach the tokens asked for, keep to their lengths, and are told apart."""
    from benchmarks.gpu.runs import make_rows
    from sft_recipes.data.labels import IGNORE_INDEX

    rows, again = (make_rows(5000, 10, 200, vocabulary=99) for _ in range(2))
    assert rows.dataset[:] == again.dataset[:]
    lengths = [len(ids) for ids in rows.dataset["input_ids"]]
    assert sum(lengths) >= 5000
    assert 10 <= min(lengths) <= max(lengths) == rows.longest <= 200
    assert len(rows.fingerprints) == len(lengths) == len(set(rows.fingerprints.tolist()))
    trained = [sum(label != IGNORE_INDEX for label in labels) for labels in rows.dataset["labels"]]
    assert all(trained)
    assert 0.3 < sum(trained) / sum(lengths) < 0.4


def test_a_resume_that_forgets_its_random_numbers_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run's weights are compared with those of the whole run."""
    from benchmarks.gpu.determinism import determinism
    from sft_recipes.training.trainer import RecipeTrainer

    monkeypatch.setattr(RecipeTrainer, "_load_rng_state", lambda *_: None)
    report = ItemReport(tmp_path / "result.json", judge=False)
    determinism(Setting(shapes.DRY, tmp_path, True), report)
    judged = {line.name: line.met for line in report.measurements if line.goal}
    assert judged == {"a second run": True, "resumed at half": False}
    assert report.wrong == ["a resumed run on a CPU differs"]


def test_another_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ours and stock TRL do not train the same, the item fails."""
    from benchmarks.gpu import full
    from sft_recipes.training.trainer import RecipeTrainer

    real = RecipeTrainer.compute_loss
    monkeypatch.setattr(
        RecipeTrainer, "compute_loss", lambda *given, **named: 1.01 * real(*given, **named)
    )
    report = ItemReport(tmp_path / "result.json", judge=False)
    full.padded(Setting(shapes.DRY, tmp_path, True), report)
    assert [line.split(":")[0] for line in report.wrong] == [
        "losses off stock TRL's",
        "gradient norms off stock TRL's",
    ]


def test_attention_across_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows of a pack see one another, the item fails."""
    from benchmarks.gpu import full

    case = full.PackedCase(shapes.DRY.packed[0], "sdpa")
    peak = SimpleNamespace(rate=1e12)
    report = ItemReport(tmp_path / "result.json", judge=False)
    monkeypatch.setattr(full, "random_model", leaky_model)
    with pytest.raises(InputError, match="rows of one batch see one another"):
        full._packed_run(Setting(shapes.DRY, tmp_path, True), report, case, peak)


def leaky_model(*given: Any) -> Any:
    """A model that is not told where rows begin."""
    from benchmarks.gpu.runs import random_model

    model = random_model(*given)

    def forget(_: Any, positional: Any, named: dict[str, Any]) -> Any:
        return positional, {**named, "position_ids": None}

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    return model


@pytest.mark.slow
def test_the_dry_run_passes(tmp_path: Path) -> None:
    """Every item runs and passes on this machine, in tiny shapes; nothing is left running."""
    folder = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(folder), "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    written = json.loads((folder / "gpu.json").read_text())
    assert [entry["name"] for entry in written["items"]] == [item.name for item in items.ITEMS]
    assert {entry["state"] for entry in written["items"]} <= {"passed", "skipped"}
    assert written["head"]["dry_run"]
    for process in psutil.process_iter(["cmdline"]):
        assert str(folder) not in " ".join(process.info["cmdline"] or [])
