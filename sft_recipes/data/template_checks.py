"""Named checks of a chat template, run before every training run on a probe and on rows of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sft_recipes.data.chat_templates import PROBE, ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.data.turns import common_prefix_length
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example

Outcome = Literal["ok", "note", "failed"]


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """The outcome of one named check; `note` is something to know, `failed` stops the run."""

    name: str
    outcome: Outcome
    detail: str


def check_template(renderer: ChatRenderer, labeller: Labeller, examples: Sequence[Example] = ()) -> list[TemplateCheck]:
    """Run all checks. `examples`: some rows of the data, labelled with the recipe's settings."""
    probe = Example(messages=PROBE, source="probe", row=0)
    chosen = [probe, *[example for example in examples if example.text is None]]
    return [
        _stop_token_trained(renderer, labeller, chosen),
        _header_not_trained(renderer, labeller, chosen),
        _render_stable(renderer),
        _train_equals_serve(renderer),
        _reasoning_rendered(renderer, [labeller.for_template(example) for example in chosen]),
        _tools_rendered(renderer, [chosen[row.example] for row in labeller.label(chosen).rows]),
    ]


def require(checks: Sequence[TemplateCheck]) -> None:
    """Raise CheckFailed naming every failed check."""
    failed = [f"{check.name}: {check.detail}" for check in checks if check.outcome == "failed"]
    if failed:
        raise CheckFailed("\n".join(failed))


def _stop_token_trained(renderer: ChatRenderer, labeller: Labeller, examples: Sequence[Example]) -> TemplateCheck:
    """Every trained turn ends in one trained terminator that generation stops at."""
    name = "stop token trained"
    rows = labeller.label(examples).rows
    stops = set(renderer.stop_ids)
    for row in rows:
        trained_stops = sum(label in stops for label in row.labels)
        if labeller.settings.train_on != "all" and row.turns and trained_stops != len(row.turns):
            where = examples[row.example].where
            detail = f"{where}: {len(row.turns)} trained turns, {trained_stops} trained stop tokens"
            return TemplateCheck(name, "failed", detail + ": the model would not learn to stop")
    text = ", ".join(repr(renderer.tokenizer.convert_ids_to_tokens(index)) for index in renderer.stop_ids)
    return TemplateCheck(name, "ok", f"stops at {text}; checked {len(rows)} of {len(rows)} rows")


def _header_not_trained(renderer: ChatRenderer, labeller: Labeller, examples: Sequence[Example]) -> TemplateCheck:
    """Nothing of the generation prompt and no text of another role carries a label."""
    name = "header not trained"
    if labeller.settings.train_on == "all":
        return TemplateCheck(name, "note", "train_on: all trains headers and user text, as asked")
    rows = labeller.label(examples).rows
    for row in rows:
        example = labeller.for_template(examples[row.example])
        prompt = renderer.prompt_ids(example.messages[: row.turns[0]], example.tools)
        first = next(index for index, label in enumerate(row.labels) if label != IGNORE_INDEX)
        if first < common_prefix_length(row.input_ids, prompt):
            return TemplateCheck(name, "failed", f"{example.where}: the trained span begins inside the prompt")
    return TemplateCheck(name, "ok", f"checked {len(rows)} of {len(rows)} rows")


def _render_stable(renderer: ChatRenderer) -> TemplateCheck:
    """The same conversation renders to the same text, today and tomorrow."""
    name = "render stable"
    if renderer.render(PROBE) != renderer.render(PROBE):
        return TemplateCheck(name, "failed", "two renderings of the same conversation differ")
    if re.search(r"strftime_now", renderer.template_text):
        detail = "the template may write today's date; fix it with chat_template_kwargs (often date_string)"
        return TemplateCheck(name, "note", detail)
    return TemplateCheck(name, "ok", "two renderings are equal and read no clock")


def _train_equals_serve(renderer: ChatRenderer) -> TemplateCheck:
    """The generation prompt is how the trained text begins."""
    name = "training equals serving"
    layout = renderer.layout(PROBE)
    if layout is not None and layout.prompt_cut:
        detail = (
            f"the generation prompt ends in {layout.prompt_rest!r}, which answers without reasoning do not repeat: "
            "the span starts at the answer, and serving begins elsewhere than training"
        )
        return TemplateCheck(name, "note", detail)
    if layout is not None and layout.closing:
        detail = f"{layout.closing!r} ends earlier turns only; it is appended to the last turn so that the model stops"
        return TemplateCheck(name, "note", detail)
    return TemplateCheck(name, "ok", "the generation prompt is a prefix of the trained text")


def _reasoning_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> TemplateCheck:
    """A template that knows no reasoning field drops the reasoning of the rows without a word."""
    name = "reasoning rendered"
    brought = ignored = 0
    for example in examples:
        for index, message in enumerate(example.messages):
            if reasoning := str(message.get("reasoning_content") or "").strip():
                brought += 1
                ignored += reasoning not in renderer.render(example.messages[: index + 1], example.tools)
    if ignored:
        detail = f"the template leaves out the reasoning of {ignored} of {brought} turns; it is not trained"
        return TemplateCheck(name, "note", detail)
    return TemplateCheck(name, "ok", f"checked {brought} of {brought} turns that bring reasoning")


def _tools_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> TemplateCheck:
    """A template without tools leaves out their definitions: the model would learn to call what it is not shown."""
    name = "tools rendered"
    brought = [example for example in examples if example.tools]
    ignored = [
        example
        for example in brought
        if renderer.render(example.messages, example.tools) == renderer.render(example.messages)
    ]
    if ignored:
        detail = f"the template leaves out the tools of {len(ignored)} of {len(brought)} rows ({ignored[0].where})"
        return TemplateCheck(name, "note", detail)
    return TemplateCheck(name, "ok", f"checked {len(brought)} of {len(brought)} rows that bring tools")
