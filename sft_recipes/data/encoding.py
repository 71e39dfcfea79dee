"""Rendered text to ids, in batches, with the token that covers each character.

Text in a message that spells a control token must stay text. Such tokens are wrapped in two private markers before
rendering (`mark`), and the rendering is then encoded piece by piece: marked tokens as plain text, the rest as usual.
The ids are those of transformers' `apply_chat_template(..., sanitize_control_tokens=True)`, which a test holds equal;
that call works row by row and gives no character offsets, so it cannot be used here.

Most tokenizers cut a text at its control tokens before anything else, so the pieces between them can be encoded alone
and equal pieces (the system prompt of every row) once a batch. Whether this one does is tried on every control token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import itemgetter
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_recipes.errors import InputError, Problem

# Private-use characters; a row that brings them itself cannot be marked and is refused by name.
START, END = "\uf5e0", "\uf5e1"
# Arrays: joining lists of Python integers takes more than twice as long.
Ids = npt.NDArray[np.int32]


class ControlTokens:
    """Finds, marks and encodes text that spells one of the given control tokens."""

    def __init__(self, tokenizer: Any, tokens: Sequence[str]) -> None:
        longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        self._pattern = re.compile(longest_first)
        self._backend = tokenizer.backend_tokenizer
        self._reset()
        self._newline = _array(self._backend.encode("\n", add_special_tokens=False).ids)
        self._lock = Lock()  # the modes of the shared backend are changed while encoding
        self._as_text: dict[str, Ids] = {}
        self._ids = {token: _array([self._backend.token_to_id(token)]) for token in tokens}
        self._cuts_at_tokens = self._try_cutting(tokens)
        controls = f"|{longest_first}" if self._cuts_at_tokens else ""
        self._separators = re.compile(f"({START}(?:{longest_first}){END}|{START}|{END}{controls})")

    def _reset(self) -> None:
        # Padding, truncation and special-token modes that any earlier call left on the shared backend.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False

    def _try_cutting(self, tokens: Sequence[str]) -> bool:
        """Whether every token, whatever stands around it, gives the ids of its two sides with its own between."""
        sides = [("a", "b"), ("a ", " b"), ("a\n", "\nb"), (" ", " "), ("\n", "\n"), ("", "b"), ("a", "")]
        texts = [text for left, right in sides for text in (left, right, *(left + token + right for token in tokens))]
        ids = [one.ids for one in self._backend.encode_batch(texts, add_special_tokens=False)]
        return all(
            whole == [*left, *self._ids[token], *right]
            for start in range(0, len(ids), len(tokens) + 2)
            for left, right in [ids[start : start + 2]]
            for token, whole in zip(tokens, ids[start + 2 : start + 2 + len(tokens)], strict=True)
        )

    def occur_in(self, value: Any) -> bool:
        """Whether any text inside `value` (a message, tools) spells a control token or a marker."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None or START in value or END in value
        if isinstance(value, Mapping):
            return any(self.occur_in(item) for key, item in value.items() if key != "role")
        return isinstance(value, (list, tuple)) and any(map(self.occur_in, value))

    def mark(self, value: Any) -> Any:
        """A copy of `value` with every spelled control token between markers."""
        if isinstance(value, str):
            bare = value.replace(START, "").replace(END, "")
            return self._pattern.sub(lambda token: START + token.group() + END, bare)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, texts: Sequence[str], places: Iterable[Sequence[int]] = repeat(())) -> list[Encoded]:
        """Encode rendered texts, marked or not, in one batch. Safe to call from several threads.

        `places`: for each text the characters whose tokens will be asked for. Only the pieces that hold them are
        encoded with offsets, which are a quarter of the tokenizer's work.
        """
        split = [self._separators.split(text) for text in texts]
        # Where pieces depend on their place, those after the first follow a newline, so that no tokenizer adds the
        # prefix space of a text's beginning.
        before = "" if self._cuts_at_tokens else "\n"
        wanted: dict[str, bool] = {}
        for pieces, characters in zip(split, places, strict=False):
            held = _pieces_with(characters, pieces)
            for index in range(0, len(pieces), 2):
                text = before + pieces[index] if index else pieces[index]
                wanted[text] = index in held or wanted.get(text, False)
        plain, asked = ([text for text in wanted if wanted[text] is offsets] for offsets in (False, True))
        encodings = self._encode_batch(plain, asked)
        by_text = {text: (one, _array(one.ids)) for text, one in zip(plain + asked, encodings, strict=True)}
        return [self._join(pieces, by_text, before) for pieces in split]

    def _encode_batch(self, plain: Sequence[str], asked: Sequence[str]) -> list[Any]:
        """Encodings of texts without offsets, then of those with."""
        # Alone under the lock, so that while the tokenizer (Rust, all cores) works, another thread joins what it gave.
        with self._lock:
            self._reset()
            encodings = self._backend.encode_batch_fast(plain, add_special_tokens=False)
            return encodings + self._backend.encode_batch(asked, add_special_tokens=False)

    def _join(self, pieces: Sequence[str], by_text: Mapping[str, tuple[Any, Ids]], before: str) -> Encoded:
        """One text from its pieces: text, separator, text and so on."""
        encoding, own = by_text[pieces[0]]
        parts: list[_Part] = [(0, 0, encoding, 0, 0)]
        arrays, position, count = [own], len(pieces[0]), len(own)
        for separator, text in zip(pieces[1::2], pieces[2::2], strict=True):
            parts.append((position, count, None, 0, 0))
            position += len(separator)
            if separator in self._ids:
                arrays.append(self._ids[separator])
                count += 1
            elif len(separator) > 1:  # else a marker that a template tore from its token
                arrays.append(self._text_ids(separator[1:-1]))
                count += len(arrays[-1])
            encoding, own = by_text[before + text]
            shift, skipped = (1, len(self._newline)) if before else (0, 0)
            if skipped and not np.array_equal(own[:skipped], self._newline):
                encoding, shift, skipped = self._encode_batch([], [text])[0], 0, 0
                own = _array(encoding.ids)
            parts.append((position, count, encoding, shift, skipped))
            arrays.append(own[skipped:])
            position, count = position + len(text), count + len(arrays[-1])
        return Encoded(np.concatenate(arrays), parts)

    def _text_ids(self, token: str) -> Ids:
        """Ids of a control token's spelling as plain text. Raises InputError where the tokenizer has none."""
        if token not in self._as_text:
            with self._lock:
                ids = self._without_added_tokens("\n" + token)
                newline = self._newline.tolist()
                ids = ids[len(newline) :] if ids[: len(newline)] == newline else self._without_added_tokens(token)
            if self._backend.token_to_id(token) in ids:
                what = f"this tokenizer cannot keep {token!r} as text"
                raise InputError(Problem("recipe", "control_tokens", what, "set control_tokens: drop"))
            self._as_text[token] = _array(ids)
        return self._as_text[token]

    def _without_added_tokens(self, text: str) -> list[int]:
        # The tokenizer's own steps; its switch for special tokens leaves added tokens that are not special in force.
        backend = self._backend
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        splitter = backend.pre_tokenizer
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(normal)] if splitter is not None else [normal]
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]


