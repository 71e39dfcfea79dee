"""Public benchmarks of a run: the exported folder is asked, as the run was trained to be asked, and
the model card says what came out. lm-eval itself is put aside here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import cli
from sft_recipes.evaluation import public_benchmarks as benchmarks
from sft_recipes.release.model_card import render_card

# What lm-eval writes of one task with two filters, and of a group two floors high.
FOUND = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "sample_len": 4,
            "exact_match,strict-match": 0.75,
            "exact_match_stderr,strict-match": 0.25,
        },
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01},
        "mmlu_stem": {"acc,none": 0.3, "acc_stderr,none": 0.02},
        "mmlu_anatomy": {"acc,none": 0.2, "acc_stderr,none": 0.02},
        "mmlu_physics": {"acc,none": 0.4, "acc_stderr,none": 0.02},
    },
    "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy", "mmlu_physics"]},
    "configs": {"gsm8k": {"dataset_path": "openai/gsm8k", "generation_kwargs": {"until": ["Q:"]}}},
    "versions": {"gsm8k": 3.0},
    "n-shot": {"gsm8k": 5},
    "n-samples": {
        "gsm8k": {"original": 1319, "effective": 4},
        "mmlu_anatomy": {"original": 4, "effective": 4},
        "mmlu_physics": {"original": 5, "effective": 5},
    },
    "higher_is_better": {"gsm8k": {"exact_match": True}},
    "config": {"model_dtype": "torch.float32"},
    "total_evaluation_time_seconds": "12.5",
}


@pytest.fixture
def lm_eval_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval is installed, and writes what it wrote of four rows, three of them right."""
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(benchmarks, "version", lambda library: "0.4.13")

    def ask(request: benchmarks.BenchmarkRequest) -> int:
        work = request.folder / benchmarks.WORK
        name = "2026-01-02T03-04-05.678901.json"
        (work / f"results_{name}").write_text(json.dumps(FOUND), encoding="utf-8")
        rows = []
        for number in range(4):
            score = {"filter": "strict-match", "exact_match": float(number > 0)}
            rows.append(json.dumps(score))
        (work / f"samples_gsm8k_{name}l").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return 0

    monkeypatch.setattr(benchmarks, "ask", ask)


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(lm_eval_answers: None, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """What `evaluate RUN --benchmark gsm8k,mmlu --json` prints."""

    def call(run: Path, *more: str) -> dict[str, Any]:
        arguments = ["evaluate", str(run), "--benchmark", "gsm8k,mmlu", "--json", *more]
        assert cli.run(arguments) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_run_is_asked_as_it_is_served(make_run: Callable[..., Path], evaluate: Evaluate) -> None:
    """The exported folder, with the system prompt of the recipe; each result is a file with version,
    a part of a group has none."""
    run = make_run("lora", system_prompt="Be brief.")
    printed = evaluate(run)
    folder = run / "evaluations/benchmarks"
    assert printed["folder"] == str(folder)
    settings = yaml.safe_load((folder / "lm_eval/settings.yaml").read_text(encoding="utf-8"))
    assert settings["model_args"]["pretrained"] == str(run / "export")
    assert settings["system_instruction"] == "Be brief."
    assert settings["apply_chat_template"] is True
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "benchmark_gsm8k.json",
        "benchmark_mmlu.json",
    ]
    stored = json.loads((folder / "benchmark_gsm8k.json").read_text(encoding="utf-8"))
    assert stored.pop("schema_version") == 1
    assert [stored] == [result for result in printed["results"] if result["benchmark"] == "gsm8k"]
    metric = stored["metrics"][0]
    assert (metric["value"], metric["n"]) == (0.75, 4)
    assert metric["ci_low"] == pytest.approx(0.3006, abs=1e-4)
    assert stored["settings"] == settings
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "0.750 [0.30, 0.95]" in report and "4 of 1,319 rows" in report


def test_a_run_that_was_not_exported_is(
    make_run: Callable[..., Path], evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    run = make_run("full", exported=False)
    evaluate(run)
    assert (run / "export/export.json").is_file()


def test_an_older_export_is_refused(
    make_run: Callable[..., Path], lm_eval_answers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was trained again: exit code 2, and the command that exports it again."""
    run = make_run("full")
    late = (run / "export/export.json").stat().st_mtime + 60
    os.utime(run / "model.safetensors", (late, late))
    assert cli.run(["evaluate", str(run), "--benchmark", "gsm8k"]) == 2
    assert f"sft-recipes export {run} --force" in capsys.readouterr().err


def test_the_card_has_the_benchmarks(make_run: Callable[..., Path], evaluate: Evaluate) -> None:
    """Scores with interval, n and shots, how they were asked, and the metadata; no path of this machine."""
    run = make_run("full")
    evaluate(run, "--max_rows", "4")
    card = render_card(run)
    assert "### gsm8k: public benchmark" in card
    assert "| Exact match, strict-match | 0.750&nbsp;[0.30,&nbsp;0.95] | 4 |" in card
    assert "| Acc, none | 0.250&nbsp;[0.23,&nbsp;0.27] | 9 |" in card
    assert "**Warning:** 4 of 1,319 rows" in card
    assert "lm-eval 0.4.13, shots: 5" in card
    assert "chat template: applied" in card
    assert str(run) not in card
    results = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    scores = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in results}
    assert scores == {"gsm8k": 0.75, "mmlu": 0.25}


def test_a_damaged_result_is_named(make_run: Callable[..., Path], evaluate: Evaluate) -> None:
    """The card is not written from half a result."""
    run = make_run("full")
    evaluate(run)
    path = run / "evaluations/benchmarks/benchmark_gsm8k.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["settings"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(Exception, match=r"benchmark_gsm8k\.json.*Fix: "):
        render_card(run)
