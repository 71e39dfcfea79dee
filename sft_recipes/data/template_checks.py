"""Named checks of a chat template, run before every training run on a probe and on rows of the data.

They look at ids and renderings alone. Nothing here asks for layouts, the code that found the labels: what both got
wrong would pass.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sft_recipes.data.chat_templates import (
    PROBE,
    ChatRenderer,
    load_chat_template,
    shipped_template_names,
)
from sft_recipes.data.labels import IGNORE_INDEX, LabelledRow, Labeller
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.errors import CheckFailed
from sft_recipes.messages import Example, Message

# `unseen`: there was nothing to look at.
Outcome = Literal["ok", "note", "failed", "unseen"]

# A control token as templates spell it; DeepSeek's bars are full-width.
_CONTROL_TOKEN = re.compile(r"<[|\uff5c][^<>{}]+[|\uff5c]>")

# With a system message of its own a conversation brings none of the template's.
_EXCHANGE: Sequence[Message] = (
    {"role": "system", "content": "QZsystemZQ"},
    {"role": "user", "content": "QZaskZQ"},
    {"role": "assistant", "content": "QZanswerZQ"},
    {"role": "user", "content": "QZnextZQ"},
    {"role": "assistant", "content": "QZlaterZQ"},
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says."""

    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """The outcome of one named check; `note` is something to know, `failed` stops the run."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A training row with its example, as it came and as it is rendered."""

    row: LabelledRow
    original: Example
    example: Example

    def trained_runs(self) -> Iterator[tuple[int, int]]:
        """Positions `start:end` of neighbouring trained tokens."""
        labels = self.row.labels
        start = 0
        for position, label in enumerate([*labels, IGNORE_INDEX]):
            before = labels[position - 1] if position else IGNORE_INDEX
            if label != IGNORE_INDEX and before == IGNORE_INDEX:
                start = position
            if label == IGNORE_INDEX and before != IGNORE_INDEX:
                yield start, position


def check_template(labeller: Labeller, examples: Sequence[Example] = ()) -> list[TemplateCheck]:
    """Run all checks. `examples`: training conversations, of every structure in the data."""
    renderer = labeller.renderer
    rows = _labelled(labeller, [example for example in examples if example.text is None])
    # The probe is no row of the data, and of one conversation there may be several rows.
    rendered = list({id(checked.original): checked.example for checked in rows[1:]}.values())
    verdicts = {
        "stop token trained": _stop_token_trained(renderer, labeller, rows),
        "header not trained": _header_not_trained(renderer, labeller, rows),
        "ids as served": _ids_as_served(renderer, labeller, rows),
        "render stable": _render_stable(renderer),
        "training equals serving": _training_equals_serving(renderer),
        "reasoning rendered": _reasoning_rendered(renderer, rendered),
        "tools rendered": _tools_rendered(renderer, rendered),
        "tool calls rendered": _calls_rendered(renderer, rendered),
        "answers end by themselves": _end_texts(labeller, rendered),
    }
    return [
        TemplateCheck(name, verdict.outcome, verdict.detail) for name, verdict in verdicts.items()
    ]


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


def _all_trained(labeller: Labeller) -> Verdict | None:
    if labeller.settings.train_on == "all":
        return Verdict("note", "train_on: all trains headers and user text, as asked")
    return None


def _count(rows: Sequence[CheckedRow]) -> str:
    return f"checked {len(rows)} of {len(rows)} rows"


# -- checks of labels --------------------------------------------------------------------------------------------------


