"""Records from files: JSON lines, JSON, CSV, Parquet and Arrow, compressed or not. Corpora and labelled texts are read here.

A record is a mapping of names to plain values. Nothing is passed over in silence: a compressed file must end where its last
frame ends, and what cannot be read is named by path and line. Which files of a folder are read: `record_files.py`.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from pipeline.base.errors import CorpusError, PipelineError, lacks_memory
from pipeline.base.files import regular
from pipeline.base.json_array import array_items

Record = dict[str, Any]


@dataclass(frozen=True)
class Unread:
    """A record that cannot be read, and why; those after it can be."""

    reason: str


Found = tuple[str, Record | Unread]
"""Where a record is, for messages (`path:line`, or `path, row n`), and the record."""


class ZstdFile(io.RawIOBase):
    """A .zst of any number of frames, decompressed in order. Raises ZstdError where the last frame is cut short."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = self._unused = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompressed bytes; 0 at the end of the last frame."""
        while not self._ready:
            compressed = self._unused or self._file.read(1 << 17)
            self._unused = b""
            if not compressed:
                if self._frame is not None:
                    raise zstandard.ZstdError("it ends inside a compressed frame and was cut short")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(compressed)
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def open_zstd(file: IO[bytes]) -> Any:
    """What a .zst holds, as a buffered binary file."""
    return io.BufferedReader(ZstdFile(file), 1 << 20)


COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".zst": open_zstd,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""Suffix → how what an open file holds is read. Each of them fails where the data end before their last frame does."""
UNREADABLE = (OSError, EOFError, zstandard.ZstdError, lzma.LZMAError, zlib.error)
"""What opening and decompressing raise."""
BOM = b"\xef\xbb\xbf"


def kind_of(path: Path) -> str:
    """`.jsonl` for a.jsonl and a.jsonl.gz alike: what the file holds, once decompressed."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def is_compressed(path: Path) -> bool:
    """Whether its name ends as those of compressed files do."""
    return path.suffix.lower() in COMPRESSED


@contextlib.contextmanager
def readable(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed as its name says. Raises CorpusError naming it when they cannot be had to the end."""
    try:
        with open(path, "rb", opener=regular) as raw:
            if is_compressed(path):
                with COMPRESSED[path.suffix.lower()](raw) as file:
                    yield file
            else:
                yield raw
    except UNREADABLE as error:
        if lacks_memory(error):
            raise
        raise CorpusError(f"{path}: cannot be read ({error}); get the file again or leave it out") from error


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[Found]:
    """Every record of a file in order. `columns`: read no others where the format can (Parquet, Arrow).

    Raises CorpusError for a file that is damaged or of a kind that is not read.
    """
    kind = kind_of(path)
    if kind not in READERS:
        raise CorpusError(f"{path}: not a file of records; expected {', '.join(READERS)}, or those compressed")
    return READERS[kind](path, columns)


def raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset in the decompressed bytes, and bytes of every line that is not blank, without a byte-order mark."""
    offset = 0
    with readable(path) as file:
        for number, line in enumerate(file, 1):
            start = offset + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            offset += len(line)
            rest = line[start - (offset - len(line)) :].lstrip()
            if text := rest.rstrip():
                yield number, offset - len(rest), text


def parse_object(data: bytes) -> Record | Unread:
    """One JSON object."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unread(f"is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Unread(f"is not JSON ({error if isinstance(error, ValueError) else 'nested too deeply'})")
    return value if isinstance(value, dict) else Unread(f"is a {type(value).__name__}, expected a JSON object")


def read_json_lines(path: Path, _columns: Sequence[str] | None) -> Iterator[Found]:
    """One JSON object a line."""
    for number, _, line in raw_lines(path):
        yield f"{path}:{number}", parse_object(line)


def read_json(path: Path, columns: Sequence[str] | None) -> Iterator[Found]:
    """One JSON array of objects, one after the other; a file that begins otherwise is JSON lines."""
    with readable(path) as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            try:
                for n, item in enumerate(array_items(head, file.read)):
                    yield f"{path}, item {n}", item if isinstance(item, dict) else Unread(f"is a {type(item).__name__}")
            except (ValueError, RecursionError) as error:
                raise CorpusError(
                    f"{path}: not a JSON array of objects ({error}); expected [{{…}}, …] or a line each"
                ) from error
            return
    yield from read_json_lines(path, columns)


def read_csv(path: Path, _columns: Sequence[str] | None) -> Iterator[Found]:
    """Comma- or tab-separated values; the first row names the columns. Values are text."""
    csv.field_size_limit(2**31 - 1)
    with readable(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.reader(text, strict=True, delimiter="\t" if kind_of(path) == ".tsv" else ",")
        try:
            try:
                names = next(rows, [])
            except csv.Error as error:
                raise CorpusError(f"{path}:{rows.line_num}: its header is not CSV ({error}); mend it") from error
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise CorpusError(
                    f"{path}:{rows.line_num}: its header names {twice[:80]!a} twice; rename one of the columns"
                )
            while True:
                try:
                    row = next(rows)
                except csv.Error as error:
                    yield f"{path}:{rows.line_num}", Unread(f"is not CSV ({error})")
                    continue
                if row:
                    yield f"{path}:{rows.line_num}", as_record(names, row)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}:{rows.line_num + 1}: not UTF-8 ({error.reason}); convert the file") from error


def as_record(names: Sequence[str], row: Sequence[str]) -> Record | Unread:
    """A row under its header."""
    if len(row) != len(names):
        return Unread(f"has {len(row)} values, the header names {len(names)}")
    return dict(zip(names, row))


def read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Found]:
    """Rows of a Parquet file, piece by piece."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    with arrow_errors(path, "Parquet"), open(path, "rb", opener=regular) as raw:
        file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)  # where its writer kept any
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        yield from rows_of(path, file.iter_batches(columns=wanted or None, batch_size=1024))


