"""Named checks of a chat template, run before every training run on a probe and on rows of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sft_recipes.data.chat_templates import PROBE, ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, LabelledRow, Labeller
from sft_recipes.data.turns import common_prefix_length
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example

Outcome = Literal["ok", "note", "failed"]
# What a check found; and what it looks at: training rows with their examples as they are rendered.
Found = tuple[Outcome, str]
Labelled = Sequence[tuple[LabelledRow, Example]]
ALL_TRAINED: Found = ("note", "train_on: all trains headers and user text, as asked")


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """The outcome of one named check; `note` is something to know, `failed` stops the run."""

    name: str
    outcome: Outcome
    detail: str


def check_template(renderer: ChatRenderer, labeller: Labeller, examples: Sequence[Example] = ()) -> list[TemplateCheck]:
    """Run all checks. `examples`: some rows of the data, labelled with the recipe's settings."""
    chosen = [Example(messages=PROBE, source="probe", row=0), *[one for one in examples if one.text is None]]
    rows = labeller.label(chosen).rows
    rendered = {row.example: labeller.for_template(chosen[row.example]) for row in rows}
    examples = list(rendered.values())
    trains_all = labeller.settings.train_on == "all"
    labelled = [] if trains_all else [(row, rendered[row.example]) for row in rows]
    found = {
        "stop token trained": _stop_token_trained(renderer, labelled),
        "header not trained": ALL_TRAINED if trains_all else _header_not_trained(renderer, labelled),
        "render stable": _render_stable(renderer),
        "training equals serving": _train_equals_serve(renderer),
        "reasoning rendered": _reasoning_rendered(renderer, examples),
        "tools rendered": _tools_rendered(renderer, examples),
    }
    return [TemplateCheck(name, outcome, detail) for name, (outcome, detail) in found.items()]


def require(checks: Sequence[TemplateCheck]) -> None:
    """Raise CheckFailed naming every failed check."""
    failed = [f"{check.name}: {check.detail}" for check in checks if check.outcome == "failed"]
    if failed:
        raise CheckFailed("\n".join(failed))


def _stop_token_trained(renderer: ChatRenderer, labelled: Labelled) -> Found:
    """Every trained turn ends in one trained terminator that generation stops at."""
    for row, example in labelled:
        stops = sum(label in renderer.stop_ids for label in row.labels)
        if stops != len(row.turns):
            counts = f"{len(row.turns)} trained turns, {stops} trained stop tokens"
            return "failed", f"{example.where}: {counts}: the model would not learn to stop"
    text = ", ".join(repr(renderer.tokenizer.convert_ids_to_tokens(index)) for index in renderer.stop_ids)
    return "ok", f"stops at {text}; checked {len(labelled)} of {len(labelled)} rows"


def _header_not_trained(renderer: ChatRenderer, labelled: Labelled) -> Found:
    """Nothing of the generation prompt and no text of another role carries a label."""
    for row, example in labelled:
        prompt = renderer.prompt_ids(example.messages[: row.turns[0]], example.tools)
        first = next(index for index, label in enumerate(row.labels) if label != IGNORE_INDEX)
        if first < common_prefix_length(row.input_ids, prompt):
            return "failed", f"{example.where}: the trained span begins inside the prompt"
    return "ok", f"checked {len(labelled)} of {len(labelled)} rows"


def _render_stable(renderer: ChatRenderer) -> Found:
    """The same conversation renders to the same text, today and tomorrow."""
    if renderer.render(PROBE) != renderer.render(PROBE):
        return "failed", "two renderings of the same conversation differ"
    if "strftime_now" in renderer.template_text:
        return "note", "the template may write today's date; fix it with chat_template_kwargs (often date_string)"
    return "ok", "two renderings are equal and read no clock"


def _train_equals_serve(renderer: ChatRenderer) -> Found:
    """The generation prompt is how the trained text begins."""
    layout = renderer.layout(PROBE)
    if layout is not None and layout.prompt_rest:
        rest = f"the generation prompt ends in {layout.prompt_rest!r}, which answers without reasoning do not repeat"
        return "note", f"{rest}: the span starts at the answer, and serving begins elsewhere than training"
    if layout is not None and layout.closing:
        ends = f"{layout.closing!r} ends earlier turns only"
        return "note", f"{ends}; it is appended to the last turn so that the model stops"
    return "ok", "the generation prompt is a prefix of the trained text"


def _reasoning_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> Found:
    """A template that knows no reasoning field drops the reasoning of the rows without a word."""
    kept = [
        reasoning in renderer.render(example.messages[: index + 1], example.tools)
        for example in examples
        for index, message in enumerate(example.messages)
        if (reasoning := str(message.get("reasoning_content") or "").strip())
    ]
    if not all(kept):
        ignored = f"{kept.count(False)} of {len(kept)} turns"
        return "note", f"the template leaves out the reasoning of {ignored}; it is not trained"
    return "ok", f"checked {len(kept)} of {len(kept)} turns that bring reasoning"


def _tools_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> Found:
    """A template without tools leaves out their definitions: the model would learn to call what it is not shown."""
    brought = [one for one in examples if one.tools]
    ignored = [one for one in brought if renderer.render(one.messages, one.tools) == renderer.render(one.messages)]
    if ignored:
        where = f"{len(ignored)} of {len(brought)} rows ({ignored[0].where})"
        return "note", f"the template leaves out the tools of {where}"
    return "ok", f"checked {len(brought)} of {len(brought)} rows that bring tools"
