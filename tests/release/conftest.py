"""Finished runs, made once and copied for each test, and a Hub on localhost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release import hub as hub_module
from tests.conftest import build_model, build_tokenizer, instruction_rows
from tests.release.hub_server import TOKEN, Hub, serve

KINDS = {"full": {}, "lora": {"use_peft": True, "lora_r": 4, "lora_alpha": 8}}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, and one finished and exported run of each kind. Read only."""
    from sft_recipes.release.export import export
    from sft_recipes.training.train import train

    folder = tmp_path_factory.mktemp("release")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    build_model(len(tokenizer)).save_pretrained(folder / "base")
    rows = "".join(json.dumps(row) + "\n" for row in instruction_rows(24))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    for kind, keys in KINDS.items():
        values = {
            "model_name_or_path": "./base",
            "dataset_name": "./train.jsonl",
            "output_dir": f"./{kind}",
            "eval_split": 0.25,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "activation_checkpointing": False,
            "disable_tqdm": True,
            "report_to": "none",
            **keys,
        }
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        train(load_recipe(path))
        export(folder / kind, progress=False)
    return folder


@pytest.fixture
def make_run(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy a finished run, with the base and rows beside it; keys change its recipe, `exported` keeps its export."""

    def make(kind: str = "full", exported: bool = True, **keys: Any) -> Path:
        folder = tmp_path / "runs"
        if not folder.exists():
            shutil.copytree(trained, folder)
        run = folder / kind
        if not exported:
            shutil.rmtree(run / "export")
        if keys:
            values = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
            (run / "recipe.yaml").write_text(yaml.safe_dump({**values, **keys}), encoding="utf-8")
        return run

    return make


WORDS = {
    "unit": "proportion",
    "higher_is_better": True,
    "label": "Exact match",
    "definition": "Answers equal to the reference, outer whitespace aside.",
}


def write_evaluation(run: Path, name: str = "eval", **more: Any) -> Path:
    """An evaluation of four answers in the run folder, as `evaluate` writes it."""
    metric = {"value": 0.75, "n": 4, "n_excluded": 0, "ci_low": 0.3006, "ci_high": 0.9544}
    content = {
        "schema_version": 1,
        "info": {
            "model": str(run),
            "data": str(run / "secret" / "questions.jsonl"),
            "decoding": "greedy",
        },
        "n": 4,
        "metrics": {"exact_match": {**metric, **WORDS}},
        **more,
    }
    rows = [
        {
            "prompt": f"question {n}",
            "reference": "yes",
            "response": "no" if n == 2 else "yes",
            "exact_match": n != 2,
        }
        for n in range(4)
    ]
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on localhost that the real client talks to, without waiting between attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with serve() as server:
        # The client reads its environment when it is imported.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for variable in (
            "http_proxy",
            "https_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(hub_module, "WAITS", (0, 0, 0, 0))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield server
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