def read_arrow(path: Path, columns: Sequence[str] | None) -> Iterator[Found]:
    """Rows of an Arrow file: the stream that `datasets` saves, or the file format."""
    import pyarrow

    with arrow_errors(path, "Arrow"), open(path, "rb", opener=regular) as file:
        # read, not mapped: a file that shrinks under a mapping would end the process
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        yield from rows_of(path, (narrowed(path, batch, columns) for batch in batches))


def require_batches(path: Path) -> None:
    """Raise CorpusError for a stream of Arrow whose batches are not as long as they say, which would end the process that looks
    into them; what they hold is not read."""
    import pyarrow

    with arrow_errors(path, "Arrow"), pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            batch.validate()


def narrowed(path: Path, batch: Any, columns: Sequence[str] | None) -> Any:
    """A batch with the wanted columns only, or as it is where it has none. Raises CorpusError for one that is there twice."""
    names = batch.schema.names
    found = [name for name in columns or () if name in names]
    if twice := [name for name in found if names.count(name) > 1]:
        raise CorpusError(f"{path}: has {names.count(twice[0])} fields called {twice[0][:80]!a}; keep one of them")
    return batch.select(found) if found else batch


def rows_of(path: Path, batches: Iterable[Any]) -> Iterator[Found]:
    """Rows of record batches, numbered through. A batch is checked whole before any of it is touched: offsets that lead out
    of its memory would end the process."""
    n = 0
    for batch in batches:
        batch.validate(full=True)
        for row in as_rows(batch):
            yield f"{path}, row {n}", row
            n += 1


def as_rows(batch: Any) -> list[Record | Unread]:
    """The rows of a batch; one with a value that Python cannot hold, as a date of the year 100,000, is unread."""
    try:
        return list(batch.to_pylist())
    except (OverflowError, ValueError) as error:
        if len(batch) == 1:
            return [Unread(f"holds a value that cannot be read ({error})")]
    return [row for i in range(len(batch)) for row in as_rows(batch.slice(i, 1))]


@contextlib.contextmanager
def arrow_errors(path: Path, kind: str) -> Iterator[None]:
    """What pyarrow, and readers of what a schema holds, and the disk say, as a CorpusError."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # a schema may hold JSON of others, whose readers raise whatever they do
        if lacks_memory(error) and not claims_too_much(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CorpusError(f"{path}: cannot be read as {kind} ({first}); get the file again or leave it out") from error


MOST_ALLOCATED = 1 << 40
"""Bytes that no batch of records takes: who asks for them at once read a damaged size."""


def claims_too_much(error: BaseException) -> bool:
    """Whether memory lacked only because a file claims a size that none can have: Arrow names the size of what it asks for,
    but not of its own lists."""
    if isinstance(error, MemoryError) and not str(error):
        return True
    size = re.search(r"size (\d+)", str(error))
    return size is not None and int(size[1]) > MOST_ALLOCATED


READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Found]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Kind of file (`kind_of`) → how its records are read."""


def read_text(path: Path) -> str:
    """A text file of UTF-8, with or without a byte-order mark. Raises CorpusError."""
    with readable(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it or leave it out"
        ) from error


def whole_records(path: Path) -> list[Record]:
    """Every record of a file, all of which can be read. Raises CorpusError naming the first that cannot, or for none."""
    rows = []
    for where, record in read_records(path):
        if isinstance(record, Unread):
            raise CorpusError(f"{where}: {record.reason}")
        rows.append(record)
    if not rows:
        raise CorpusError(f"{path}: there is no row in it")
    return rows
