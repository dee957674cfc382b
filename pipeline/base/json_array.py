"""A JSON array read item by item, in the memory of a few times its longest."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

SPACE = re.compile(r"[ \t\n\r]*")
"""What JSON allows between values."""
PIECE_BYTES = 1 << 16
"""Read at once of a JSON array; more where an item is longer."""
ITEM_CHARS = 1 << 29
"""Of an item of a JSON array, at most: it is held in memory."""
NEAR_END = 32
"""Characters from the end of a text within which what is found may be otherwise where it goes on."""


def array_items(head: bytes, read: Callable[[int], bytes]) -> Iterator[Any]:
    """Items of the JSON array that begins with `head` and goes on in what `read` gives, in the memory of a few times the longest.

    Raises ValueError, RecursionError naming the item.
    """
    text = ArrayText(head, read)
    text.at, n = 1, 0
    if ended := text.next() == "]":
        text.at += 1
    while not ended:
        try:
            yield text.item()
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(f"item {n}: {why}") from error
        mark, n = text.next(), n + 1
        if mark not in (",", "]"):
            raise ValueError(
                f"after item {n - 1}: expected a comma or the end, found {mark or 'the end of the file'!a}"
            )
        text.at, ended = text.at + 1, mark == "]"
    if text.next():
        raise ValueError(f"something follows its {n} items")


class ArrayText:
    """Text of a JSON array, as far as it was read, without what was taken of it. `at`: where reading goes on."""

    def __init__(self, head: bytes, read: Callable[[int], bytes]) -> None:
        self.read, self.at, self.is_whole = read, 0, False
        self.decoder, self.json = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self.text = self.decoder.decode(head)

    def more(self) -> None:
        """Read on, as much as is held. Raises ValueError for what is not UTF-8, and for an item that is too long."""
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > ITEM_CHARS:
            raise ValueError(f"is longer than {ITEM_CHARS:,} characters; write it as a text file of its own")
        data = self.read(max(PIECE_BYTES, len(self.text)))
        self.is_whole = not data
        self.text += self.decoder.decode(data, final=self.is_whole)

    def next(self) -> str:
        """The next character that is no space, from which reading goes on; empty at the end of the file."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.at = len(self.text) if space is None else space.end()
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.more()

    def item(self) -> Any:
        """The value from here on, behind spaces. Raises ValueError, RecursionError."""
        self.next()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - NEAR_END
                if self.is_whole or not goes_on:
                    raise
            else:
                if end + NEAR_END < len(self.text) or self.is_whole:  # a number may go on
                    self.at = end
                    return value
            self.more()
