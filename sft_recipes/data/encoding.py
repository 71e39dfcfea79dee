"""Rendered text to ids, in batches, with the token that covers each character.

Text in a message that spells a control token must stay text. Such tokens are wrapped in two private markers before
rendering (`mark`), and the rendering is then encoded piece by piece: marked tokens as plain text, the rest as usual.
The ids are those of transformers' `apply_chat_template(..., sanitize_control_tokens=True)`, which a test holds equal;
that call works row by row and gives no character offsets, so it cannot be used here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from sft_recipes.errors import InputError, Problem

# Private-use characters; a row that brings them itself cannot be marked and is refused by name.
START, END = "\uf5e0", "\uf5e1"


class ControlTokens:
    """Finds, marks and encodes text that spells one of the given control tokens."""

    def __init__(self, tokenizer: Any, tokens: Sequence[str]) -> None:
        longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        self._pattern = re.compile(longest_first)
        self._markers = re.compile(f"{START}({longest_first}){END}|[{START}{END}]")
        self._backend = tokenizer.backend_tokenizer
        self._reset()
        self._newline = self._backend.encode("\n", add_special_tokens=False).ids
        self._lock = Lock()  # the modes of the shared backend are changed while encoding
        self._as_text: dict[str, list[int]] = {}

    def _reset(self) -> None:
        # Padding, truncation and special-token modes that any earlier call left on the shared backend.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False

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
            return self._pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode rendered texts, marked or not, in one batch. Safe to call from several threads."""
        with self._lock:
            return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        split = [self._markers.split(text) if START in text or END in text else [text] for text in texts]
        # Pieces after the first follow a newline, so that no tokenizer adds the prefix space of a text's beginning.
        wanted = dict.fromkeys(
            piece if index == 0 else "\n" + piece for pieces in split for index, piece in enumerate(pieces[::2])
        )
        self._reset()
        encodings = self._backend.encode_batch(list(wanted), add_special_tokens=False)
        by_text = dict(zip(wanted, encodings, strict=True))
        return [self._join(pieces, by_text) for pieces in split]

    def _join(self, pieces: Sequence[str | None], by_text: Mapping[str, Any]) -> Encoded:
        ids: list[int] = []
        parts: list[_Part] = []
        position = 0
        for index, piece in enumerate(pieces):
            if index % 2:  # a marked token, or None for a marker that a template tore from its token
                if piece is not None:
                    parts.append(_Part(position, len(ids), None, 0, 0))
                    ids += self._text_ids(piece)
                position += len(piece) + 2 if piece is not None else 1
                continue
            text = piece or ""
            encoding = by_text[text if index == 0 else "\n" + text]
            shift, skipped = (0, 0) if index == 0 else (1, len(self._newline))
            if index and encoding.ids[:skipped] != self._newline:
                encoding, shift, skipped = self._backend.encode(text, add_special_tokens=False), 0, 0
            parts.append(_Part(position, len(ids), encoding, shift, skipped))
            ids += encoding.ids[skipped:] if skipped else encoding.ids
            position += len(text)
        return Encoded(ids, parts)

    def _text_ids(self, token: str) -> list[int]:
        """Ids of a control token's spelling as plain text. Raises InputError where the tokenizer has none."""
        if token not in self._as_text:
            ids = self._without_added_tokens("\n" + token)
            own = ids[: len(self._newline)] == self._newline
            ids = ids[len(self._newline) :] if own else self._without_added_tokens(token)
            if self._backend.token_to_id(token) in ids:
                what = f"this tokenizer cannot keep {token!r} as text"
                raise InputError(Problem("recipe", "control_tokens", what, "set control_tokens: drop"))
            self._as_text[token] = ids
        return self._as_text[token]

    def _without_added_tokens(self, text: str) -> list[int]:
        # The tokenizer's own steps; its switch for special tokens leaves added tokens that are not special in force.
        backend = self._backend
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        splitter = backend.pre_tokenizer
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(normal)] if splitter is not None else [normal]
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of text: where it begins in characters and in tokens, its encoding, and what a leading newline added."""

    char: int
    token: int
    encoding: Any | None
    shift: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text, and which token covers which character."""

    ids: list[int]
    parts: Sequence[_Part]

    def token_at(self, char: int) -> int | None:
        """The token that covers the character, or None if no token does."""
        part = self.parts[bisect_right(self.parts, char, key=lambda one: one.char) - 1]
        if part.encoding is None:
            return part.token
        token = part.encoding.char_to_token(char - part.char + part.shift)
        return None if token is None or token < part.skipped else part.token + token - part.skipped

    def first_char(self, token: int) -> int:
        """Where the token's text begins, in characters of the whole text."""
        part = self.parts[bisect_right(self.parts, token, key=lambda one: one.token) - 1]
        if part.encoding is None:
            return part.char
        return int(part.encoding.token_to_chars(token - part.token + part.skipped)[0]) - part.shift + part.char
