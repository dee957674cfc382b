"""Text of tokens as pages and terminals show it: nothing in it breaks a line, hides or reorders its neighbours."""

from __future__ import annotations

import re
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


def spelled(text: str) -> str:
    """Text of a token that stands alone: one without ink (spaces, joiners, nothing) is spelled out: ␣␣, ⟨U+200D⟩."""
    if any(unicodedata.category(c) not in ("Zs", "Cf", "Mn") for c in text):
        return text
    return "".join("␣" if c == " " else f"⟨U+{ord(c):04X}⟩" for c in text) or "⟨no text⟩"


def byte_letters() -> dict[str, int]:
    """Letters that byte-level vocabularies (GPT-2's and later ones) write for bytes: those with ink in Latin-1 for themselves,
    the others for U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = byte_letters()


def text_of_bytes(piece: str) -> str:
    """A vocabulary's piece that is part of a character, its lone bytes as ⟨D7⟩; "" for a piece that stands for no bytes."""
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        data = bytes.fromhex(fallback[1])
    elif all(letter in BYTES for letter in piece):
        data = bytes(BYTES[letter] for letter in piece)
    else:
        return ""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if "\udc80" <= c <= "\udcff" else c for c in text)


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
        """Visible text of a token id; bytes that are no whole character as ⟨D7⟩, where the tokenizer says which they are."""
        if token not in self._known:
            text = self.plain(token)
            if "\ufffd" in text and (piece := getattr(self._tokenizer, "convert_ids_to_tokens", None)):
                text = text_of_bytes(piece(token)) or text
            self._known[token] = visible(text if len(text) <= LONGEST else text[:LONGEST] + "…")
        return self._known[token]
