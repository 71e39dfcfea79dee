"""How varied a data set is: unique shares, distinct n-grams, openers, repeated lines, and scripts."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import log
from typing import Any

from sft_recipes.audit.finding import AuditRow, Finding, excerpt, flag, make_finding
from sft_recipes.response_patterns import OPENER_WORDS, opener
from sft_recipes.similarity import folded

BUDGET_WORDS = 10_000
_LEAST_LETTERS, _LINE_CHARACTERS, _TOP = 20, 20, 20
_WORD = re.compile(r"\w+")
# Scripts that one language writes side by side.
_JOINED = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "East Asian")


def measure_diversity(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """Distinct texts (`folded`) / rows, and distinct n-grams of prompts and responses.

    Beside each n-gram value stands a reference: the first twenty rows over and over.
    """
    pairs = [(folded(row.question), folded(row.response)) for row in rows]
    content: dict[str, Any] = {"unique": {"row": len(set(pairs)) / len(rows)}}
    for name, texts in zip(
        ("instruction", "response"), map(list, zip(*pairs, strict=True)), strict=True
    ):
        content["unique"][name] = len(set(texts)) / len(rows)
        versions = {"value": texts, "twenty_rows": texts[:20] * (len(texts) // 20 + 1)}
        content[name] = {version: distinct_ngrams(some) for version, some in versions.items()}
    return content


def distinct_ngrams(texts: Sequence[str]) -> dict[str, float | None]:
    """Distinct n-grams / n-grams of the first 10,000 words of a seeded shuffle, n = 1, 2, 3; None below that.

    The fixed number of words makes data sets of different sizes comparable.
    """
    words: list[str] = []
    for text in random.Random(0).sample(texts, len(texts)):
        if len(words) < BUDGET_WORDS:
            words += _WORD.findall(text.casefold())
    grams = {
        n: list(zip(*(words[k:BUDGET_WORDS] for k in range(n)), strict=False)) for n in (1, 2, 3)
    }
    enough = len(words) >= BUDGET_WORDS
    return {
        f"distinct_{n}": len(set(some)) / len(some) if enough else None for n, some in grams.items()
    }


def find_patterns(rows: Sequence[AuditRow]) -> tuple[list[Finding], dict[str, Any]]:
    """Openers of prompts and answers, lines that many answers share, and scripts: findings, and the tables."""
    findings, content = [], dict[str, Any]()
    for name, speaker in {"instruction": "user", "response": "assistant"}.items():
        turns = [
            (at, text) for at, row in enumerate(rows) for role, text in row.turns if role == speaker
        ]
        content[f"{name}_openers"], frequent = openers(turns)
        findings.append(_spread(f"{name}_openers", frequent, rows, opener_words=OPENER_WORDS))
    lines = repeated_lines(turns)
    content["boilerplate"] = [
        {"text": line, "rows": len(some)} for line, some in list(lines.items())[:_TOP]
    ]
    scripts, mixed = dict[str, Counter[str]](), dict[str, list[int]]()
    for at, row in enumerate(rows):
        one, other = main_script(row.prompt), main_script(row.response)
        scripts.setdefault(one, Counter())[other] += 1
        if one != other and "und" not in (one, other):
            mixed.setdefault(f"{one} -> {other}", []).append(at)
    findings.append(_spread("boilerplate", lines, rows, line_characters=_LINE_CHARACTERS))
    findings.append(_spread("script_mismatch", mixed, rows, letters=_LEAST_LETTERS))
    return findings, {**content, "scripts": scripts}


def _spread(
    check: str, found: Mapping[str, Iterable[int]], rows: Sequence[AuditRow], **fills: Any
) -> Finding:
    flagged = [flag(rows[at], excerpt(text)) for text, some in found.items() for at in some]
    return make_finding(check, flagged, len(rows), **fills)


def openers(turns: Sequence[tuple[int, str]]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The most frequent `opener`s of turns (position of the row, text), and the rows of those above max(5, 1 %)."""
    found: dict[str, list[int]] = {}
    for position, text in turns:
        if (opening := opener(text)) is not None:
            found.setdefault(opening, []).append(position)
    found = dict(sorted(found.items(), key=lambda pair: -len(pair[1])))
    n = sum(map(len, found.values()))
    shares = {text: len(some) / n for text, some in found.items()}
    top = [
        {"text": text, "rows": len(found[text]), "share": shares[text]}
        for text in list(found)[:_TOP]
    ]
    evenness = -sum(share * log(share) for share in shares.values()) / log(n) if n > 1 else None
    frequent = {text: some for text, some in found.items() if len(some) > max(5, n / 100)}
    return {"n": n, "top": top, "entropy_ratio": evenness}, frequent


def repeated_lines(turns: Sequence[tuple[int, str]]) -> dict[str, list[int]]:
    """Lines of at least 20 characters in more than max(20, .5 %) of the turns, with the rows of those.

    A line that is a whole turn does not count: the same short answer is right in many places.
    """
    found: dict[str, list[int]] = {}
    for position, text in turns:
        lines = {line.strip() for line in text.splitlines()} - {""}
        for line in lines if len(lines) > 1 else ():
            if len(line) >= _LINE_CHARACTERS:
                found.setdefault(line, []).append(position)
    limit = max(20, len(turns) / 200)
    return {
        line: some
        for line, some in sorted(found.items(), key=lambda pair: -len(pair[1]))
        if len(some) > limit
    }


def main_script(text: str) -> str:
    """The Unicode script of most letters in the first 2,000 characters, `und` below 20 letters."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(text[:2000]).items():
        scripts[_script(character)] += count
    del scripts[""]
    return scripts.most_common(1)[0][0] if scripts.total() >= _LEAST_LETTERS else "und"


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    name = unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""
    return _JOINED.get(name, name.capitalize())
