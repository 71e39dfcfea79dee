"""How alike answer and reference are, and the chapter's three scores: text in, number out."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"\w+")


def token_f1(reference: str, response: str) -> float:
    """F1 of the words both texts share, each as often as it occurs in both.

    As for SQuAD, case does not count, nor do ASCII punctuation and English articles. Two texts
    without words are alike.
    """
    expected = _words_of_squad(reference)
    given = _words_of_squad(response)
    shared = Counter(expected) & Counter(given)
    return _f1(shared.total(), expected, given)


def _words_of_squad(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_l(reference: str, response: str) -> float:
    r"""F1 of the longest common subsequence of words (`\w+`, case aside).

    Two texts without words are alike.
    """
    expected = _WORD.findall(reference.casefold())
    given = _WORD.findall(response.casefold())
    return _f1(LCSseq.similarity(expected, given), expected, given)


def _f1(shared: int, expected: Sequence[str], given: Sequence[str]) -> float:
    if not expected and not given:
        return 1.0
    return 2 * shared / (len(expected) + len(given))


def chapter_length_ratio(reference: str, response: str) -> float:
    """The chapter's `length_ratio`: words of the answer over words of the reference, at least 1."""
    return len(response.split()) / max(len(reference.split()), 1)


def chapter_completion(instruction: str, response: str) -> float | None:
    """The chapter's `_assess_completion`: share of the instruction's words found in the answer.

    None for an instruction without words.
    """
    keywords = instruction.lower().split()
    if not keywords:
        return None
    text = response.lower()
    return sum(keyword in text for keyword in keywords) / len(keywords)


def chapter_format(response: str) -> float:
    """The chapter's `_assess_format`: 0 empty, .5 starts with `### `, else 1."""
    text = response.strip()
    if not text:
        return 0.0
    if text.startswith("### "):
        return 0.5
    return 1.0
