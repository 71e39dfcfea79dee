"""What a model answered before it went on with a section or a role of its own making.

A base model was never taught to stop: it answers, and then writes the next instruction itself. The
texts that a template puts between turns show where its answer ended, as a server's stop strings
would. So a base is judged both as it came and by its first answer. No torch here.
"""

import re
from collections.abc import Iterator, Sequence

from sft_recipes.evaluation.answer import Answer, line_starting_with, section_markers
from sft_recipes.response_patterns import find_next_turn


def first_answer(answer: Answer, turn_tokens: Sequence[str]) -> str:
    """The response up to where the next section or role begins, without white space at its end.

    `turn_tokens`: the control tokens with which the template opens turns. A section that begins
    before any other text ends nothing: its header is taken off, what follows is the answer. Text
    that the reference contains, too, ends nothing either.
    """
    text = _without_headers(answer)
    end = len(text)
    for section in _sections(answer, turn_tokens):
        for match in section.finditer(text):
            if text[: match.start()].strip():
                end = min(end, match.start())
                break
    return text[:end].rstrip()


def _without_headers(answer: Answer) -> str:
    """The response without lines at its beginning that are nothing but the template's own."""
    markers = section_markers(answer.template_segments)
    text = answer.response
    while True:
        header, _, rest = text.lstrip().partition("\n")
        if header.strip() not in markers or header.strip() in answer.expected:
            return text
        text = rest


def _sections(answer: Answer, turn_tokens: Sequence[str]) -> Iterator[re.Pattern[str]]:
    """What begins a section: lines of the template, tokens that open turns, a user's header."""
    for marker in section_markers(answer.template_segments):
        line = line_starting_with(marker)
        if not line.search(answer.expected):
            yield line
    for token in turn_tokens:
        if token not in answer.expected:
            yield re.compile(re.escape(token))
    header = find_next_turn(answer.response, answer.instruction)
    if header and header not in answer.expected:
        yield re.compile(rf"^[ \t]*{re.escape(header)}", re.MULTILINE)


def turn_tokens_of(template_segments: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """The special tokens with which a line of the template begins, the longest first."""
    tokens: set[str] = set()
    for segment in template_segments:
        for token in special_tokens:
            if segment.startswith(token):
                tokens.add(token)
    return sorted(tokens, key=len, reverse=True)
