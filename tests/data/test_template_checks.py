"""The named checks before every run: what they pass, what they note, and what stops a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sft_recipes.data import template_checks
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.data.template_checks import TemplateCheck, check_template, require
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.conftest import build_tokenizer

TWO_TURNS = Example(
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one."},
        {"role": "assistant", "content": "Red."},
    ],
    "data.jsonl",
    4,
    line=5,
)


def renderer_for(template: str | None = None) -> ChatRenderer:
    """A renderer with a shipped template or the text of one."""
    tokenizer = build_tokenizer()
    if template is not None and "{" in template:
        tokenizer.chat_template = template
        return attach_chat_template(tokenizer, TemplateSettings())
    return attach_chat_template(tokenizer, TemplateSettings(template))


def outcomes(renderer: ChatRenderer, labeller: Any, *examples: Example) -> dict[str, TemplateCheck]:
    """The checks by name."""
    return {check.name: check for check in check_template(labeller, examples)}


@pytest.mark.parametrize("template", [None, "chatml", "chapter_chat", "alpaca"])
def test_shipped_templates_pass(template: str | None) -> None:
    """All checks of a shipped template are ok, on the probe and on a conversation of two turns."""
    renderer = renderer_for(template)
    found = outcomes(renderer, Labeller(renderer, LabelSettings()), TWO_TURNS)
    unseen = {"reasoning rendered", "tools rendered", "tool calls rendered"}
    assert {name for name, check in found.items() if check.outcome == "not looked at"} == unseen, (
        found
    )
    assert {check.outcome for name, check in found.items() if name not in unseen} == {"ok"}, found
    assert "checked 2 rows" in found["stop token trained"].detail
    require(list(found.values()))


class BrokenLabeller(Labeller):
    """A labeller whose labels were moved: `shift` more tokens at the start, `cut` fewer at the end."""

    shift, cut = 0, 0

    def label(self, examples: Any) -> LabelledBatch:
        batch = super().label(examples)
        for number, row in enumerate(batch.rows):
            (first, end), (_, last) = row.spans[0], row.spans[-1]
            moved = [(first - self.shift, end), *row.spans[1:]]
            moved[-1] = (moved[-1][0], last - self.cut)
            batch.rows[number] = dataclasses.replace(row, spans=moved)
        return batch


def test_missing_stop_token_stops_the_run() -> None:
    """Labels without the last turn's terminator fail by name, and `require` raises."""
    renderer = renderer_for()
    labeller = BrokenLabeller(renderer, LabelSettings())
    labeller.cut = 1
    found = outcomes(renderer, labeller, TWO_TURNS)
    assert found["stop token trained"].outcome == "failed"
    assert "the model would not learn to stop" in found["stop token trained"].detail
    with pytest.raises(
        CheckFailed, match=r"stop token trained: probe.*generation does not stop at it"
    ):
        require(list(found.values()))


def test_trained_header_stops_the_run() -> None:
    """Labels that begin one token early, inside the generation prompt, fail by name."""
    renderer = renderer_for("chatml")
    labeller = BrokenLabeller(renderer, LabelSettings())
    labeller.shift = 1
    found = outcomes(renderer, labeller)
    assert (
        found["header not trained"].outcome == "failed"
        and found["stop token trained"].outcome == "ok"
    )
    with pytest.raises(CheckFailed, match="begins inside the prompt"):
        require(list(found.values()))


def test_train_on_all_is_noted() -> None:
    """train_on: all trains headers as asked: a note, not a failure."""
    renderer = renderer_for()
    found = outcomes(renderer, Labeller(renderer, LabelSettings(train_on="all")), TWO_TURNS)
    assert found["header not trained"].outcome == "note"
    require(list(found.values()))


def test_unstable_rendering_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renderings of one conversation that differ fail by name."""
    renderer = renderer_for()
    labeller = Labeller(renderer, LabelSettings())
    real, count = renderer.render, iter(range(1000))
    monkeypatch.setattr(
        renderer, "render", lambda *args, **kwargs: f"{next(count)}{real(*args, **kwargs)}"
    )
    assert template_checks._render_stable(renderer).outcome == "failed"
    assert labeller.settings.train_on == "assistant"


CHATML_TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_clock_is_noted() -> None:
    """A template that can write today's date is named."""
    renderer = renderer_for(
        "{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHATML_TURN + PROMPT
    )
    check = outcomes(renderer, Labeller(renderer, LabelSettings()))["renders twice the same"]
    assert check.outcome == "note" and "date" in check.detail


def test_opened_think_block_is_noted() -> None:
    """A generation prompt that opens a think block which the answers do not repeat: serving differs, and it is said."""
    renderer = renderer_for(CHATML_TURN + PROMPT.replace("assistant\n", "assistant\n<think>\n"))
    found = outcomes(renderer, Labeller(renderer, LabelSettings()), TWO_TURNS)
    assert found["training equals serving"].outcome == "note"
    assert "<think>" in found["training equals serving"].detail


def test_reasoning_that_the_template_leaves_out_is_said() -> None:
    """A row's reasoning that the rendering does not hold is counted in a note; a template that writes it is ok."""
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    example = Example(
        [turns[0], {**turns[1], "reasoning_content": "Counting up."}], "data.jsonl", 0
    )
    renderer = renderer_for(CHATML_TURN + PROMPT)
    note = outcomes(renderer, Labeller(renderer, LabelSettings()), example)["reasoning rendered"]
    assert (note.outcome, "1 of 1 turns" in note.detail) == ("note", True)
    assert "chat_template: chatml writes it" in note.detail
    renderer = renderer_for("chatml")
    assert (
        outcomes(renderer, Labeller(renderer, LabelSettings()), example)[
            "reasoning rendered"
        ].outcome
        == "ok"
    )
    writes_it = (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>\n"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    renderer = renderer_for(writes_it)
    assert (
        outcomes(renderer, Labeller(renderer, LabelSettings()), example)[
            "reasoning rendered"
        ].outcome
        == "ok"
    )


def test_tools_that_the_template_leaves_out_are_said() -> None:
    """Rows that bring tool definitions to a template without a place for them are counted in a note."""
    tool = {
        "type": "function",
        "function": {"name": "look_up", "description": "Looks up.", "parameters": {}},
    }
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    example = Example(turns, "data.jsonl", 0, tools=[tool])
    renderer = renderer_for("chatml")
    note = outcomes(renderer, Labeller(renderer, LabelSettings()), example)["tools rendered"]
    assert (note.outcome, "1 of 1 rows" in note.detail) == ("note", True)
    shows_them = "{{- (tools or []) | tojson -}}" + CHATML_TURN + PROMPT
    renderer = renderer_for(shows_them)
    assert (
        outcomes(renderer, Labeller(renderer, LabelSettings()), example)["tools rendered"].outcome
        == "ok"
    )
