"""The metrics in the shape of `evaluate`: the same numbers as our own functions, from texts
alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation.metrics import summarise
from tests.evaluation.test_metrics import score

TEXTS = ["Blue.", "the sky is very blue today", "### Instruction: a"]
REFERENCES = ["Blue.", "The sky is blue", "It is red"]


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a cache folder of its own."""
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    from sft_recipes.evaluation import evaluate_metrics

    return evaluate_metrics


def test_values_are_those_of_the_summary(metrics: Any, tmp_path: Path) -> None:
    """Every metric of texts gives the estimate of `summarise`, and the rows' own values; no file is
    left behind."""
    rows = [
        score(
            text,
            reference,
            "",
            response_tokens=len(text.split()),
            reference_tokens=len(reference.split()),
        )
        | {"flags": [], "well_formed": True, "complete": True}
        for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]
    expected = summarise(rows)
    for name in metrics.NAMES:
        metric = metrics.load(name)
        references = {"references": REFERENCES} if "references" in metric.features else {}
        found = metric.compute(predictions=TEXTS, **references)
        assert len(found.pop("rows")) == 3
        unit = expected[name].unit.replace("tokens", "words")
        assert found == {**expected[name].as_json(), "unit": unit}, name
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_references_are_asked_for_only_where_needed(metrics: Any) -> None:
    """Completion needs none, and counts the stop reasons; token F1 refuses to go without."""
    found = metrics.load("completion_rate").compute(
        predictions=["a", "b"], stop_reasons=["eos", "length"]
    )
    assert (found["value"], found["rows"]) == (0.5, [True, False])
    keywords = metrics.load("chapter_completion_rate").compute(
        predictions=["b"], instructions=["a b"]
    )
    assert keywords["value"] == 0.5
    with pytest.raises(ValueError, match="references"):
        metrics.load("token_f1").compute(predictions=["a"], references=["a", "b"])


def test_batches_add_up_and_no_rows_have_no_value(metrics: Any) -> None:
    """`add_batch` as evaluate users know it; n = 0 gives None."""
    metric = metrics.load("exact_match")
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        metric.add_batch(predictions=[text], references=[reference])
    assert metric.compute()["value"] == pytest.approx(1 / 3)
    empty = metric.compute(predictions=[], references=[])
    assert (empty["value"], empty["n"], empty["rows"]) == (None, 0, [])


@pytest.mark.parametrize("name", ["rouge", "tool_call_exact"])
def test_other_names_are_refused(metrics: Any, name: str) -> None:
    """Unknown names, and metrics that need more than texts."""
    with pytest.raises(InputError, match="there is no such metric of texts"):
        metrics.load(name)
