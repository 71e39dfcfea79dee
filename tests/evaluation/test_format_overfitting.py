"""Format overfitting on models whose dependence on the format is planted, so that every number is
known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from markupsafe import escape

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template, load_chat_template
from sft_recipes.evaluation.evaluator import write_evaluation
from sft_recipes.evaluation.format_overfitting import (
    FORMAT_METRICS,
    VARIANTS,
    format_questions,
    measure_formats,
)
from sft_recipes.evaluation.questions import Answers, Asking, Question
from sft_recipes.messages import Example
from sft_recipes.recipe import TemplateSettings
from sft_recipes.report.plain_words import named
from tests.conftest import build_model, build_tokenizer

Answer = Callable[[str], tuple[str, bool]]  # rendered prompt -> answer, whether it ends


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return attach_chat_template(build_tokenizer(), TemplateSettings())


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return [example(f"Name colour {index}.", "Blue.", index) for index in range(4)]


def example(question: str, answer: str, row: int, **more: Any) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(messages, "test.jsonl", row, **more)


def model(renderer: ChatRenderer, answer: Answer) -> Any:
    """A model that gives these answers; one that does not end goes on with other words."""
    own = renderer.tokenizer
    fake = build_model(len(own))

    def generate(input_ids: Any, **_: Any) -> Any:
        rows = []
        for row in input_ids.tolist():
            text, ends = answer(own.decode([token for token in row if token != own.pad_token_id]))
            ids = own(text, add_special_tokens=False)["input_ids"]
            rest = own(
                " and so on, one two three four five six seven eight nine ten",
                add_special_tokens=False,
            )
            ids = ids + ([own.eos_token_id] if ends else rest["input_ids"])
            rows.append(row + (ids + [own.eos_token_id if ends else ids[-1]] * 24)[:24])
        return input_ids.new_tensor(rows)

    fake.generate = generate
    return fake


def under_template(prompt: str) -> bool:
    return prompt.endswith("### Response:\n")


def measure(
    tuned: Any,
    base: Any,
    renderer: ChatRenderer,
    examples: list[Example],
    native: str | None = None,
) -> dict[str, Answers]:
    """Both models under every format, as `evaluate --format_overfitting` asks them; base may be
    None."""
    asking = Asking(24, 3, renderer.template_segments, progress=False)
    questions = format_questions(renderer, examples, native)
    answers = {"tuned": asking.ask(tuned, questions)}
    if base is not None:
        answers["base"] = asking.ask(base, questions)
    return answers


def measured(
    renderer: ChatRenderer, asked: list[Example], tuned: Answer, base: Answer | None = None
) -> dict[str, Any]:
    other = base and model(renderer, base)
    return measure_formats(measure(model(renderer, tuned), other, renderer, asked)).content


def test_a_model_that_stops_only_under_its_template(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """Gap 1 in every score; 1 against a base that never stops, 0 against a base with the same
    gap."""
    only: Answer = lambda prompt: ("Blue.", under_template(prompt))  # noqa: E731
    never: Answer = lambda prompt: ("Blue.", False)  # noqa: E731
    content = measured(renderer, asked, only, never)
    for suffix in ("", "_exact_match", "_adherence"):
        for kind in ("format_gap", "format_gap_did"):
            assert (content["indicators"][kind + suffix]["value"], content["n"]) == (1.0, 4)
    assert content["format_spread"] == {
        "completion_rate": 1.0,
        "exact_match": 1.0,
        "format_adherence": 1.0,
    }
    assert list(content["formats"]) == ["template", *VARIANTS]
    rates = [
        content["formats"][name]["tuned"]["completion_rate"]["value"] for name in content["formats"]
    ]
    assert rates == [1.0, 0.0, 0.0, 0.0]
    same = measured(renderer, asked, only, only)["indicators"]
    assert same["format_gap"]["value"] == 1.0 and same["format_gap_did"]["value"] == 0.0


def test_a_model_that_does_not_mind_the_format(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """No gap, no leak; the interval of nothing but equal rows is not a point."""
    content = measured(renderer, asked, lambda prompt: ("Blue.", True))
    assert {one["value"] for one in content["indicators"].values()} == {0.0}
    gap = content["indicators"]["format_gap"]
    assert gap["ci_low"] < 0 < gap["ci_high"] and gap["n"] == 4
    assert "format_gap_did" not in content["indicators"]


def test_gaps_and_leaks_are_means_over_prompts_and_variants(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """One prompt of four, under one variant of three, leaks the template and is wrong."""

    def answer(prompt: str) -> tuple[str, bool]:
        leaks = "Name colour 2." in prompt and prompt.endswith("Answer:")
        return ("### Response:\nGreen." if leaks else "Blue."), True

    content = measured(renderer, asked, answer)
    found = {name: one["value"] for name, one in content["indicators"].items()}
    twelfth = pytest.approx(1 / 12)
    assert found["format_gap_exact_match"] == twelfth and found["format_gap_adherence"] == twelfth
    assert (found["format_gap"], found["leak_rate_on_template"]) == (0.0, 0.0)
    assert found["leak_rate_off_template"] == twelfth
    json.dumps(content, allow_nan=False)


def test_the_native_template_is_asked_too_but_is_no_variant(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """It counts for leaks and spread, not for gaps; the same template again is not asked twice."""
    native = load_chat_template("chatml")

    def answer(prompt: str) -> tuple[str, bool]:
        return ("### Response:\nBlue." if "<|im_start|>" in prompt else "Blue."), True

    tuned = model(renderer, answer)
    content = measure_formats(measure(tuned, None, renderer, asked, native)).content
    assert list(content["formats"]) == ["template", "native", *VARIANTS]
    assert content["indicators"]["leak_rate_off_template"]["value"] == 0.25
    assert content["indicators"]["format_gap_exact_match"]["value"] == 0.0
    assert content["format_spread"]["exact_match"] == 1.0
    again = measure(tuned, None, renderer, asked, renderer.template_text)
    assert list(again["tuned"]) == ["template", *VARIANTS]


def test_each_format_puts_the_same_conversation_differently(renderer: ChatRenderer) -> None:
    """System text leads, headers are the variant's, earlier turns are there; no format ends as the
    template does."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?", "instruction": "One?", "input": ""},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    questions = format_questions(renderer, [Example(messages, "x", 0)])
    assert questions.pop("template") == Question(renderer, [Example(messages, "x", 0)])
    assert [
        question.renderer.render(messages[:-1], add_generation_prompt=True)
        for question in questions.values()
    ] == [
        "Be brief.\n\nOne?\n\n1\n\nTwo?\n\n",
        "Be brief.\n\nQuestion: One?\n\nAnswer: 1\n\nQuestion: Two?\n\nAnswer:",
        "Be brief.\n\nUSER:\nOne?\n\nASSISTANT:\n1\n\nUSER:\nTwo?\n\nASSISTANT:\n",
    ]


