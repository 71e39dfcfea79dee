"""What names of files and code are called where people read them: in reports and in the terminal.

A metric brings its own words along in `metrics.json`; these are for everything else.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.report.number_texts import sentence, spaced

# By the name of a flag in `samples.jsonl`: what the answer does.
FLAGS: Mapping[str, str] = {
    "empty": "is empty",
    "special_token_leak": "writes control tokens",
    "template_leak": "writes text of the template",
    "next_turn": "goes on with a turn that is not its own",
    "loop": "loops",
    "repetitive": "repeats itself",
    "unterminated": "does not end",
    "open_structure": "leaves something open",
    "prompt_echo": "repeats the prompt",
    "constraint_fail": "breaks the form that was asked for",
}
# By the name of what has a question of its own: formats, safety, retention.
INDICATORS: Mapping[str, str] = {
    "format_gap": "Completion, template less other formats",
    "format_gap_exact_match": "Exact match, template less other formats",
    "format_gap_adherence": "Format adherence, template less other formats",
    "format_gap_did": "Completion, that gap less the base's",
    "format_gap_did_exact_match": "Exact match, that gap less the base's",
    "format_gap_did_adherence": "Format adherence, that gap less the base's",
    "leak_rate_on_template": "Writes text of the template, asked in it",
    "leak_rate_off_template": "Writes text of the template, asked in other formats",
    "unsafe_compliance": "Unsafe prompts answered",
    "over_refusal": "Safe prompts refused",
    "unsafe_compliance_did": "Unsafe prompts answered, template less others, less the base's",
    "over_refusal_did": "Safe prompts refused, template less others, less the base's",
    "retention_loss": "Share passed before tuning and not now",
}
_PROVENANCE: Mapping[str, str] = {
    "dtype": "Precision",
    "template_sha256": "Template, SHA-256",
    "chat_template_kwargs": "Template arguments",
    "max_new_tokens": "Longest answer, in tokens",
    "batch_size": "Prompts a batch",
    "stop_ids": "Ids that end an answer",
}
_INSUFFICIENT = "insufficient_n"
VERDICTS: Mapping[str, str] = {_INSUFFICIENT: "too few rows"}


def flag(name: str) -> str:
    """What an answer with this flag does."""
    return FLAGS.get(name, spaced(name))


def named(name: str) -> str:
    """An indicator, or a format, in words."""
    return INDICATORS.get(name, sentence(spaced(name)))


def gate_verdict(name: str) -> str:
    """The verdict of a gate, or of a line of it."""
    return VERDICTS.get(name, spaced(name))


def is_judged(line: Mapping[str, Any]) -> bool:
    """Whether a line of a gate had enough rows to be judged."""
    return bool(line["verdict"] != _INSUFFICIENT)


def provenance(name: str) -> str:
    """What a key of `info` says."""
    return _PROVENANCE.get(name, sentence(spaced(name)))


def bound_name(line: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """What a line of the gate is about: metric or flag, the comparison, the group.

    `names`: what metrics are called.
    """
    name = str(line["name"])
    if name.startswith("flag "):
        text = sentence("answer " + flag(name.removeprefix("flag ")))
    else:
        text = names.get(name) or named(name)
    if line["compared_with"]:
        text += ", tuned - base"
    if line["group"]:
        text += f": {line['group']}"
    return text


def model_name(name: str) -> str:
    """A model as a title names it: of a path the last part, for the rest is of one machine."""
    parts: Sequence[str] = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    is_hub_name = len(parts) <= 2 and not name.startswith(("/", ".", "~", "\\"))
    if is_hub_name or not parts:
        return name
    return parts[-1]


FILTERS = {"flag": flag, "named": named, "provenance": provenance}
