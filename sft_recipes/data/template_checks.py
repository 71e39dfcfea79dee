"""Named checks of a chat template, before every training run, on a probe and on its rows.

They look at ids and renderings alone. Nothing here asks for layouts, the code that found the
labels: what both got wrong would pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft_recipes.data.chat_templates import (
    PROBE,
    ChatRenderer,
    load_chat_template,
    shipped_template_names,
)
from sft_recipes.data.label_checks import (
    CheckedRow,
    Outcome,
    Verdict,
    header_not_trained,
    ids_as_served,
    stop_token_trained,
)
from sft_recipes.data.labels import Labeller
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example, Message

# A control token as templates spell it; DeepSeek's bars are full-width.
_CONTROL_TOKEN = re.compile(r"<[|\uff5c][^<>{}]+[|\uff5c]>")


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """The outcome of one named check; `note` is something to know, `failed` stops the run."""

    name: str
    outcome: Outcome
    detail: str


def check_template(labeller: Labeller, examples: Sequence[Example] = ()) -> list[TemplateCheck]:
    """Run all checks. `examples`: training conversations, of every structure in the data."""
    renderer = labeller.renderer
    rows = _labelled(labeller, [example for example in examples if example.text is None])
    # The probe is no row of the data, and of one conversation there may be several rows.
    rendered = list({id(checked.original): checked.example for checked in rows[1:]}.values())
    verdicts = {
        "stop token trained": stop_token_trained(renderer, labeller, rows),
        "header not trained": header_not_trained(renderer, labeller, rows),
        "training ids are serving ids": ids_as_served(renderer, labeller, rows),
        "renders twice the same": _render_stable(renderer),
        "training equals serving": _training_equals_serving(renderer),
        "reasoning rendered": _reasoning_rendered(renderer, rendered),
        "tools rendered": _tools_rendered(renderer, rendered),
        "tool calls rendered": _calls_rendered(renderer, rendered),
        "answers end by themselves": _end_texts(labeller, rendered),
    }
    checks: list[TemplateCheck] = []
    for name, verdict in verdicts.items():
        checks.append(TemplateCheck(name, verdict.outcome, verdict.detail))
    return checks


def require(checks: Sequence[TemplateCheck]) -> None:
    """Raise CheckFailed naming every failed check."""
    failed = [f"{check.name}: {check.detail}" for check in checks if check.outcome == "failed"]
    if failed:
        raise CheckFailed("\n".join(failed))


def _labelled(labeller: Labeller, examples: Sequence[Example]) -> list[CheckedRow]:
    """The rows of a probe and of the examples."""
    chosen = [Example(messages=PROBE, source="probe", row=0), *examples]
    rows: list[CheckedRow] = []
    for row in labeller.label(chosen).rows:
        original = chosen[row.example]
        rows.append(CheckedRow(row, original, labeller.for_template(original)))
    return rows


# -- checks of the template ------------------------------------------------------------------------


def _render_stable(renderer: ChatRenderer) -> Verdict:
    """The same conversation renders to the same text, today and tomorrow."""
    if renderer.render(PROBE) != renderer.render(PROBE):
        return Verdict("failed", "two renderings of the same conversation differ")
    if "strftime_now" in renderer.template_text:
        what = "the template may write today's date"
        fix = "fix it with chat_template_kwargs (often date_string)"
        return Verdict("note", f"{what}; {fix}")
    return Verdict("ok", "two renderings are equal and read no clock")


def _training_equals_serving(renderer: ChatRenderer) -> Verdict:
    """The generation prompt is how the trained text begins."""
    prompt = renderer.render(PROBE[:1], add_generation_prompt=True)
    text = renderer.render(PROBE)
    if not text.startswith(prompt):
        shared = len(prompt)
        while not text.startswith(prompt[:shared]):
            shared -= 1
        ending = f"the generation prompt ends in {prompt[shared:]!r}"
        what = f"{ending}, which answers without reasoning do not repeat"
        so = "the span starts at the answer, and serving begins elsewhere than training"
        return Verdict("note", f"{what}: {so}")
    if text.rstrip().endswith(PROBE[1]["content"]):
        what = "the template leaves the last turn open"
        fix = "the token that ends earlier turns is appended, so that the model stops"
        return Verdict("note", f"{what}; {fix}")
    return Verdict("ok", "the generation prompt is a prefix of the trained text")


# -- checks of what the template leaves out --------------------------------------------------------


def _reasoning_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> Verdict:
    """A template that knows no reasoning field drops the reasoning of the rows without a word."""
    brought = 0
    left_out: list[Example] = []
    for example in examples:
        for index, message in enumerate(example.messages):
            reasoning = _reasoning_of(message)
            if not reasoning:
                continue
            brought += 1
            if reasoning not in renderer.render(example.messages[: index + 1], example.tools):
                left_out.append(example)
    if not brought:
        return Verdict("not looked at", f"none of {len(examples)} conversations brings reasoning")
    if left_out:
        where = f"{len(left_out)} of {brought} turns ({left_out[0].where})"
        what = f"the template leaves out the reasoning of {where}"
        fix = "remove it from the rows if that is meant"
        others = templates_with_reasoning(renderer)
        if others:
            fix = f"chat_template: {others[0]} writes it"
        return Verdict("note", f"{what}; it is not trained. {fix}")
    return Verdict("ok", f"checked {brought} of {brought} turns that bring reasoning")


def _reasoning_of(message: Message) -> str:
    """The reasoning of a message, in a field of its own or inline."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip()
    content = message.get("content") or ""
    if message["role"] == "assistant" and "</think>" in content:
        return content.partition("</think>")[0].removeprefix("<think>").strip()
    return ""


