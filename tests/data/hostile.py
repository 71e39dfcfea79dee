"""Conversations made to mislead: texts that look like the template's own, and texts that tokenizers treat oddly.

Seeded: the same seed and control tokens give the same conversation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

WORDS = "the answer is a river code stars 12 3.5 maybe so (yes) it's fine; No. def x(y): return 0".split(
    " "
)
EDGES = [
    "\n",
    "\n\n",
    "\n\n\n\n",
    " ",
    "  ",
    "    ",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    "\r\n",
    "\u00a0",
    "\u3000",
]
UNICODE = [
    "caf\u00e9",  # composed
    "cafe\u0301",  # the same, decomposed
    "\u1100\u1161\u11a8",  # Hangul letters that compose to one
    "\u212b\ufb01",  # characters that compatibility forms replace
    "👩‍👩‍👧‍👦🎉🇮🇹",
    "你好，世界",
    "日本語テキスト",
    "שלום עולם",
    "\u202emirrored\u202c",
    "مرحبا",
    "zero\u200bwidth\u200d\ufeff",
    "\uf5e0marked\uf5e1",  # private characters that a program might use as its own marks
    "line\u2028paragraph\u2029end",
    "\x1b[31m",
    "▁sentence▁piece▁",
    "Ġbyte",
]
MARKUP = [
    "### Response:",
    "### Instruction:\nobey",
    "\n\n### Response:\n",
    "{{ 7*7 }}",
    "{% raw %}",
    "{{ bos_token }}",
    "<think>",
    "</think>",
    "<think>\n\n</think>",
    "<tool_call>",
    "</tool_call>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "Human: ",
    "assistant\n\n",
    "system\n",
    "```python\nprint(1)\n```",
    "```",
    "<div>\n  <p>a & b</p>\n</div>",
    "1234567890" * 6,
    "0.1e-12",
    "C:\\temp\\",
    "\\n",
    "\\",
    "a" * 90,
    '{"role": "assistant", "content": "x"}',
    "None",
    "-100",
]
SHORT = ["0", ".", "?", "\\", "<", "é", "a", "{", "|", "\u200b", "\uf5e0", "null", "</s"]


def hostile_conversation(
    seed: int | str, control_tokens: Sequence[str], *, system: bool = True
) -> list[Message]:
    """One to six exchanges, sometimes after a system message, unless the template has no place for one."""
    rng = random.Random(f"hostile-{seed}")
    messages: list[Message] = []
    if system and rng.random() < 0.3:
        messages.append({"role": "system", "content": _text(rng, control_tokens)})
    for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 5, 6])):
        messages.append({"role": "user", "content": _text(rng, control_tokens)})
        messages.append({"role": "assistant", "content": _text(rng, control_tokens)})
    return messages


def _text(rng: random.Random, control_tokens: Sequence[str]) -> str:
    """A text with between none and four of the oddities, and always something that is not whitespace."""
    if rng.random() < 0.08:
        return rng.choice(SHORT)
    parts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8)))]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        kind = rng.choice([UNICODE, MARKUP, control_tokens or MARKUP])
        parts.insert(rng.randint(0, len(parts)), rng.choice(kind))
    text = rng.choice([" ", "", "\n", "\n\n"]).join(parts)
    if rng.random() < 0.35:
        text = rng.choice(EDGES) + text
    if rng.random() < 0.35:
        text += rng.choice(EDGES)
    return text


INLINE_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def as_the_template_takes_it(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """The conversation as documented for templates that have a field for reasoning, or leave inline reasoning out: what
    an answer writes as its first thing between think tags goes into that field.
    """
    user = {"role": "user", "content": "QZuserZQ"}
    apart = {"role": "assistant", "content": "QZanswerZQ", "reasoning_content": "QZreasonZQ"}
    inline = {"role": "assistant", "content": "<think>\nQZreasonZQ\n</think>\n\nQZanswerZQ"}
    has_a_field = "QZreasonZQ" in tokenizer.apply_chat_template([user, apart], tokenize=False)
    leaves_it_out = "QZreasonZQ" not in tokenizer.apply_chat_template(
        [user, inline], tokenize=False
    )
    if not has_a_field and not leaves_it_out:
        return list(messages)
    return [_reasoning_apart(message) for message in messages]


def _reasoning_apart(message: Message) -> Message:
    inline = INLINE_REASONING.fullmatch(message["content"])
    if message["role"] != "assistant" or inline is None:
        return message
    reasoning, answer = inline.groups()
    return {**message, "reasoning_content": reasoning.strip("\n"), "content": answer.lstrip("\n")}
