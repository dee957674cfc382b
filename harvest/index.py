"""Where every record of some files lies, so that they can be read in any order where they are, in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from harvest.long_text import TextFile
from pipeline.base.files import regular
from pipeline.base.record_files import TEXT
from pipeline.base.records import Record, Unread, is_compressed, kind_of, parse_object, raw_lines

BYTES_EACH = 28
"""Memory that a record of an index takes."""


class Index:
    """Records of files in their order, read with `record`: BYTES_EACH of memory each. A text file is one record.

    Raises CorpusError for a file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], field: str) -> None:
        self.paths, self.field = paths, field
        self.file, self.start, self.length, self.number = array("i"), array("q"), array("q"), array("q")
        for n, path in enumerate(paths):
            lines = [(1, 0, b"")] if kind_of(path) == TEXT else raw_lines(path)
            for number, start, line in lines:
                self.file.append(n)
                self.start.append(start)
                self.length.append(len(line))
                self.number.append(number)

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


def is_indexed(path: Path) -> bool:
    """Whether records lie open, so that any of them can be read without those before it: lines, and a whole text."""
    return kind_of(path) == TEXT or (kind_of(path) in (".jsonl", ".ndjson") and not is_compressed(path))