def _pieces_with(characters: Iterable[int], pieces: Sequence[str]) -> set[int]:
    """Which pieces of a text hold the characters."""
    starts = [0, *accumulate(map(len, pieces))]
    return {bisect_right(starts, character) - 1 for character in characters}


def _array(ids: Sequence[int]) -> Ids:
    return np.fromiter(ids, dtype=np.int32, count=len(ids))


# A piece of text: where it begins in characters and in tokens, its encoding (None: a control token, or one spelled as
# text), and the characters and tokens that a newline before it added.
_Part = tuple[int, int, Any, int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text, and which token covers a character, for those that were asked for."""

    ids: Ids
    parts: Sequence[_Part]

    def token_at(self, char: int) -> int | None:
        """The token that covers the character, or None if no token does."""
        start, first, encoding, shift, skipped = self.parts[bisect_right(self.parts, char, key=itemgetter(0)) - 1]
        if encoding is None:
            return first
        token = encoding.char_to_token(char - start + shift)
        return None if token is None or token < skipped else first + token - skipped

    def first_char(self, token: int) -> int:
        """Where the token's text begins, in characters of the whole text."""
        start, first, encoding, shift, skipped = self.parts[bisect_right(self.parts, token, key=itemgetter(1)) - 1]
        if encoding is None:
            return start
        return int(encoding.token_to_chars(token - first + skipped)[0]) - shift + start
