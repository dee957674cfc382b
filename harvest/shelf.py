"""Where every record of some files lies, so that they can be read in any order in little memory."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from pipeline.base.files import require_free
from pipeline.base.record_files import TEXT
from pipeline.base.records import (
    Record,
    Unread,
    is_compressed,
    kind_of,
    parse_object,
    raw_lines,
    read_records,
    read_text,
)

MARK = b"!"
"""What a record in the copy begins with that cannot be read."""
COPIED = 64 << 20
"""Bytes that are copied between two looks at the free space."""


class Shelf:
    """Records of files, noted with `add`, read with `record`: 28 bytes of memory each.

    Plain JSON lines are read where they lie. Everything else is copied, uncompressed, to an unnamed file in `scratch`; of
    records with columns only `field`, or what it is a path into. Raises CorpusError for damaged files, DiskError.
    """

    def __init__(self, scratch: Path, field: str) -> None:
        self.scratch, self.columns = scratch, (field, field.split(".")[0])
        self.paths: list[Path] = []
        self.file, self.start, self.length, self.number = array("i"), array("q"), array("q"), array("q")
        self.stack, self.room = ExitStack(), 0
        self.copy: IO[bytes] | None = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def __len__(self) -> int:
        return len(self.file)

    def add(self, path: Path) -> None:
        """Note every record of a file."""
        self.paths.append(path)
        if lies_open(path):
            for number, start, line in raw_lines(path):
                self._note(start, len(line), number)
        else:
            for number, data in enumerate(self._raw(path), 1):
                self._note(*self._copied(data), number)

    def record(self, i: int) -> tuple[str, Record | Unread]:
        """Where the i-th record is, for messages, and the record."""
        path, number = self.paths[self.file[i]], self.number[i]
        data = self._read(path, self.start[i], self.length[i])
        if data.startswith(MARK) and not lies_open(path):
            where, _, reason = os.fsdecode(data[1:]).partition("\0")
            return where, Unread(reason)
        return f"{path}:{number}" if lies_open(path) else f"{path}, record {number}", parse_object(data)

    def _raw(self, path: Path) -> Iterator[bytes]:
        """Records as JSON objects, or as `as_json` writes those that cannot be read."""
        kind = kind_of(path)
        if kind == TEXT:
            yield json.dumps({self.columns[0]: read_text(path)}).encode()
        elif kind in (".jsonl", ".ndjson"):
            for number, _, line in raw_lines(path):
                marked = line.startswith(
                    MARK
                )  # no record begins so, and what `as_json` says of those that are none does
                yield as_json(f"{path}:{number}", parse_object(line), self.columns) if marked else line
        else:
            yield from (as_json(*found, self.columns) for found in read_records(path, self.columns))

    def _note(self, start: int, length: int, number: int) -> None:
        self.file.append(len(self.paths) - 1)
        self.start.append(start)
        self.length.append(length)
        self.number.append(number)

    def _copied(self, data: bytes) -> tuple[int, int]:
        """Start and length in the copy."""
        if self.copy is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self.copy = self.stack.enter_context(tempfile.TemporaryFile(dir=self.scratch))  # noqa: SIM115 (the stack closes it)
        self.room -= len(data)
        if self.room < 0:
            self.room = max(COPIED, len(data))
            require_free(self.scratch, self.room, "a copy of the corpus")
        return self.copy.tell(), self.copy.write(data)

    def _read(self, path: Path, start: int, length: int) -> bytes:
        """Bytes of a corpus file, or of the copy."""
        if lies_open(path):
            with open(path, "rb") as file:
                return os.pread(file.fileno(), length, start)
        assert self.copy is not None, "what was copied has a copy"
        self.copy.flush()
        return os.pread(self.copy.fileno(), length, start)


def lies_open(path: Path) -> bool:
    """Whether records are lines that can be read where they lie."""
    return kind_of(path) in (".jsonl", ".ndjson") and not is_compressed(path)


def as_json(where: str, record: Record | Unread, columns: Sequence[str]) -> bytes:
    """A record's wanted columns, or all its names where it has none of them; `!`, where it is and why it cannot be read."""
    if isinstance(record, Unread):
        return MARK + os.fsencode(f"{where}\0{record.reason}")
    wanted = {name: record[name] for name in columns if name in record} or dict.fromkeys(record)
    try:
        return json.dumps(wanted).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return MARK + os.fsencode(f"{where}\0{error}")
