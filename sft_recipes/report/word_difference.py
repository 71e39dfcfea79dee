"""Which words of an answer differ from what was expected, by the longest matching runs."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

# Words, runs of white space, and single marks: punctuation differs without its word.
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
# Comparing takes the product of both lengths; a page of 200 answers is to be written in seconds.
MOST_WORDS = 600
# Of two texts that share less nearly every word would be marked, which says nothing.
LEAST_ALIKE = 0.3


class TextPart(NamedTuple):
    """A run of words; `differs` where the other text does not have it at this place."""

    text: str
    differs: bool


class WordDifference(NamedTuple):
    """Both texts in parts; one part each where they are not compared."""

    expected: Sequence[TextPart]
    answer: Sequence[TextPart]


def word_difference(expected: str | None, answer: str) -> WordDifference:
    """The parts of both texts that the other one does not have."""
    whole = WordDifference([TextPart(expected or "", False)], [TextPart(answer, False)])
    if expected is None:
        return whole
    expected_words = _WORDS.findall(expected.strip())
    answer_words = _WORDS.findall(answer.strip())
    if max(len(expected_words), len(answer_words)) > MOST_WORDS:
        return whole
    matcher = SequenceMatcher(None, expected_words, answer_words, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return whole
    expected_parts = []
    answer_parts = []
    for kind, start, end, answer_start, answer_end in matcher.get_opcodes():
        differs = kind != "equal"
        if end > start:
            expected_parts.append(TextPart("".join(expected_words[start:end]), differs))
        if answer_end > answer_start:
            text = "".join(answer_words[answer_start:answer_end])
            answer_parts.append(TextPart(text, differs))
    return WordDifference(expected_parts, answer_parts)
