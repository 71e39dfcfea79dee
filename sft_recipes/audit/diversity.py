"""How varied a data set is: unique shares, openers, repeated lines, and scripts."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log
from typing import Any, NamedTuple

from sft_recipes.audit.finding import AuditRow, Finding, excerpt, flag, make_finding
from sft_recipes.response_patterns import OPENER_WORDS, opener
from sft_recipes.shingles import folded

_TOP = 20
_LINE_CHARACTERS = 20
_SCRIPT_CHARACTERS = 2000
_LEAST_LETTERS = 20
_UNDECIDED = "und"
# Scripts that one language writes side by side.
_JOINED_SCRIPTS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "East Asian")

RowsOf = Mapping[str, Sequence[int]]


class SaidTurn(NamedTuple):
    """One turn of one speaker, with the position of its row."""

    row: int
    text: str


class Openers(NamedTuple):
    """The table for the report, and the rows of the openers that are frequent."""

    table: dict[str, Any]
    frequent: RowsOf


def measure_diversity(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """`unique`: distinct instructions, responses and rows (`folded`) / rows."""
    instructions = [folded(row.question) for row in rows]
    responses = [folded(row.response) for row in rows]
    both = set(zip(instructions, responses, strict=True))
    unique = {
        "row": len(both) / len(rows),
        "instruction": len(set(instructions)) / len(rows),
        "response": len(set(responses)) / len(rows),
    }
    return {"unique": unique}


def find_patterns(rows: Sequence[AuditRow]) -> tuple[list[Finding], dict[str, Any]]:
    """Openers of prompts and answers, lines that many answers share, and other scripts.

    The findings, and the tables for the report.
    """
    answers = _turns_of("assistant", rows)
    instruction_openers = openers(_turns_of("user", rows))
    response_openers = openers(answers)
    lines = repeated_lines(answers)
    findings = [
        _finding("instruction_openers", instruction_openers.frequent, rows),
        _finding("response_openers", response_openers.frequent, rows),
        _finding("boilerplate", lines, rows),
        _finding("script_mismatch", _mixed_scripts(rows), rows),
    ]
    boilerplate = []
    for line, positions in list(lines.items())[:_TOP]:
        boilerplate.append({"text": line, "rows": len(positions)})
    tables = {
        "instruction_openers": instruction_openers.table,
        "response_openers": response_openers.table,
        "boilerplate": boilerplate,
    }
    return findings, tables


def _turns_of(role: str, rows: Sequence[AuditRow]) -> list[SaidTurn]:
    said = []
    for position, row in enumerate(rows):
        for turn in row.turns:
            if turn.role == role:
                said.append(SaidTurn(position, turn.content))
    return said


def _finding(check: str, rows_of: RowsOf, rows: Sequence[AuditRow]) -> Finding:
    flagged = []
    for text, positions in rows_of.items():
        for position in positions:
            flagged.append(flag(rows[position], excerpt(text)))
    return make_finding(
        check,
        flagged,
        len(rows),
        opener_words=OPENER_WORDS,
        line_characters=_LINE_CHARACTERS,
        letters=_LEAST_LETTERS,
    )


def openers(turns: Sequence[SaidTurn]) -> Openers:
    """The most frequent `opener`s of turns, and the rows of those in more than max(5, 1 %)."""
    rows_of: dict[str, list[int]] = {}
    for turn in turns:
        opening = opener(turn.text)
        if opening is not None:
            rows_of.setdefault(opening, []).append(turn.row)
    rows_of = _most_frequent_first(rows_of)
    n = sum(map(len, rows_of.values()))
    table: dict[str, Any] = {
        "n": n,
        "top": [],
        "entropy_ratio": _entropy_ratio(rows_of, n),
    }
    for opening in list(rows_of)[:_TOP]:
        count = len(rows_of[opening])
        table["top"].append({"text": opening, "rows": count, "share": count / n})
    return Openers(table, _longer_than(max(5, n / 100), rows_of))


def _entropy_ratio(rows_of: RowsOf, n: int) -> float | None:
    """Entropy of the openers / its greatest value over n texts: 0 all alike, 1 all different."""
    if n < 2:
        return None
    total = 0.0
    for positions in rows_of.values():
        share = len(positions) / n
        total += share * log(share)
    return -total / log(n)


def repeated_lines(turns: Sequence[SaidTurn]) -> RowsOf:
    """Lines of at least 20 characters in more than max(20, .5 %) of the turns, with their rows.

    A line that is a whole turn does not count: the same short answer is right in many places.
    """
    rows_of: dict[str, list[int]] = {}
    for turn in turns:
        lines = set(map(str.strip, turn.text.splitlines())) - {""}
        if len(lines) == 1:
            continue
        for line in lines:
            if len(line) >= _LINE_CHARACTERS:
                rows_of.setdefault(line, []).append(turn.row)
    limit = max(20, len(turns) / 200)
    return _longer_than(limit, _most_frequent_first(rows_of))


def _most_frequent_first(rows_of: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return dict(sorted(rows_of.items(), key=lambda item: -len(item[1])))


def _longer_than(limit: float, rows_of: RowsOf) -> RowsOf:
    return {text: positions for text, positions in rows_of.items() if len(positions) > limit}


def _mixed_scripts(rows: Sequence[AuditRow]) -> RowsOf:
    """Rows whose prompt and answer are written in different scripts, by both."""
    rows_of: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        asked = main_script(row.prompt)
        answered = main_script(row.response)
        if asked != answered and _UNDECIDED not in (asked, answered):
            rows_of.setdefault(f"{asked} -> {answered}", []).append(position)
    return rows_of


def main_script(text: str) -> str:
    """The Unicode script of most letters in the first 2,000 characters; `und` below 20 letters."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(text[:_SCRIPT_CHARACTERS]).items():
        if character.isalpha():
            scripts[_script(character)] += count
    del scripts[""]
    if scripts.total() < _LEAST_LETTERS:
        return _UNDECIDED
    ((script, _),) = scripts.most_common(1)
    return script


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    # Names of letters begin with the script: LATIN SMALL LETTER A.
    name = unicodedata.name(letter, "").partition(" ")[0]
    return _JOINED_SCRIPTS.get(name, name.capitalize())
