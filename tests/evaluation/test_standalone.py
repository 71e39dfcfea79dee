"""The `evaluate` command's work: which rows, which base, what is written and by whom."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation import standalone
from sft_recipes.evaluation.standalone import EvaluationRequest, evaluate_standalone

Save = Callable[..., str]


@pytest.fixture
def rows(write_rows) -> str:
    return str(write_rows([{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]))


@pytest.fixture
def save(tmp_path: Path, make_tokenizer: Callable[..., Any], make_model: Callable[..., Any]) -> Save:
    """Save a tiny model with a tokenizer of the given special tokens; `rows` of its embedding may be too few."""

    def write(name: str, special: tuple[str, ...] = (), rows: int | None = None, seed: int = 0) -> str:
        tokenizer = make_tokenizer(special)
        model = make_model(seed)
        model.resize_token_embeddings(len(tokenizer) if rows is None else rows)
        tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def ask(model: str, rows: str | None, tmp_path: Path, **options: Any) -> standalone.StandaloneResult:
    settings = {"data": rows, "max_new_tokens": 4, "batch_size": 2, "output": tmp_path / "out"} | options
    return evaluate_standalone(EvaluationRequest(model, **settings), progress=False)


def test_base_and_tuned_answer_the_same_rows_one_model_at_a_time(save, rows, tmp_path, monkeypatch) -> None:
    """Both are written with their own files, compared; the tuned model is gone before the base is loaded."""
    loaded: list[weakref.ref[Any]] = []
    load = standalone.load_for_inference

    def spy(name: str) -> Any:
        assert [reference for reference in loaded if reference() is not None] == []
        found = load(name)
        loaded.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(standalone, "load_for_inference", spy)
    gc.disable()
    try:
        result = ask(save("tuned", seed=1), rows, tmp_path, base=save("base"))
    finally:
        gc.enable()
    assert len(loaded) == 2
    assert result.base is not None
    assert result.base.rows[0]["prompt"] == result.evaluation.rows[0]["prompt"]
    for folder, model in ((tmp_path / "out", "tuned"), (tmp_path / "out" / "base", "base")):
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert (Path(content["info"]["model"]).name, content["n"]) == (model, 3)
        assert (folder / "report.html").is_file()
    assert set(result.as_json()) >= {"folder", "n", "metrics", "base", "differences"}


def test_an_earlier_evaluation_is_a_base(save, rows, tmp_path) -> None:
    """Its answers are read, not generated again, whatever its tokenizer was."""
    ask(save("other", ("<|x|>",)), rows, tmp_path, output=tmp_path / "earlier")
    result = ask(save("tuned"), rows, tmp_path, base=str(tmp_path / "earlier"))
    assert result.base is not None
    assert not (tmp_path / "out" / "base").exists()


def test_a_base_with_another_vocabulary_is_refused_before_anything_is_generated(
    save, rows, tmp_path, monkeypatch
) -> None:
    """The tuned model's ids would mean other text to it; the error says how to compare all the same."""
    monkeypatch.setattr(standalone.evaluator, "evaluate", lambda *_, **__: pytest.fail("nothing may be generated"))
    with pytest.raises(InputError, match=r"base: --base: .*another vocabulary.*Fix: evaluate it by itself"):
        ask(save("tuned", ("<|x|>",)), rows, tmp_path, base=save("base", ("<|y|>",)))


def test_a_base_with_too_few_embedding_rows_is_refused(save, rows, tmp_path) -> None:
    """Equal vocabularies, but ids without a row would index out of the embedding."""
    with pytest.raises(InputError, match=r"base: --base: .*embedding 50 rows.* Fix: "):
        ask(save("tuned"), rows, tmp_path, base=save("base", rows=50))


def test_only_the_main_process_writes(save, rows, tmp_path, monkeypatch) -> None:
    """Another rank has the same result and touches no file."""
    from accelerate import PartialState

    state = type("State", (), {"is_main_process": False})
    assert PartialState().is_main_process
    monkeypatch.setattr(standalone, "PartialState", state)
    assert len(ask(save("tuned"), rows, tmp_path, max_rows=2).evaluation.rows) == 2
    assert not (tmp_path / "out").exists()


def test_nothing_to_answer_is_an_error(save, rows, tmp_path) -> None:
    """A model without --data, and data of which no row is asked for, say what to add."""
    with pytest.raises(InputError, match="--data: is needed"):
        ask(save("tuned"), None, tmp_path)
    with pytest.raises(InputError, match="there are no eval rows"):
        ask(save("tuned"), rows, tmp_path, max_rows=0)