def templates_with_reasoning(renderer: ChatRenderer) -> list[str]:
    """Shipped templates that write reasoning and whose control tokens the tokenizer has."""
    vocabulary = renderer.tokenizer.get_vocab()
    fitting: list[str] = []
    for name in shipped_template_names():
        text = load_chat_template(name)
        is_known = all(token in vocabulary for token in _CONTROL_TOKEN.findall(text))
        if "reasoning_content" in text and is_known:
            fitting.append(name)
    return fitting


def _tools_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> Verdict:
    """A template without tools leaves out their definitions.

    The model would learn to call what it is not shown.
    """
    brought = [example for example in examples if example.tools]
    if not brought:
        return Verdict("not looked at", f"none of {len(examples)} conversations brings tools")
    ignored = [example for example in brought if _leaves_out_tools(renderer, example)]
    if ignored:
        where = f"{len(ignored)} of {len(brought)} rows ({ignored[0].where})"
        return Verdict("note", f"the template leaves out the tools of {where}")
    return Verdict("ok", f"checked {len(brought)} of {len(brought)} rows that bring tools")


def _leaves_out_tools(renderer: ChatRenderer, example: Example) -> bool:
    try:
        return renderer.render(example.messages, example.tools) == renderer.render(example.messages)
    except TEMPLATE_ERRORS:
        return False  # it asks for them


def _calls_rendered(renderer: ChatRenderer, examples: Sequence[Example]) -> Verdict:
    """A template without tool calls leaves them out, or refuses their rows."""
    calling: list[Example] = []
    for example in examples:
        if any(message.get("tool_calls") for message in example.messages):
            calling.append(example)
    if not calling:
        return Verdict("not looked at", f"none of {len(examples)} conversations calls a tool")
    for example in calling:
        text = renderer.render(example.messages, example.tools)
        for message in example.messages:
            for call in message.get("tool_calls") or ():
                if call["function"]["name"] not in text:
                    what = f"{example.where}: the template leaves out a call of the row"
                    return Verdict("note", what)
    return Verdict("ok", f"checked {len(calling)} of {len(calling)} rows that call tools")


def _end_texts(labeller: Labeller, examples: Sequence[Example]) -> Verdict:
    """Answers that end in the text of an end token.

    They would teach a model to write that text before it stops.
    """
    answers = 0
    ending: list[str] = []
    for example in examples:
        for message in example.messages:
            if message["role"] == "assistant" and message.get("content"):
                answers += 1
                token = labeller.end_texts.at_end_of(message["content"])
                if token is not None:
                    ending.append(token)
    if not answers:
        return Verdict(
            "not looked at", f"none of {len(examples)} conversations has an answer in text"
        )
    if ending:
        which = f"{len(ending)} of {answers} answers end in the text {ending[0]!r}"
        what = f"{which}, which is trained as text"
        return Verdict("note", f"{what}; control_tokens: strip_end takes it off")
    return Verdict("ok", f"checked {answers} answers")