def test_variants_begin_with_bos_where_the_tokenizer_does() -> None:
    """A model that was pretrained with BOS sees exactly one in every format."""
    from tokenizers.processors import TemplateProcessing

    own = build_tokenizer(("<s>",), bos_token="<s>")
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.convert_tokens_to_ids("<s>"))]
    )
    row = example("Name a colour.", "Blue.", 0)
    questions = format_questions(attach_chat_template(own, TemplateSettings()), [row])
    starts = []
    for question in questions.values():
        ids = question.renderer.prompt_ids(row.messages[:-1])
        starts.append(ids.count(own.bos_token_id))
    assert starts == [1, 1, 1, 1]


def test_conversations_with_tools_are_left_out(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """The variants have no place for tools; such a row stays in the evaluation and is not asked
    again."""
    with_tools = example(
        "Look it up.", "Blue.", 9, tools=[{"type": "function", "function": {"name": "f"}}]
    )
    content = measured(renderer, [asked[0], with_tools, asked[1]], lambda prompt: ("Blue.", True))
    assert content["n"] == 2
    assert (
        measured(renderer, [with_tools], lambda prompt: ("Blue.", True))["indicators"][
            "format_gap"
        ]["value"]
        is None
    )


def test_conversations_that_the_native_template_refuses_are_left_out(
    renderer: ChatRenderer, asked: list[Example]
) -> None:
    """A base whose own template knows no system turn is asked the rest; both models the same
    rows."""
    native = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + (load_chat_template("chatml"))
    )
    system = Example(
        [{"role": "system", "content": "Be brief."}, *asked[0].messages], "test.jsonl", 9
    )
    tuned = model(renderer, lambda prompt: ("Blue.", True))
    found = measure(tuned, tuned, renderer, [system, *asked], native)
    for one in [*found["tuned"].values(), *found["base"].values()]:
        assert [row["row"] for row in one.rows] == [0, 1, 2, 3]


def test_no_prompts(renderer: ChatRenderer) -> None:
    """n = 0: every indicator without a value, never 0."""
    content = measured(renderer, [], lambda prompt: ("Blue.", True), lambda prompt: ("Blue.", True))
    assert {(one["value"], one["n"]) for one in content["indicators"].values()} == {(None, 0)}
    assert set(content["indicators"]) == set(FORMAT_METRICS)
    assert set(content["format_spread"].values()) == {None}


def test_the_panel_shows_formats_and_indicators(
    renderer: ChatRenderer, asked: list[Example], tmp_path: Any
) -> None:
    """The report names every format and indicator."""

    def answer(prompt: str) -> tuple[str, bool]:
        return ("Blue." if under_template(prompt) else "Green"), True

    tuned = model(renderer, answer)
    found = measure(tuned, tuned, renderer, asked)
    content = measure_formats(found).content
    extra = {"format_overfitting": content}
    write_evaluation(found["tuned"]["template"], tmp_path, info={"model": "tiny"}, extra=extra)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "Format overfitting",
        "4 of 4 prompts",
        "Exact match, user_assistant",
        *map(named, FORMAT_METRICS),
    ):
        assert escape(text) in page
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["format_overfitting"]
        == extra["format_overfitting"]
    )
