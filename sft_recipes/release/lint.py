"""Checks of an exported folder as a server loads it: its template, end tokens and prompts' ids."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labelled_rows import LabelledRow
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.template_checks import Outcome, TemplateCheck, check_template
from sft_recipes.messages import Example, Message
from sft_recipes.models import generation_eos
from sft_recipes.recipe import LabelSettings

# What a client may send of a message.
_SENT = ("role", "content", "tool_calls", "name", "reasoning_content")
_WITH_INPUT = (
    "if the client writes instruction, empty line, `### Input:`, new line, input into the user's "
    "message"
)


class Fit(enum.IntEnum):
    """How a training row begins, against the prompt that a server makes; the best comes last."""

    NONE = 0
    TEXT = 1  # only its text is the prompt's: a token reaches over the end of the prompt
    IDS = 2  # with the prompt's ids, none of them trained


@dataclass(frozen=True)
class RowFit:
    """How one row fits what a client sends, as it sends it and with the input's section written."""

    where: str
    as_sent: Fit
    with_input: Fit

    @property
    def best(self) -> Fit:
        """The better of both."""
        return max(self.as_sent, self.with_input)


def lint(
    model: Any,
    folder: Path,
    trained: ChatRenderer,
    settings: LabelSettings,
    examples: Sequence[Example],
) -> list[TemplateCheck]:
    """Checks of an exported folder. `trained` renders as in training; `examples` are real rows."""
    served = ChatRenderer(load_tokenizer(str(folder)))
    template_checks = check_template(Labeller(served, settings), examples)
    return [
        *template_checks,
        _check_eos(model, served.tokenizer, trained.stop_ids),
        _check_pad(model, served.tokenizer, trained.stop_ids),
        _check_ids(
            row_fits(served.tokenizer, Labeller(trained, settings), examples),
            accepted=_prompt_may_differ(template_checks),
        ),
    ]


def _prompt_may_differ(checks: Sequence[TemplateCheck]) -> bool:
    """Whether it was noted before training that a prompt does not begin the trained text."""
    outcomes = {check.name: check.outcome for check in checks}
    return outcomes.get("training equals serving") == "note"


def _check_eos(model: Any, tokenizer: Any, stop_ids: Sequence[int]) -> TemplateCheck:
    """Every place that a server may look at names a trained end of turn, generation_config all."""
    config = model.config.get_text_config()
    generation = model.generation_config
    ids = [tokenizer.eos_token_id, config.eos_token_id, generation.eos_token_id]
    is_stop = tokenizer.eos_token_id == config.eos_token_id and config.eos_token_id in stop_ids
    is_good = is_stop and generation.eos_token_id == generation_eos(stop_ids)
    return _check_places("EOS", ids, is_good)


def _check_pad(model: Any, tokenizer: Any, stop_ids: Sequence[int]) -> TemplateCheck:
    """Every place names the same PAD, which ends no turn."""
    config = model.config.get_text_config()
    ids = [tokenizer.pad_token_id, config.pad_token_id, model.generation_config.pad_token_id]
    return _check_places("PAD", ids, len(set(ids)) == 1 and ids[0] not in stop_ids)


def _check_places(name: str, ids: Sequence[Any], is_good: bool) -> TemplateCheck:
    detail = f"tokenizer, config, generation_config: {ids}"
    return TemplateCheck(name, "ok" if is_good else "failed", detail)


def _check_ids(fits: Sequence[RowFit], accepted: bool) -> TemplateCheck:
    """Whether a server makes the ids of the training rows; the worst row decides, and is named.

    `accepted`: that it does not was said before training, so it is a note here.
    """
    as_sent = sum(fit.as_sent == Fit.IDS for fit in fits)
    detail = f"{as_sent} of {len(fits)} prompts"
    more = sum(fit.best == Fit.IDS for fit in fits) - as_sent
    if more:
        detail += f", {more} more {_WITH_INPUT}"
    outcome: Outcome = "ok"
    if fits:
        worst = min(fits, key=lambda fit: (fit.best, fit.as_sent, fit.where))
        if worst.best == Fit.TEXT:
            outcome = "note"
            detail += f"; only the text of {worst.where}"
        elif worst.best == Fit.NONE:
            detail += f"; not {worst.where}"
            outcome = "failed"
            if accepted:
                outcome = "note"
    return TemplateCheck("training ids are serving ids", outcome, detail)


def row_fits(served: Any, labeller: Labeller, examples: Sequence[Example]) -> list[RowFit]:
    """How the training rows fit what a server makes of what a client sends: role and content, no
    template arguments. `served` is the tokenizer of the exported folder.
    """
    fits = []
    for row in labeller.label(examples).rows:
        # Rows without turns are plain text; neutralized text is tokenized otherwise on purpose.
        if not row.turns or row.neutralized:
            continue
        example = labeller.for_template(examples[row.example])
        asked = example.messages[: row.turns[0]]
        sent = [_sent(message) for message in asked]
        written = [_with_input_section(message) for message in asked]
        fits.append(
            RowFit(
                where=example.where,
                as_sent=_fit(row, served, sent, example.tools),
                with_input=_fit(row, served, written, example.tools),
            )
        )
    return fits


def _sent(message: Message) -> dict[str, Any]:
    """What a client sends of a message."""
    return {key: message[key] for key in _SENT if key in message}


def _with_input_section(message: Message) -> dict[str, Any]:
    """The same where the template gives `input` a section of its own: a client has to write it."""
    sent = _sent(message)
    if message.get("input"):
        sent["content"] = f"{message['instruction']}\n\n### Input:\n{message['input']}"
    return sent


def _fit(
    row: LabelledRow, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any
) -> Fit:
    """How a training row begins, against the prompt that a server makes of these messages."""
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True
    )
    prompt = rendered["input_ids"]
    ids = row.input_ids
    if ids[: len(prompt)] == prompt:
        if set(row.labels[: len(prompt)]) <= {IGNORE_INDEX}:
            return Fit.IDS
        return Fit.NONE
    if tokenizer.decode(ids).startswith(tokenizer.decode(prompt)):
        return Fit.TEXT
    return Fit.NONE
