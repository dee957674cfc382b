"""Text of tokens as pages and terminals show it: nothing in it breaks a line, hides or reorders its neighbours."""

from __future__ import annotations

import unicodedata
from typing import Protocol, runtime_checkable

LONGEST = 100
"""Characters of a token that are shown; real vocabularies hold none this long."""
SHOWN = {"\n": "↵", "\t": "⇥", "\r": "⏎"}
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


@runtime_checkable
class Tokenizer(Protocol):
    """The two methods we use of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...


def visible(text: str) -> str:
    """Text that neither breaks a line nor reorders or hides its neighbours: such characters become ↵ or ⟨U+202E⟩."""
    return "".join(SHOWN.get(c) or (f"⟨U+{ord(c):04X}⟩" if is_unseen(c) else c) for c in text)


def is_unseen(character: str) -> bool:
    """Whether a character controls (C0, C1, bidi), separates lines, or is no character at all."""
    return character in BIDI or unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs", "Cn")


class TokenText:
    """The text of one token, leading space included, decoded once a token id.

    Decoders drop the space before a first word, so each token is decoded behind a known one and the known text cut off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._known = tokenizer, {}  # type: Tokenizer, dict[int, str]
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._head = self._decode(self._anchor)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def plain(self, token: int) -> str:
        """Text of a token id as the tokenizer decodes it within a text."""
        text = self._decode([*self._anchor, token])
        return text[len(self._head) :] if text.startswith(self._head) else self._decode([token])

    def __call__(self, token: int) -> str:
        """Visible text of a token id."""
        if token not in self._known:
            text = self.plain(token)
            self._known[token] = visible(text if len(text) <= LONGEST else text[:LONGEST] + "…")
        return self._known[token]
