"""Rendered text to ids, as a server makes them.

A server encodes the prompt alone and the model goes on from there, so a row is encoded in segments:
the first one as the tokenizer encodes any text, every later one as a continuation of what stands
before it. The ids equal those of the whole text except where a token would join two segments (an
answer that begins with a newline); `joined` says so.

A continuation is what the tokenizer writes after a context. Encoded alone a text would get the
space that some tokenizers put before their first word, so it is encoded behind the end of the text
before it, whose ids are taken off again. Where a token joins the two, a neutral context stands in
for it.

Text of a message that spells a control token stays text: such tokens are wrapped in two markers
before rendering (`mark`), and marked text is encoded piece by piece with the ids of transformers'
`apply_chat_template(..., sanitize_control_tokens=True)`, which works row by row and which a test
holds equal.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_recipes.errors import InputError, Problem

# Arrays: joining lists of Python integers takes more than twice as long.
Ids = npt.NDArray[np.int32]

# A context longer than this is cut at a line: only its end decides how the text after it is
# encoded.
LONGEST_CONTEXT = 48
# Contexts for a text that a token would join to what really stands before it, tried in this order.
NEUTRAL_CONTEXTS = ("\n", "a", "1", ".", " ", "\u3002")
_MATCHES_NOTHING = "(?!)"


@dataclass(frozen=True, slots=True)
class Markers:
    """The characters that open and close a marked control token in one row."""

    start: str
    end: str


# Private-use characters; a row is marked with the first pair that its own text does not use.
MARKERS = tuple(Markers(chr(code), chr(code + 1)) for code in range(0xF5E0, 0xF600, 2))


@dataclass(frozen=True, slots=True)
class EncodedSegments:
    """Ids of each segment of a row.

    `joined[i]`: a token of the whole text would straddle the start of segment i.
    """

    ids: Sequence[Ids]
    joined: Sequence[bool]


@dataclass(frozen=True, slots=True)
class SegmentedText:
    """A rendered row, cut into segments.

    `markers` are set where its control tokens in text were marked.
    """

    segments: Sequence[str]
    markers: Markers | None = None


@dataclass(frozen=True, slots=True)
class _Continuation:
    """A text to encode behind a context.

    `follows_mark`: the context stands in for a marked token before the text.
    """

    context: str
    text: str
    follows_mark: bool


# What a segment is encoded from: a text, or the ids of a control token's spelling.
_Part = _Continuation | Ids


def all_text(*values: Any) -> str:
    """Every text inside the values (messages, tools) as one, roles left out, NUL between them."""
    texts: list[str] = []
    _collect_texts(values, texts)
    return "\0".join(texts)


def _collect_texts(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key != "role":
                _collect_texts(part, texts)
    elif isinstance(value, list | tuple):
        for part in value:
            _collect_texts(part, texts)


class Encoder:
    """Encodes rendered rows with one tokenizer.

    `control_tokens`: what text of a message must never become.
    """

    def __init__(self, tokenizer: Any, control_tokens: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        longest_first = sorted(control_tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self._control = re.compile(pattern or _MATCHES_NOTHING)
        self._spelled: dict[str, Ids] = {}  # control tokens as plain text

    def _reset(self) -> None:
        # Padding, truncation and special-token modes that any earlier call left on the shared
        # backend.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False

    # -- control tokens in text --------------------------------------------------------------------

    def first_control_token(self, text: str) -> str | None:
        """The first control token that a text spells, or None."""
        match = self._control.search(text)
        if match is None:
            return None
        return match.group()

    def markers_for(self, text: str) -> Markers:
        """The first pair of markers that a text does not use.

        Raises InputError if it uses all of them.
        """
        for markers in MARKERS:
            if markers.start not in text and markers.end not in text:
                return markers
        first = ord(MARKERS[0].start)
        last = ord(MARKERS[-1].end)
        what = f"the text uses every character from U+{first:04X} to U+{last:04X}"
        raise InputError(Problem("recipe", "control_tokens", what, "set control_tokens: drop"))

    def mark(self, value: Any, markers: Markers) -> Any:
        """A copy of `value` in which every spelled control token stands between the markers."""
        if isinstance(value, str):
            return self._control.sub(rf"{markers.start}\g<0>{markers.end}", value)
        if isinstance(value, Mapping):
            marked: dict[str, Any] = {}
            for key, part in value.items():
                marked[key] = part
                if key != "role":
                    marked[key] = self.mark(part, markers)
            return marked
        if isinstance(value, list | tuple):
            return [self.mark(part, markers) for part in value]
        return value

    # -- encoding ----------------------------------------------------------------------------------

    def encode(self, rows: Sequence[SegmentedText]) -> list[EncodedSegments]:
        """Encode rows in one batch."""
        self._reset()
        rows_in_parts = list(map(self._cut, rows))
        # Every text behind its context, and the context alone; equal texts once.
        texts: dict[str, None] = {}
        for segments in rows_in_parts:
            for part in chain.from_iterable(segments):
                if isinstance(part, _Continuation):
                    texts[part.context] = None
                    texts[part.context + part.text] = None
        ids = self._ids_of(list(texts))
        return [self._join(segments, ids) for segments in rows_in_parts]

    def _ids_of(self, texts: Sequence[str]) -> dict[str, Ids]:
        # Without offsets: a fifth to a third less work, and the results are freed eight times
        # faster (measured).
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids: dict[str, Ids] = {}
        for text, encoding in zip(texts, encodings, strict=True):
            ids[text] = _array(encoding.ids)
        return ids

    def _join(self, segments: Sequence[Sequence[_Part]], ids: Mapping[str, Ids]) -> EncodedSegments:
        """Ids of each segment, from the ids of its texts behind their contexts."""
        segment_ids: list[Ids] = []
        joined: list[bool] = []
        for parts in segments:
            part_ids: list[Ids] = [_array([])]
            is_joined = False
            for part in parts:
                if not isinstance(part, _Continuation):
                    part_ids.append(part)
                    continue
                rest = _without_prefix(ids[part.context + part.text], ids[part.context])
                if rest is None and part.follows_mark:
                    rest = self._plain_ids(part.text)  # as transformers does
                elif rest is None:
                    is_joined = True
                    rest = self._after_neutral_context(part.text)
                part_ids.append(rest)
            segment_ids.append(np.concatenate(part_ids))
            joined.append(is_joined)
        return EncodedSegments(segment_ids, joined)

    def _plain_ids(self, text: str) -> Ids:
        return _array(self._backend.encode(text, add_special_tokens=False).ids)

    def _after_neutral_context(self, text: str) -> Ids:
        """A text encoded as a continuation of something that no token joins to it."""
        for context in NEUTRAL_CONTEXTS:
            rest = _without_prefix(self._plain_ids(context + text), self._plain_ids(context))
            if rest is not None:
                return rest
        what = f"this tokenizer joins every context to the text {text[:40]!r}"
        raise InputError(Problem("recipe", "model_name_or_path", what, "report this tokenizer"))

    # -- cutting rows into parts -------------------------------------------------------------------

    def _cut(self, row: SegmentedText) -> list[list[_Part]]:
        """Each segment in parts: texts behind what stands before them, and ids of marked tokens."""
        marks = None
        if row.markers:
            marks = self._mark_pattern(row.markers)
        segments: list[list[_Part]] = []
        before = ""  # since the last mark
        follows_mark = False
        for segment in row.segments:
            parts: list[_Part] = []
            texts = [segment]
            if marks is not None:
                texts = marks.split(segment)
            for index, text in enumerate(texts):
                if index % 2:
                    # A marked token, or a marker that a template tore from its token: both cut the
                    # text.
                    before = ""
                    follows_mark = True
                    if len(text) > 1:
                        parts.append(self._text_ids(text[1:-1]))
                elif text:
                    parts.append(self._continuation(before, text, follows_mark))
                    before = before[-LONGEST_CONTEXT:] + text
            segments.append(parts)
        return segments

    def _mark_pattern(self, markers: Markers) -> re.Pattern[str]:
        start = markers.start
        end = markers.end
        return re.compile(f"({start}(?:{self._control.pattern}){end}|[{start}{end}])")

    def _continuation(self, before: str, text: str, follows_mark: bool) -> _Continuation:
        """A text behind `before`, which begins at the last mark or where the row begins."""
        if not before:
            context = ""
            if follows_mark:
                # So that no tokenizer adds the space of a text's beginning in the middle of a row.
                context = "\n"
            return _Continuation(context, text, follows_mark)
        context = self.context(before)
        if follows_mark and context == before:
            context = "\n" + context
        return _Continuation(context, text, follows_mark=False)

    def context(self, text: str) -> str:
        """The end of a text that decides how what follows is encoded.

        It begins at its last control token, else at its last line. Tokenizers cut a text at control
        tokens before anything else, and no token reaches from a line break into the word after it.
        """
        end = text[-LONGEST_CONTEXT:]
        tokens = list(self._control.finditer(end))
        if tokens:
            return end[tokens[-1].start() :]
        if len(text) <= LONGEST_CONTEXT:
            return text
        line = re.search(r"\n(?=\S)", end)
        if line is None:
            return end
        return end[line.end() :]

    # -- control tokens as text --------------------------------------------------------------------

    def _text_ids(self, token: str) -> Ids:
        """Ids of a control token's spelling as plain text.

        Raises InputError where the tokenizer has none.
        """
        if token not in self._spelled:
            newline = self._plain_ids("\n")
            ids = _without_prefix(self._without_added_tokens("\n" + token), newline)
            if ids is None:
                ids = self._without_added_tokens(token)
            if self._backend.token_to_id(token) in ids:
                what = f"this tokenizer cannot keep {token!r} as text"
                raise InputError(
                    Problem("recipe", "control_tokens", what, "set control_tokens: drop")
                )
            self._spelled[token] = ids
        return self._spelled[token]

    def _without_added_tokens(self, text: str) -> Ids:
        # The tokenizer's own steps; its switch for special tokens leaves added tokens that are not
        # special in force.
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        ids: list[int] = []
        for word in words:
            ids += [token.id for token in self._backend.model.tokenize(word)]
        return _array(ids)


def _without_prefix(ids: Ids, prefix: Ids) -> Ids | None:
    """`ids` after `prefix`, or None where they do not begin with it."""
    if len(ids) < len(prefix) or not np.array_equal(ids[: len(prefix)], prefix):
        return None
    return ids[len(prefix) :]


def _array(ids: Sequence[int]) -> Ids:
    return np.fromiter(ids, dtype=np.int32, count=len(ids))
