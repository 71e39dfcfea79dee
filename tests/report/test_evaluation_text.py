"""What `evaluate` prints: readable at 100 columns, in words, with nothing read into it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.cells import cell_len

from sft_recipes.evaluation.answer import FLAGS
from sft_recipes.evaluation.gate_bounds import INDICATORS
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.report import evaluation_tables, evaluation_text, plain_words
from sft_recipes.report.evaluation_parts import order_rows
from sft_recipes.report.evaluation_verdict import verdict_of
from sft_recipes.report.text_tables import WIDTH, paragraph, text_table
from tests.report.test_evaluation_report import (
    BASES,
    DIFFERENCE,
    SAMPLES,
    estimate,
    full,
    metrics,
    sample,
    system,
)

LONG_NAME = "runs/" + "a-run-with-a-long-name-" * 6


def content_of_everything() -> dict[str, Any]:
    """All parts, four compared systems, and long names wherever data names something."""
    content = metrics(**full(LONG_NAME, "a long task type " * 4))
    content["comparisons"] = [system(f"{LONG_NAME}{number}") for number in range(4)]
    content["differences"] = dict.fromkeys(("exact_match", "eos_rate"), DIFFERENCE)
    kind = {"base": estimate(0.5), "tuned": estimate(0.5), "difference": DIFFERENCE}
    content["retention"] = {
        **kind,
        "kinds": {"world_knowledge": kind},
        "before": LONG_NAME,
        "kept": estimate(0.5),
        "lost": [{"prompt": "Why? " * 40, "tuned": "\n"}],
    }
    content["suspects"] = {
        "listed": 1,
        "rows": 9,
        "median": 1.0,
        "shown": [{"loss": 9.5, "where": LONG_NAME, "prompt": "p " * 90, "answer": "a"}],
    }
    content["prompting"] = {
        "ways": ["base", LONG_NAME],
        "best": LONG_NAME,
        "metric": "exact_match",
        "label": "Exact match",
        "difference": DIFFERENCE,
        "verdict": "undecided",
    }
    content["warnings"] = ["a warning " * 20]
    content["verdict"] = verdict_of(content, metrics(0.3), SAMPLES).sentence
    return content


def everything(content: dict[str, Any], base: dict[str, Any] | None) -> str:
    """All that can be printed of an evaluation."""
    rows = [sample(row, True, response="漢字 words\n" * 30, source=LONG_NAME) for row in range(4)]
    text = evaluation_text.verdict_text(content)
    text += evaluation_tables.metrics_text(content, base, rows)
    text += evaluation_text.figures_text(content, base)
    text += evaluation_text.task_types_text(content)
    text += evaluation_text.answers_text(order_rows(rows, BASES if base else None))
    for part, as_text in evaluation_tables.PARTS.items():
        text += as_text(content) if part in content else ""
    return text


def test_every_line_fits_into_a_hundred_columns() -> None:
    """With four systems, long names and wide characters, no line of any part is wider."""
    content = content_of_everything()
    base = metrics(0.3, task_types=content["task_types"])
    for text in (everything(content, base), everything(content, None)):
        widths = {line: cell_len(line) for line in text.splitlines()}
        assert max(widths.values()) <= WIDTH, max(widths, key=widths.__getitem__)


def test_words_stand_where_code_has_names() -> None:
    """No name with an underscore of a metric, flag, indicator or verdict, no `none`, no entity, in any part."""
    content = content_of_everything()
    content["metrics"]["tool_call_exact"] |= estimate(None, 0)
    text = everything(content, metrics(0.3, task_types=content["task_types"]))
    for name in (*METRICS, *FLAGS, *INDICATORS, "insufficient_n", "at_least"):
        assert "_" not in name or name not in text, name
    assert "< 0.001" in text and "&" not in text
    assert not re.search(r"\bnone\b", text, re.IGNORECASE)


def test_every_flag_and_indicator_has_words() -> None:
    """Whatever an answer can be flagged with, and a gate can be about, is called something."""
    assert set(plain_words.FLAGS) == set(FLAGS)
    assert set(plain_words.INDICATORS) == set(INDICATORS)
    assert {figure.metric for figure in evaluation_text.FIGURES} <= set(METRICS)


def test_the_first_view_is_five_figures_with_base_tuned_and_difference() -> None:
    """Shares in percent with their intervals; what no answer has a value for is no line."""
    content = metrics(differences={"exact_match": DIFFERENCE})
    content["metrics"]["tool_call_exact"] |= estimate(None, 0)
    lines = evaluation_text.figures_text(content, metrics(0.3)).splitlines()
    assert len(lines) == 1 + evaluation_text.SHOWN_FIGURES
    words = re.split(r"\s{2,}", lines[1])
    assert words == ["Answered as expected", "30 % [20, 40]", "50 % [40, 60]", "+5 [-5, +15]"]
    assert not any("Called" in line for line in lines)
    alone = evaluation_text.figures_text(content, None).splitlines()
    assert re.split(r"\s{2,}", alone[1]) == ["Answered as expected", "50 % [40, 60]"]


def test_answers_stand_side_by_side_in_a_bounded_space() -> None:
    """Expected, base and tuned in one line; a long answer is cut and says so; the verdict on it is in words."""
    rows = [sample(0, True, response="yes"), sample(1, False, response="no " * 500)]
    base = [sample(0, False, response="nope"), sample(1, False, response="nope")]
    text = evaluation_text.answers_text(order_rows(rows, base))
    assert re.search(r"^expected +base +tuned$", text, re.MULTILINE)
    assert re.search(r"^yes +nope +yes$", text, re.MULTILINE)
    assert "won: wrong in the base, right after tuning\n" in text
    assert ", both wrong\n" in text
    assert " ..." in text and len(text.splitlines()) < 30


@pytest.mark.parametrize("text", ["[red]x[/red]", "<b>&amp;", "\x1b[2J", "\u202eevil", ":smile:"])
def test_text_is_shown_as_it_is(text: str) -> None:
    """Markup of terminals and pages does nothing, what is hidden is spelled out."""
    for shown in (paragraph(text), text_table(["a", "b"], [[text, text]])):
        assert "\x1b" not in shown and "\u202e" not in shown
        if text.isprintable():
            assert text in shown