def _stop_token_trained(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """Every trained turn ends in one terminator that generation stops at, and with it the trained text ends.

    Which tokens open a turn is read off a rendered exchange, token by token: none of them may be trained as an end.
    """
    all_trained = _all_trained(labeller)
    if all_trained is not None:
        return all_trained
    openers = _opening_ids(renderer)
    special = set(renderer.special_tokens.values())
    for checked in rows:
        runs = list(checked.trained_runs())
        where = checked.example.where
        if len(runs) != len(checked.row.turns):
            counts = f"{len(checked.row.turns)} trained turns, {len(runs)} trained stretches"
            return Verdict("failed", f"{where}: {counts}: a turn runs into the next one")
        for start, end in runs:
            last = checked.row.input_ids[end - 1]
            if last not in special or last not in renderer.stop_ids:
                text = renderer.tokenizer.convert_ids_to_tokens(last)
                what = f"{text!r} is the last trained token of a turn, and generation does not stop at it"
                return Verdict("failed", f"{where}: {what}: the model would not learn to stop")
            inside = _stops_before_end(renderer, checked.row.input_ids[start : end - 1])
            if inside:
                return Verdict(
                    "failed", f"{where}: generation would stop at {inside!r}, inside a trained turn"
                )
            if last in openers:
                text = renderer.tokenizer.convert_ids_to_tokens(last)
                return Verdict(
                    "failed",
                    f"{where}: {text!r} is trained as the end of a turn, and it opens every turn",
                )
    stops = ", ".join(
        repr(renderer.tokenizer.convert_ids_to_tokens(index)) for index in renderer.stop_ids
    )
    return Verdict("ok", f"stops at {stops}; {_count(rows)}")


def _stops_before_end(renderer: ChatRenderer, ids: Sequence[int]) -> str | None:
    """A token before a turn's last one at which generation would stop; a run of them at the end is one terminator."""
    special = set(renderer.special_tokens.values())
    body = list(ids)
    while body and body[-1] in special:
        body.pop()
    for token in body:
        if token in renderer.stop_ids:
            return str(renderer.tokenizer.convert_ids_to_tokens(token))
    return None


def _opening_ids(renderer: ChatRenderer) -> set[int]:
    """Ids of the control tokens that open the assistant's turn, and every turn."""
    special = set(renderer.special_tokens.values())
    closed = renderer.text_ids(renderer.render(PROBE[:1]))
    opened = renderer.text_ids(renderer.render(PROBE[:1], add_generation_prompt=True))
    if len(opened) > len(closed) and opened[: len(closed)] == closed:
        # What the generation prompt adds opens the assistant's turn.
        return special.intersection(opened[len(closed) :])
    # The template opens the turn whatever is asked, or has no header. The tokens before the first text of an exchange
    # that stand again before the next question, but not first there: the first one ends the answer.
    for exchange in (_EXCHANGE, _EXCHANGE[1:]):
        try:
            text = renderer.render(exchange)
        except TEMPLATE_ERRORS:
            continue
        before_first = text.partition(exchange[0]["content"])[0]
        before_next = text.partition("QZanswerZQ")[2].partition("QZnextZQ")[0]
        next_ids = [token for token in renderer.text_ids(before_next) if token in special]
        return special.intersection(renderer.text_ids(before_first)).intersection(next_ids[1:])
    return set()


def _header_not_trained(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """Nothing of the generation prompt and no text of another role carries a label."""
    all_trained = _all_trained(labeller)
    if all_trained is not None:
        return all_trained
    for checked in rows:
        first_turn = checked.row.turns[0]
        prompt = renderer.prompt_ids(checked.example.messages[:first_turn], checked.example.tools)
        start, _ = next(checked.trained_runs())
        if checked.row.input_ids[: start + 1] == prompt[: start + 1]:
            return Verdict(
                "failed", f"{checked.example.where}: the trained span begins inside the prompt"
            )
    return Verdict("ok", _count(rows))


def _ids_as_served(
    renderer: ChatRenderer, labeller: Labeller, rows: Sequence[CheckedRow]
) -> Verdict:
    """A row begins with the ids that a server makes of the prompt, and is the tokenizer's own encoding of the text
    where no token joins the answer to the prompt.
    """
    compared = 0
    joined = 0
    for checked in rows:
        if checked.row.neutralized:
            continue  # compared with transformers' own encoding in the tests
        compared += 1
        joined += checked.row.joined
        example = checked.example
        last = checked.row.turns[-1]
        ids = checked.row.input_ids
        prompt = renderer.prompt_ids(example.messages[:last], example.tools)
        whole = renderer.text_ids(renderer.render(example.messages[: last + 1], example.tools))
        # Where the template leaves the last turn open, the token that closes it is ours.
        is_served = ids == whole or ids[:-1] == whole[: len(ids) - 1]
        if not is_served and (checked.row.joined or whole[: len(prompt) - 1] != prompt[:-1]):
            # A token joins the answer, or the template writes the conversation otherwise once it is answered: then the
            # row begins with what a server makes, or where the prompt is no beginning of the text, with the tokenizer's
            # own ids of what stands before the answer.
            *_, (start, _) = checked.trained_runs()
            before = renderer.tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
            is_served = ids[: len(prompt)] == prompt or ids[:start] == renderer.text_ids(before)
        if not is_served:
            return Verdict(
                "failed", f"{example.where}: the ids are not those that a server makes of the row"
            )
    if not compared:
        return Verdict("unseen", "every row looked at spells control tokens")
    return Verdict(
        "ok",
        f"checked {compared} of {compared} rows, {joined} with an answer that a token would join",
    )


# -- checks of the template --------------------------------------------------------------------------------------------


def _render_stable(renderer: ChatRenderer) -> Verdict:
    """The same conversation renders to the same text, today and tomorrow."""
    if renderer.render(PROBE) != renderer.render(PROBE):
        return Verdict("failed", "two renderings of the same conversation differ")
    if "strftime_now" in renderer.template_text:
        what = "the template may write today's date; fix it with chat_template_kwargs (often date_string)"
        return Verdict("note", what)
    return Verdict("ok", "two renderings are equal and read no clock")


def _training_equals_serving(renderer: ChatRenderer) -> Verdict:
    """The generation prompt is how the trained text begins."""
    prompt = renderer.render(PROBE[:1], add_generation_prompt=True)
    text = renderer.render(PROBE)
    if not text.startswith(prompt):
        shared = len(prompt)
        while not text.startswith(prompt[:shared]):
            shared -= 1
        rest = f"the generation prompt ends in {prompt[shared:]!r}, which answers without reasoning do not repeat"
        return Verdict(
            "note",
            f"{rest}: the span starts at the answer, and serving begins elsewhere than training",
        )
    if text.rstrip().endswith(PROBE[1]["content"]):
        what = (
            "the template leaves the last turn open; the token that ends earlier turns is appended"
        )
        return Verdict("note", f"{what}, so that the model stops")
    return Verdict("ok", "the generation prompt is a prefix of the trained text")


# -- checks of what the template leaves out ----------------------------------------------------------------------------


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
        return Verdict("unseen", f"none of {len(examples)} conversations brings reasoning")
    if left_out:
        what = f"the template leaves out the reasoning of {len(left_out)} of {brought} turns ({left_out[0].where})"
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
    """A template without tools leaves out their definitions: the model would learn to call what it is not shown."""
    brought = [example for example in examples if example.tools]
    if not brought:
        return Verdict("unseen", f"none of {len(examples)} conversations brings tools")
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
    calling = [
        example
        for example in examples
        if any(message.get("tool_calls") for message in example.messages)
    ]
    if not calling:
        return Verdict("unseen", f"none of {len(examples)} conversations calls a tool")
    for example in calling:
        text = renderer.render(example.messages, example.tools)
        for message in example.messages:
            for call in message.get("tool_calls") or ():
                if call["function"]["name"] not in text:
                    return Verdict(
                        "note", f"{example.where}: the template leaves out a call of the row"
                    )
    return Verdict("ok", f"checked {len(calling)} of {len(calling)} rows that call tools")


def _end_texts(labeller: Labeller, examples: Sequence[Example]) -> Verdict:
    """Answers that end in the text of an end token would teach a model to write that text before it stops."""
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
        return Verdict("unseen", f"none of {len(examples)} conversations has an answer in text")
    if ending:
        what = f"{len(ending)} of {answers} answers end in the text {ending[0]!r}, which is trained as text"
        return Verdict("note", f"{what}; control_tokens: strip_end takes it off")
    return Verdict("ok", f"checked {answers} of {answers} answers")
