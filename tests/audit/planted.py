"""Generated rows with planted faults, so that a test knows which rows a check has to find.

`COPIES` make a second row from a clean one that stays; `FAULTS` spoil rows of their own, one kind for
each check of texts. Add a kind by adding a function `(random, prompt, response) -> (prompt,
response)` to one of them; `_in_answer` and its neighbours make one of a few texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from random import Random

from sft_recipes.messages import Example

Change = Callable[[Random, str, str], tuple[str, str]]


@dataclass(frozen=True)
class Planted:
    """Rows with their faults.

    `rows_of[kind]` are row numbers; `original[row]` is the row that a copy was made from.
    """

    examples: Sequence[Example]
    rows_of: Mapping[str, set[int]]
    original: Mapping[int, int]


@cache
def vocabulary(size: int = 4000) -> tuple[Sequence[str], Sequence[float]]:
    """Invented words of two to four syllables, and cumulative weights like word frequencies."""
    random = Random(7)
    syllables = list(map("".join, product("bdfgklmnprstvz", "aeiou")))
    invented: dict[str, None] = {}
    for _ in range(2 * size):
        word = "".join(random.choices(syllables, k=random.randint(2, 4)))
        invented[word] = None
    weights = list(accumulate(1 / (rank + 10) for rank in range(size)))
    return list(invented)[:size], weights


def text(random: Random, count: int) -> str:
    """About `count` words in sentences."""
    words, weights = vocabulary()
    chosen = random.choices(words, cum_weights=weights, k=count)
    for first in range(0, count, 12):
        chosen[first] = chosen[first].capitalize()
    for last in range(11, count, 12):
        chosen[last] += "."
    return " ".join(chosen)


def example(
    prompt: str, response: str, row: int = 0, system: str | None = None, source: str = "rows.jsonl"
) -> Example:
    """One row of a conversation with one answer."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Example(messages=messages, source=source, row=row, line=row + 1)


def substitute(random: Random, old: str, share: float) -> str:
    """A text with this share of its words (at least one) replaced."""
    parts = old.split(" ")
    for place in random.sample(range(len(parts)), max(1, round(share * len(parts)))):
        parts[place] = random.choice(vocabulary()[0])
    return " ".join(parts)


def _other_form(_: Random, prompt: str, response: str) -> tuple[str, str]:
    return prompt.upper() + " ", response.replace(" ", "  ", 3)


def _polite(_: Random, prompt: str, response: str) -> tuple[str, str]:
    return f"Please: {prompt} Thank you!", response.replace(".", ";")


def _substituted(random: Random, prompt: str, response: str) -> tuple[str, str]:
    # Two words of a hundred: word 3-gram Jaccard of .85 and more.
    return substitute(random, prompt, 0.01), substitute(random, response, 0.01)


def _other_numbers(_: Random, prompt: str, response: str) -> tuple[str, str]:
    return f"{prompt} Use 1507 of them.", f"{response} That makes 3014."


COPIES: Mapping[str, Change] = {
    "duplicate_row": lambda _, prompt, response: (prompt, response),
    "duplicate_messages": _other_form,
    "polite": _polite,
    "substituted": _substituted,
    "template_variant": _other_numbers,
    "duplicate_prompt": lambda random, prompt, _: (prompt, text(random, 60)),
}


def _in_answer(*choices: str) -> Change:
    """One of the texts in front of the answer, at the middle line of it, or behind it."""

    def change(random: Random, prompt: str, response: str) -> tuple[str, str]:
        lines = [response[:80], response[80:]]
        lines.insert(random.randrange(3), random.choice(choices))
        return prompt, "\n".join(lines)

    return change


def _behind_answer(*choices: str) -> Change:
    return lambda random, prompt, response: (prompt, response + random.choice(choices))


def _behind_prompt(*choices: str) -> Change:
    return lambda random, prompt, response: (prompt + random.choice(choices), response)


def _whole_answer(*choices: str) -> Change:
    return lambda random, prompt, _: (prompt, random.choice(choices))


def _digits(random: Random, count: int) -> str:
    return "".join(random.choices("0123456789", k=count))


def card_number(random: Random) -> str:
    """A card number that Luhn's check accepts."""
    digits = [4, *map(int, _digits(random, 14))]
    total = 0
    for place, digit in enumerate(digits):
        # Of 16 digits the first, the third and so on count twice, a product of two digits as their
        # sum. The last digit makes the total end in 0.
        if place % 2 == 0:
            total += sum(divmod(2 * digit, 10))
        else:
            total += digit
    check_digit = -total % 10
    return "".join(map(str, [*digits, check_digit]))


