"""Retention: the packaged prompts, a set of one's own, every number by hand, and the gate on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.constraints import broken_constraints
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows, write_evaluation
from sft_recipes.evaluation.gate import judge, parse_gate
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.retention import (
    FAILING,
    least_prompts,
    measure_retention,
    read_prompts,
)
from sft_recipes.report.evaluation_tables import retention_text

# An answer for some prompts of each kind that will do, and one that will not.
GOOD_AND_BAD = [
    ("What is the capital of France?", "The capital of France is Paris.", "Lyon, in France."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci did.", "Parisian painters."),
    ("What is 3 + 5?", "3 + 5 = 8", "3 + 5 = 80"),
    ("What is half of 10?", "Five.", "It is 10 over 2, so 50."),
    ("Describe the sea in at most 12 words.", "Blue, wide and deep.", "word " * 13),
    ("Explain in at least 15 words how rain forms.", "word " * 15, "word " * 14),
    ("river and stone", "A river ran over a stone.", "A river ran over stones."),
    ("without using the word fruit", "It is red and round.", "A round fruit, red."),
    (
        'Describe a cat as one JSON object with the keys "name" and "colour".',
        '```json\n{\n  "name": "Tom",\n  "colour": "grey"\n}\n```',
        '{"name": "Tom"}',
    ),
    ("Fill in this JSON for Italy", '{"country": "Italy", "capital": "Rome"}', '{"capital": ""}'),
    (
        "List three fruits, one a line.",
        "Here they are:\n\n1. fig\n2. pear\n3. plum",
        "1. fig\n2. pear",
    ),
    ("Write a bullet list of three tools.", "- saw\n- axe\n* file", "- saw\n- axe\n- file\n- pen"),
    ("Begin with the word Cats", "Cats sleep all day.", "A cat sleeps all day."),
    ("Is a hammer a tool or a fruit?", "It is a tool.", "It is a tool and a fruit."),
]


def test_the_packaged_prompts() -> None:
    """150 prompts of eight kinds of about the same size, none twice, each with a rule."""
    prompts = read_prompts()
    kinds = Counter(example.columns["task_type"] for example in prompts)
    assert len(prompts) == 150
    assert len(kinds) == 8
    assert set(kinds.values()) == {17, 19}
    texts = {example.messages[0]["content"].casefold() for example in prompts}
    assert len(texts) == len(prompts)
    assert prompts[0].messages[-1] == {"role": "assistant", "content": None}


@pytest.mark.parametrize(("prompt", "good", "bad"), GOOD_AND_BAD)
def test_rules_know_good_answers_from_bad_ones(prompt: str, good: str, bad: str) -> None:
    """For some prompts of each kind an answer that will do keeps the rule, and another breaks it."""
    (example,) = [one for one in read_prompts() if prompt in one.messages[0]["content"]]
    expected = example.columns["expected_format"]
    assert not broken_constraints(good, expected)
    assert broken_constraints(bad, expected)


def test_nobody_passes_by_repeating_the_prompt_or_by_saying_nothing() -> None:
    """To every packaged prompt its own text fails, and so do an empty answer and a loop."""
    for example in read_prompts():
        prompt = example.messages[0]["content"]
        for response in (prompt, " ", "again and " * 60):
            answer = Answer(
                prompt, None, response, "length", expected_format=example.columns["expected_format"]
            )
            assert FAILING & set(answer.flags), (prompt, response)


def test_a_set_of_ones_own(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """A prompt without a kind has one, too; a row that no rule can judge is named with its line."""
    good = {"prompt": "Say yes.", "expected_format": {"keywords": ["yes"]}}
    (example,) = read_prompts(str(write_rows([good])))
    assert example.columns == {"task_type": "any", "expected_format": {"keywords": ["yes"]}}
    for bad, message in (
        ({"prompt": "Say yes."}, "nothing says when an answer will do"),
        ({"prompt": "Say yes.", "expected_format": {"keyword": ["yes"]}}, "'keyword'"),
        ({"question": "Say yes.", "expected_format": {"json": True}}, "there is no `prompt`"),
    ):
        with pytest.raises(InputError, match=rf":2: .*{message}.* Fix: "):
            read_prompts(str(write_rows([good, bad])))


def answered(*kinds: str) -> Evaluation:
    """A row for each letter of `name:letters`: `y` does what was asked, `n` does not."""
    rows = []
    for kind in kinds:
        name, _, letters = kind.partition(":")
        for letter in letters:
            number = len(rows)
            response = "yes <b>\u202e" if letter == "y" else "no"
            answer = Answer(
                "Say yes.", None, response, "eos", expected_format={"keywords": ["yes"]}
            )
            where = {
                "row": number,
                "line": number + 1,
                "source": "own.jsonl",
                "task_type": name,
                "messages": [{"role": "user", "content": f"Say yes {number}."}, {}],
                "prompt": f"Say yes {number}.",
            }
            rows.append(where | score_row(answer) | {"n_tokens": 1})
    return evaluation_from_rows(rows)


def base_and_tuned() -> tuple[Evaluation, Evaluation]:
    return answered("a:yyyy", "b:yynn"), answered("a:yynn", "b:ynyn")


def test_shares_and_changes_by_hand() -> None:
    """Six of eight before, four after; three of the six are kept, one is new; each is listed."""
    content, values = measure_retention(*base_and_tuned())
    assert (content["base"]["value"], content["tuned"]["value"], content["base"]["n"]) == (
        0.75,
        0.5,
        8,
    )
    difference = content["difference"]
    assert (difference["value"], difference["lost"], difference["gained"]) == (-0.25, 3, 1)
    assert difference["p_value"] == pytest.approx(0.625)
    assert (content["kept"]["value"], content["kept"]["n"]) == (0.5, 6)
    assert values == {"retention_loss": [0, 0, 1, 1, 0, 1, -1, 0]}
    assert content["indicators"]["retention_loss"]["value"] == 0.25
    by_kind = {name: kind["difference"]["value"] for name, kind in content["kinds"].items()}
    assert by_kind == {"a": -0.5, "b": 0}
    assert [row["prompt"] for row in content["lost"]] == ["Say yes 2.", "Say yes 3.", "Say yes 5."]
    (gained,) = content["gained"]
    assert (gained["base"], gained["line"], gained["why"]) == ("no", 7, ["constraint_fail"])


def test_a_bound_that_the_prompts_cannot_decide_is_no_bound() -> None:
    """150 prompts can tell a loss of 0.10 from none, 0.05 takes 495: refused, or too few of them."""
    assert least_prompts(0.10) == 124
    assert least_prompts(0.05) == 495
    line = {"metric": "retention_loss", "at_most": 0.05}
    with pytest.raises(
        InputError, match=r"n: so few prompts .*Fix: write n: 495 .*--retention_data"
    ):
        parse_gate([{**line, "n": 150}], "recipe.yaml:3")
    (bound,) = parse_gate([line], "")
    assert bound.n == 495
    (bound,) = parse_gate([{**line, "at_most": 0.10}], "")
    assert bound.n == 124


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"),
    [(0, 0, "pass"), (15, 15, "pass"), (15, 5, "inconclusive"), (40, 2, "fail")],
)
def test_verdicts(lost: int, gained: int, verdict: str) -> None:
    """On 150 prompts: nothing lost and as much gained as lost pass, a loss of a quarter fails."""
    same = 150 - lost - gained
    base = answered("a:" + "y" * (same + lost) + "n" * gained)
    tuned = answered("a:" + "y" * same + "n" * lost + "y" * gained)
    bounds = parse_gate([{"metric": "retention_loss", "at_most": 0.10, "n": 150}], "")
    values = measure_retention(base, tuned).values
    assert judge(bounds, answered("a:y"), None, values)["verdict"] == verdict
    bounds = parse_gate([{"metric": "retention_loss", "at_most": 0.05}], "")
    assert judge(bounds, answered("a:y"), None, values)["verdict"] == "insufficient_n"


def test_terminal_and_report_show_what_was_lost(tmp_path: Path) -> None:
    """Both say the shares, by kind, and the prompts; text of a model does nothing on either."""
    content = {"prompts": "packaged", "before": "me/base\u202e"} | measure_retention(
        *base_and_tuned()
    ).content
    text = retention_text({"retention": content})
    assert "general prompts passed, 8" in text
    assert "0.500 [0.19, 0.81] is still passed" in text
    assert "lost: Say yes 2. -> no" in text
    assert "\u202e" not in text
    write_evaluation(answered("a:y"), tmp_path, info={}, extra={"retention": content})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in (
        "3 prompts lost",
        "1 prompts gained",
        "yes &lt;b&gt;\u27e8U+202E\u27e9",
        "3 / 1",
    ):
        assert expected in page, expected
    stored: dict[str, Any] = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert stored["retention"]["kept"]["n"] == 6
