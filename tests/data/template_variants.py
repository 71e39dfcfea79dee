"""Chat templates that differ from those TRL ships in one way each, made from them by wrapping their source.

always_opens    the generation prompt is written whether it is asked for or not (Llama-3's first published template)
no_gap          nothing stands between the token that ends a turn and the header of the next turn
shared_suffix   all control tokens are renamed so that they begin and end in the same letters

What a variant has to train is known from the template it was made of, so nobody has to find it out again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerFast

from tests.data.label_oracle import Reference, special_tokens
from tests.data.template_tokenizers import (
    IDENTITIES,
    NOT_SPECIAL,
    build_tokenizer,
    control_tokens,
    identity_of,
    read_template,
)

VARIANTS = (
    "always_opens",
    "no_gap",
    "shared_suffix",
    "always_opens+no_gap",
    "always_opens+shared_suffix",
)

# Llama-3's template as it was first published; the flag asks for the header that the published one always wrote.
LLAMA3_FLAGGED = (
    "{% set loop_messages = messages %}"
    "{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_FIRST = LLAMA3_FLAGGED.replace("{% if add_generation_prompt %}", "").removesuffix(
    "{% endif %}"
)
LLAMA3_FIRST_NAME = "llama3_first"

ALWAYS_OPEN = "{%- set add_generation_prompt = true -%}"
QUESTION = [{"role": "user", "content": "QZuserZQ"}]
EXCHANGE = [
    *QUESTION,
    {"role": "assistant", "content": "QZanswerZQ"},
    {"role": "user", "content": "QZnextZQ"},
]


@dataclass(frozen=True)
class Variant:
    """A changed template on its own tokenizer, and where the truth about it comes from.

    `fresh` makes another tokenizer of the same kind: attaching a template changes the one that it is given.
    """

    fresh: Callable[[], PreTrainedTokenizerFast]
    reference: Reference


def original(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer with the template that a variant is made of."""
    if name == LLAMA3_FIRST_NAME:
        return build_tokenizer(LLAMA3_FLAGGED, *IDENTITIES["llama3"])
    return build_tokenizer(read_template(name), *IDENTITIES[identity_of(name)])


@cache
def make_variant(name: str, variant: str) -> Variant | None:
    """The variant of one of TRL's templates (or of Llama-3's first one); None where the change has no effect."""
    base = original(name)
    template, rewrite = base.chat_template, _unchanged
    identity = [base.bos_token, base.eos_token, base.pad_token]
    changes = variant.split("+")
    if "no_gap" in changes:
        gaps = _gaps_after_turns(base)
        if not gaps:
            return None
        template, rewrite = _closing(template, gaps), _replacing(gaps)
    if "always_opens" in changes:
        asked = base.apply_chat_template(EXCHANGE[:2], tokenize=False, add_generation_prompt=True)
        if asked == base.apply_chat_template(EXCHANGE[:2], tokenize=False):
            return None
        template = _opening_always(template, name)
    if "shared_suffix" in changes:
        spelled = [token for token in control_tokens(template) if not NOT_SPECIAL.fullmatch(token)]
        names = _alike(dict.fromkeys([*spelled, *filter(None, identity)]))
        rewrite = _replacing(names)
        template = rewrite(template)
        identity = [token and names[token] for token in identity]

    def fresh() -> PreTrainedTokenizerFast:
        return build_tokenizer(template, *identity)

    reference = Reference(base, rewrite, always_opens="always_opens" in changes)
    if not _renders_as_expected(fresh(), reference):
        return None
    return Variant(fresh, reference)


def _opening_always(template: str, name: str) -> str:
    """The template with its own flag overridden."""
    return (
        LLAMA3_FIRST
        if name == LLAMA3_FIRST_NAME and template == LLAMA3_FLAGGED
        else ALWAYS_OPEN + template
    )


def _gaps_after_turns(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Whitespace that the template writes after a token that ends a turn, with that token: what becomes of each."""
    text = tokenizer.apply_chat_template(EXCHANGE, tokenize=False, add_generation_prompt=True)
    tokens = "|".join(
        re.escape(token) for token in sorted(special_tokens(tokenizer), key=len, reverse=True)
    )
    found = re.findall(rf"ZQ\s*({tokens})(\s+)", text)
    return {token + gap: token for token, gap in found}


def _closing(template: str, gaps: dict[str, str]) -> str:
    """The template with the gaps taken out of whatever it writes."""
    wrapped = "{%- set whole_text -%}" + template + "{%- endset -%}"
    text = "whole_text"
    for gap, token in gaps.items():
        text += f" | replace({gap!r}, {token!r})"
    return wrapped + "{{- " + text + " -}}"


def _alike(tokens: dict[str, None]) -> dict[str, str]:
    """New spellings that share their beginning and their end."""
    return {
        token: f"<|shared_{chr(97 + number // 26)}{chr(97 + number % 26)}_id|>"
        for number, token in enumerate(tokens)
    }


def _replacing(spellings: dict[str, str]) -> Callable[[str], str]:
    """Replaces every key by its value, the longest first, each place once."""
    pattern = re.compile(
        "|".join(re.escape(text) for text in sorted(spellings, key=len, reverse=True))
    )

    def rewrite(text: str) -> str:
        return pattern.sub(lambda match: spellings[match.group()], text)

    return rewrite


def _unchanged(text: str) -> str:
    return text


def _renders_as_expected(tokenizer: PreTrainedTokenizerFast, reference: Reference) -> bool:
    """Whether the wrapped source writes what the original writes, changed in the way it was asked for."""
    base = reference.tokenizer
    for length in (1, 2, 3):
        for asked in (False, True):
            opened = asked or reference.always_opens
            wanted = base.apply_chat_template(
                EXCHANGE[:length], tokenize=False, add_generation_prompt=opened
            )
            found = tokenizer.apply_chat_template(
                EXCHANGE[:length], tokenize=False, add_generation_prompt=asked
            )
            if found != reference.rewrite(wanted):
                return False
    return True
