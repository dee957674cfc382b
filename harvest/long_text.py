"""Texts cut into pieces before they are tokenised, in memory or from a file of any size."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import CorpusError
from pipeline.base.records import readable

GIANT = 1_000_000
"""Characters of a text that are tokenised at once; a longer one is cut before white space."""


@dataclass(frozen=True)
class TextFile:
    """A file that is one text, compressed or not, read as it is needed."""

    path: Path

    def __len__(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def parts(self, limit: int = GIANT) -> Iterator[tuple[int, str]]:
        """The text in pieces as `cut` makes them, where each starts. Holds one of them and a little. Raises CorpusError."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        start, text, n_read = 0, "", 0
        with readable(self.path) as file:
            while data := file.read(limit):
                try:
                    text += decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise self.undecoded(error, n_read) from error
                n_read += len(data)
                while len(text) > limit:
                    end = end_of_piece(text, 0, limit)
                    yield start, text[:end]
                    start, text = start + end, text[end:]
        try:
            text += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self.undecoded(error, n_read) from error
        yield start, text

    def undecoded(self, error: UnicodeDecodeError, n_read: int) -> CorpusError:
        """What is said of bytes that are no text."""
        return CorpusError(
            f"{self.path}: not UTF-8 text ({error.reason} near byte {n_read + error.start}); convert it or leave it out"
        )


def cut(text: str, limit: int) -> Iterator[tuple[int, str]]:
    """A text in pieces of at most `limit` characters, cut before a line's or else a word's end where there is one; where
    each starts."""
    start = 0
    while len(text) - start > limit:
        end = end_of_piece(text, start, limit)
        yield start, text[start:end]
        start = end
    yield start, text[start:]


def end_of_piece(text: str, start: int, limit: int) -> int:
    """Where the piece that begins at `start` ends, in a text that goes on beyond `limit`."""
    end = text.rfind("\n", start + 1, start + limit)
    end = end if end > start else text.rfind(" ", start + 1, start + limit)
    return end if end > start else start + limit