def secret(random: Random) -> str:
    """A key that opens nothing."""
    key = "".join(
        random.choices("abcdefghijkmnopqrstuvwxyzABCDEFGHIJKLMNPQRSTUVWXYZ23456789", k=40)
    )
    lines = f"-----BEGIN RSA PRIVATE KEY-----\nMII{key}\n{key[::-1]}\n-----END RSA PRIVATE KEY-----"
    return random.choice(
        [f"hf_{key[:34]}", f"ghp_{key[:36]}", f"AKIA{key[:16].upper()}", f"sk-9{key}", lines]
    )


def personal(random: Random) -> str:
    """An invented address, number or account."""
    name, number = "".join(random.choices(vocabulary()[0], k=2)), _digits(random, 4)
    phone, address = f"+49 30 {_digits(random, 3)} {number}", f"81.2.69.{random.randint(1, 254)}"
    choices = [
        f"{name}@{name[:6]}.net",
        card_number(random),
        phone,
        f"(415) 781-{number}",
        "DE89 3704 0044 0532 0130 00",
    ]
    return random.choice([*choices, f"219-09-{random.randint(1000, 9999)}", address])


FAULTS: Mapping[str, Change] = {
    "empty_answer": _whole_answer("<|endoftext|>", " </s> ", "<|im_end|>\n"),
    "end_text": _behind_answer("<|endoftext|>", "</s>\n", " <|im_end|>"),
    "placeholder": _whole_answer(
        "N/A", "<nooutput>", "TODO", "[Insert answer here]", "nan", "No output."
    ),
    "unfilled": _in_answer(
        "I am {{name}}.", "made by {{ author }}", "我是{{name}}，由{{作者}}开发"
    ),
    "identity": _in_answer(
        "As an AI language model, I like it.", "I am ChatGPT.", "I was trained by OpenAI to help."
    ),
    "cutoff": _in_answer(
        "My knowledge cutoff is 2021.",
        "As of my last update, it stood.",
        "I don't have real-time data.",
    ),
    "repetition": lambda random, prompt, response: (
        prompt,
        response + random.choice([f" {text(random, 8)}" * 6, f" {'0' * 200} end."]),
    ),
    "next_turn": _in_answer(
        "end\nHuman: and now?", "end\n### Instruction: go on", "end\nUser: thanks"
    ),
    "answer_is_prompt": lambda _, prompt, __: (prompt, f" {prompt}"),
    "open_fence": _in_answer("```python\nprint(1)", "text\n```"),
    "dead_link": _behind_prompt(
        "\n\nhttps://news.net/a/1.html", "\n<image>", "\nreport.pdf", "\n[attached file]"
    ),
    "control_tokens": _behind_prompt(" <|im_start|>assistant", " </s>", " [/INST]", " <|eot_id|>"),
    "mojibake": _in_answer("cafÃ©", "donâ€™t", "price Â£5", "lost \ufffd letter"),
    "control_character": _in_answer("a\x00b", "a\x1bb", "a\u202eb", "a\ue001b", "a\x85b"),
    "secret": lambda random, prompt, response: (prompt, f"{response} {secret(random)}"),
    "personal_data": lambda random, prompt, response: (f"{prompt} {personal(random)}", response),
}


def _random_of(kind: str, seed: int) -> Random:
    """Draws of its own for each kind, so that a new one leaves the rows of the others as they are."""
    return Random(f"{kind} {seed}")


def plant(clean: int = 300, each: int = 10, seed: int = 0) -> Planted:
    """`clean` rows of about 90 words plus `each` rows of every kind after them.

    A clean row is copied once.
    """
    random = Random(seed)
    rows: list[tuple[str, str]] = [
        (text(random, random.randint(15, 40)), text(random, random.randint(40, 80)))
        for _ in range(clean)
    ]
    unused = random.sample(range(clean), clean)
    rows_of: dict[str, set[int]] = {kind: set() for kind in (*COPIES, *FAULTS)}
    original = {}
    for kind, change in COPIES.items():
        random = _random_of(kind, seed)
        for _ in range(each):
            source = unused.pop()
            rows_of[kind].add(len(rows))
            original[len(rows)] = source
            rows.append(change(random, *rows[source]))
    for kind, change in FAULTS.items():
        random = _random_of(kind, seed)
        for _ in range(each):
            prompt = text(random, random.randint(15, 40))
            response = text(random, random.randint(40, 80))
            rows_of[kind].add(len(rows))
            rows.append(change(random, prompt, response))
    return Planted([example(*row, number) for number, row in enumerate(rows)], rows_of, original)
