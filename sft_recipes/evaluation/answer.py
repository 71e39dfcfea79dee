"""One answer, and what is wrong with it: the flags.

Literal strings that the reference answer contains too are never held against an answer: a document
that is meant to have a heading "### Input:" does not leak the template. No torch here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sft_recipes.evaluation.constraints import broken_constraints, constraints, is_json
from sft_recipes.response_patterns import find_next_turn, is_loop, is_repetitive, pattern

# Stop reasons of an answer that ended by itself.
ENDED = ("eos", "stop_string")
# Flags of an answer that was not brought to its end; `unterminated` is judged by the stop reason.
INCOMPLETE = ("empty", "loop", "next_turn", "open_structure")

ECHO_WORDS = 6
# Shorter lines of a template ("--", "A:") stand in many an honest answer.
MARKER_CHARACTERS = 3
_JSON_BEGINS = re.compile(r'\{\s*"|\[\s*[{"]')


@dataclass(frozen=True)
class Answer:
    """An answer and what it is judged by.

    `instruction` is the last user message; `reference` and the token counts are None where there
    are none. What has no place in an answer: `control_tokens` anywhere, a line of
    `template_segments`, the template's own text, at the start of a line. `calls_match`: whether it
    makes the reference's tool calls, None where that has none.
    """

    instruction: str
    reference: str | None
    response: str
    stop_reason: str
    expected_format: Mapping[str, Any] | None = None
    control_tokens: Sequence[str] = ()
    template_segments: Sequence[str] = ()
    response_tokens: int | None = None
    reference_tokens: int | None = None
    max_new_tokens: int | None = None
    calls_match: bool | None = None

    @property
    def expected(self) -> str:
        """The reference, empty if there is none."""
        return self.reference or ""

    @cached_property
    def flags(self) -> list[str]:
        """The names of all flags that this answer earns; without any it is well formed."""
        return [name for name, is_raised in FLAGS.items() if is_raised(self)]

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself, is not empty, does not loop and leaves nothing open."""
        return self.stop_reason in ENDED and not set(self.flags) & set(INCOMPLETE)


def is_empty(answer: Answer) -> bool:
    """Nothing but white space."""
    return not answer.response.strip()


def leaks_control_tokens(answer: Answer) -> bool:
    """A special token or other markup of the tokenizer stands in the text."""
    leaked = [token for token in answer.control_tokens if token in answer.response]
    return any(token not in answer.expected for token in leaked)


def leaks_template(answer: Answer) -> bool:
    """A line of the answer starts with a line of the template's own text."""
    for marker in section_markers(answer.template_segments):
        line = line_starting_with(marker)
        if line.search(answer.response) and not line.search(answer.expected):
            return True
    return False


def line_starting_with(marker: str) -> re.Pattern[str]:
    """A line that starts with a marker: "user" is not the start of "users"."""
    boundary = r"(?!\w)" if marker[-1].isalnum() else ""
    return re.compile(rf"^[ \t]*{re.escape(marker)}{boundary}", re.MULTILINE)


def section_markers(segments: Sequence[str]) -> set[str]:
    """The lines of a template's own text that an answer would not write by itself."""
    markers = set()
    for segment in segments:
        for line in segment.splitlines():
            marker = line.strip()
            if len(marker) >= MARKER_CHARACTERS and any(map(str.isalnum, marker)):
                markers.add(marker)
    return markers


def starts_next_turn(answer: Answer) -> bool:
    """A user's header follows some answer text, and neither prompt nor reference asked for it."""
    if pattern("user_header").search(answer.expected):
        return False
    return bool(find_next_turn(answer.response, answer.instruction))


def loops(answer: Answer) -> bool:
    """It ends in copies of the same words."""
    return is_loop(answer.response, cut_short=answer.stop_reason == "length")


def repeats_itself(answer: Answer) -> bool:
    """Half or more of a longer text are repeats."""
    return is_repetitive(answer.response)


def is_unterminated(answer: Answer) -> bool:
    """It was cut, by the token budget or by time."""
    return answer.stop_reason not in ENDED


def has_open_structure(answer: Answer) -> bool:
    """An unclosed code fence, or JSON that does not parse where JSON was expected or begun."""
    text = answer.response.strip()
    if text.count("```") % 2:
        return True
    if constraints(answer.expected_format).get("json"):
        return not is_json(text)
    return _JSON_BEGINS.match(text) is not None and not is_json(text, prose_may_follow=True)


def echoes_prompt(answer: Answer) -> bool:
    """It starts with the whole instruction, of at least 6 words."""
    if len(answer.instruction.split()) < ECHO_WORDS:
        return False
    instruction = answer.instruction.strip()
    is_expected = answer.expected.strip().startswith(instruction)
    return answer.response.strip().startswith(instruction) and not is_expected


def breaks_constraints(answer: Answer) -> bool:
    """It breaks something of the row's `expected_format`."""
    return bool(broken_constraints(answer.response, answer.expected_format))


# Whether an answer earns the flag; an answer without any is well formed.
FLAGS: Mapping[str, Callable[[Answer], bool]] = {
    "empty": is_empty,
    "special_token_leak": leaks_control_tokens,
    "template_leak": leaks_template,
    "next_turn": starts_next_turn,
    "loop": loops,
    "repetitive": repeats_itself,
    "unterminated": is_unterminated,
    "open_structure": has_open_structure,
    "prompt_echo": echoes_prompt,
    "constraint_fail": breaks_constraints,
}
