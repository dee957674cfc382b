"""Where every record of some files lies, so that they can be read in any order where they are, in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard

from harvest.long_text import TextFile
from pipeline.base.files import regular
from pipeline.base.kept import kept
from pipeline.base.record_files import TEXT
from pipeline.base.records import Record, Unread, is_compressed, kind_of, parse_object, raw_lines


class Index:
    """Records of files in their order, read with `record`: 28 bytes of memory each. A text file is one record.

    Raises CorpusError for a file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], field: str) -> None:
        self.paths, self.field = paths, field
        self.file, self.start, self.length, self.number = array("i"), array("q"), array("q"), array("q")
        for n, path in enumerate(paths):
            starts, lengths, numbers = lines_of(path)
            self.file.frombytes(np.full(len(starts), n, np.int32).tobytes())
            for held, found in ((self.start, starts), (self.length, lengths), (self.number, numbers)):
                held.frombytes(found.tobytes())

    def __len__(self) -> int:
        return len(self.file)

    def record(self, i: int) -> tuple[str, Record | Unread]:
        """Where the i-th record is, for messages, and the record."""
        path = self.paths[self.file[i]]
        if kind_of(path) == TEXT:
            return str(path), {self.field: TextFile(path)}
        with open(path, "rb", opener=regular) as file:
            data = os.pread(file.fileno(), self.length[i], self.start[i])
        return f"{path}:{self.number[i]}", parse_object(data)


def lines_of(path: Path) -> npt.NDArray[np.int64]:
    """Start, length and number of each line [3, line] that is not blank; kept for the next run. A text is one of no length."""
    if kind_of(path) == TEXT:
        return np.array([[0], [0], [1]], np.int64)
    return unpacked(kept(path, ".lines", lambda: packed(found_lines(path))))


def found_lines(path: Path) -> npt.NDArray[np.int64]:
    """The lines of a file, by reading it. Raises CorpusError."""
    flat = array("q")
    for number, start, line in raw_lines(path):
        flat.extend((start, len(line), number))
    return np.frombuffer(flat, np.int64).reshape(-1, 3).T


def packed(lines: npt.NDArray[np.int64]) -> bytes:
    """Lines as they are kept: lengths, and with them how far a line is from the end of the one before and from its
    number, nearly all 1, compressed: about two bytes a line."""
    start, length, number = lines
    apart = np.diff(start, prepend=0)
    apart[1:] -= length[:-1]
    return zstandard.compress(np.stack([apart, length, np.diff(number, prepend=0)]).tobytes())


def unpacked(data: bytes) -> npt.NDArray[np.int64]:
    """Lines [3, line] that were `packed`."""
    apart, length, step = np.frombuffer(zstandard.decompress(data), np.int64).reshape(3, -1)
    apart = apart.copy()
    apart[1:] += length[:-1]
    return np.stack([np.cumsum(apart), length, np.cumsum(step)])


def is_indexed(path: Path) -> bool:
    """Whether records lie open, so that any of them can be read without those before it: lines, and a whole text."""
    return kind_of(path) == TEXT or (kind_of(path) in (".jsonl", ".ndjson") and not is_compressed(path))
