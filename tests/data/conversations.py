"""Generated conversations for label tests: seeded, each kind stressing one way in which labels go wrong.

Every user, system and tool text carries a marker word (`umark`, `smark`, `tmark`) that no assistant text contains.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

FOREIGN = ("umark", "smark", "tmark")
KINDS = ("single", "multi", "system", "unicode", "near_empty", "sections", "whitespace", "hostile")
REASONING_KINDS = ("reasoning",)
TOOL_KINDS = ("tools",)

SENTENCE = "the model answers with care and some words about rivers code stars 12 3.5 maybe so (yes) it's fine"
WORDS = SENTENCE.split(" ")
UNICODE = [
    "你好，世界",
    "日本語テキスト",
    "👩‍👩‍👧‍👦🎉",
    "e\u0301a\u0308o\u0302",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते",
    "𝔘𝔫𝔦",
]
SECTIONS = [
    "### Response:\nno",
    "### Instruction:\nobey",
    "\n\n### Response:\n",
    "### Input:\nx",
    "### End",
]
SPACES = ["\n", "\n\n", " ", "  \n", "\t", "\n\n\n ", "\u00a0", "\r\n"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}},
                "required": ["city"],
            },
        },
    }
]


@dataclass(frozen=True)
class Generated:
    """One generated conversation; `hostile`: it spells control tokens."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def hostile(self) -> bool:
        return self.kind == "hostile"


def generate(kind: str, seed: int, control_tokens: Sequence[str] = ()) -> Generated:
    """One conversation of a kind. `control_tokens` are spelled in `hostile` ones."""
    rng = random.Random(f"{kind}-{seed}")
    if kind == "tools":
        return Generated(kind, _tool_conversation(rng), TOOLS)
    turns = 1 if kind == "single" else rng.randint(2, 3)
    messages: list[Message] = []
    if kind == "system" or (kind == "hostile" and rng.random() < 0.3):
        messages.append({"role": "system", "content": f"smark {_text(rng, kind, control_tokens)}"})
    for _ in range(turns):
        messages.append({"role": "user", "content": _user_text(rng, kind, control_tokens)})
        messages.append({"role": "assistant", "content": _text(rng, kind, control_tokens)})
        if kind == "reasoning" and (rng.random() < 0.7 or len(messages) == 2 * turns):
            messages[-1]["reasoning_content"] = f"rmark {_words(rng)}"
    return Generated(kind, messages)


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))


def _user_text(rng: random.Random, kind: str, control_tokens: Sequence[str]) -> str:
    if kind == "near_empty":
        return rng.choice(["a", ".", "umark"])
    text = _text(rng, kind, control_tokens)
    position = (
        rng.randint(0, len(text)) if kind in ("single", "multi") else rng.choice([0, len(text)])
    )
    return f"{text[:position]} umark {text[position:]}"


def _text(rng: random.Random, kind: str, control_tokens: Sequence[str]) -> str:
    if kind == "near_empty":
        return rng.choice(["a", ".", "0", "?", "\\", "<", "é"])
    extras = {"unicode": UNICODE, "sections": SECTIONS, "hostile": list(control_tokens)}.get(
        kind, []
    )
    parts = [_words(rng)]
    for extra in rng.choices(extras, k=rng.randint(1, 3)) if extras else []:
        parts.insert(rng.randint(0, len(parts)), extra)
    text = rng.choice([" ", "", "\n"]).join(parts)
    if kind == "whitespace":
        text = (
            "".join(rng.choices(SPACES, k=rng.randint(1, 2)))
            + text
            + "".join(rng.choices(SPACES, k=rng.randint(0, 2)))
        )
    return text


def _tool_conversation(rng: random.Random) -> list[Message]:
    call = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": rng.choice(["Paris", "東京"])}},
    }
    messages: list[Message] = []
    for _ in range(rng.randint(1, 2)):
        messages += [
            {"role": "user", "content": f"umark {_words(rng)}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "content": f"tmark {_words(rng)}"},
            {"role": "assistant", "content": _words(rng)},
        ]
    return messages
