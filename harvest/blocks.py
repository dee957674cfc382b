"""Tokenised documents in blocks on disk, so that several processes tokenise, and one that was killed goes on.

A block is some documents (`corpus.block_documents`) of a lane of the corpus, whoever makes it; lanes take turns, a block
each, and a local corpus has one. Whoever packs rows takes the blocks in order, makes those that are not there, and stops in the
middle of one when its rows are full. A block is a cache: it appears whole or not at all, is checked before it is used, and is
made again where it is not what was written. The folder's name says what it is of.

    block   =  MAGIC, pieces, END (uint32), whether the lane ends here (uint8), crc32c of all before (uint32)
    piece   =  length (uint32), flags (uint8; 1: a document begins, 2: `kept` follows, 4: what is wrong with a record, as UTF-8),
               ids (int32), kept (uint8)
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import shutil
import struct
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from harvest.corpus import Bad, Corpus, Document
from harvest.texts import Piece, Reader
from harvest.tokens import tokenized
from pipeline.base.errors import CorpusError, DamagedError
from pipeline.base.files import atomic, crc32c, regular

MAGIC = b"tokens 1"
END = 0xFFFFFFFF
HEAD = struct.Struct("<IB")
READ_BYTES = 1 << 20
MUCH_MORE = 1 << 24
"""Tokens beyond those asked for at which a part gives up a block."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a corpus in a folder, which need not be there yet."""

    folder: Path
    corpus: Corpus
    reader: Reader

    def path(self, lane: int, k: int) -> Path:
        """The file of a lane's k-th block."""
        return self.folder / f"{k * self.corpus.n_lanes + lane:07d}"

    def pieces(self) -> Generator[Piece, None, None]:
        """All documents' tokens in order, as far as they are asked for. Raises CorpusError for more bad records than allowed, and
        where there is no text at all."""
        bad, any_text = Bad(self.corpus.source.skip_bad), False
        with self.lanes(range(self.corpus.n_lanes)) as lanes:
            for block in in_turn(lanes, itertools.count()):
                with contextlib.closing(block):
                    for piece in block:
                        if piece.bad is not None:
                            bad.skip(piece.bad)
                        else:
                            any_text = any_text or len(piece.ids) > 0
                            yield piece
        if not any_text:
            raise CorpusError(f"{self.corpus.source.corpus}: there is no text in it; give a corpus with documents")

    @contextlib.contextmanager
    def lanes(self, which: Iterable[int]) -> Iterator[list[Lane]]:
        """Some lanes, let go of at the end."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(contextlib.closing(Lane(self, lane))) for lane in which]

    def share(self, i: int, n: int, n_tokens: int) -> Iterator[int]:
        """Make the blocks of part i of n that are not there, until all parts together have about n_tokens; yields the tokens of
        each block that is there now.

        Parts take whole lanes, so that none reads another's files; where they are more than lanes, they share the blocks of one.
        """
        n_lanes, done, total = self.corpus.n_lanes, 0, 0
        first, sharing = i // n_lanes, len(range(i % n_lanes, n, n_lanes))
        with self.lanes(range(i % n_lanes, n_lanes, n)) as lanes:
            for block in in_turn(lanes, itertools.count(first, sharing)):
                n_ids = 0
                with contextlib.closing(block):
                    if done and block.number * total / done >= n_tokens:
                        return
                    for piece in block:
                        n_ids += 0 if piece.bad is not None else len(piece.ids)
                        if n_ids > n_tokens + MUCH_MORE:
                            return  # a text that is more than all that is asked: who packs reads it as far as it is needed
                done, total = done + 1, total + n_ids
                yield n_ids


def in_turn(lanes: Sequence[Lane], numbers: Iterable[int]) -> Iterator[Block]:
    """Blocks of so many numbers of each lane, until all lanes have ended."""
    for k in numbers:
        for lane in lanes:
            if not lane.ended:
                yield Block(lane, k)
        if all(lane.ended for lane in lanes):
            return


class Block:
    """The pieces of a lane's k-th block, from its file or made now. `number`: its place in the order, while no lane has ended."""

    def __init__(self, lane: Lane, k: int) -> None:
        self.number = k * lane.blocks.corpus.n_lanes + lane.lane
        self.pieces = lane.block(k)

    def __iter__(self) -> Iterator[Piece]:
        return self.pieces

    def close(self) -> None:
        """Leave it; what was not made to its end is not kept."""
        self.pieces.close()


class Lane:
    """Blocks of one lane, going on where the last one ended as long as they are asked for in order. `ended`: whether the last one
    was the last."""

    def __init__(self, blocks: Blocks, lane: int) -> None:
        self.blocks, self.lane, self.ended = blocks, lane, False
        self.documents: Iterator[Document | CorpusError] = iter(())
        self.at = -1

    def close(self) -> None:
        """Let go of the corpus."""
        if hasattr(self.documents, "close"):
            self.documents.close()

    def block(self, k: int) -> Generator[Piece, None, None]:
        """Pieces of block k, from its file or made now."""
        path = self.blocks.path(self.lane, k)
        try:
            check_block(path)
        except (FileNotFoundError, DamagedError):
            yield from self._made(k, path)
            return
        with open(path, "rb", opener=regular) as file:
            self.ended = yield from read_block(file)

    def _made(self, k: int, path: Path) -> Generator[Piece, None, None]:
        """The same of one that is not there; written when all of it was taken."""
        size = self.blocks.corpus.block_documents
        first = k * size
        if not 0 <= self.at <= first:
            self.close()
            self.documents, self.at = self.blocks.corpus.documents(first, self.lane), first
        for _ in range(first - self.at):
            next(self.documents, None)
        self.at = -1  # until this one is whole
        documents = Counted(itertools.islice(self.documents, size))
        with unfinished(self.blocks.folder), atomic(path) as raw:
            file = Summed(raw)
            file.write(MAGIC)
            with contextlib.closing(tokenized(iter(documents), self.blocks.reader)) as pieces:
                for piece in pieces:
                    file.write(as_bytes(piece))
                    yield piece
            ends = documents.n < size
            file.write(HEAD.pack(END, ends))
            raw.write(struct.pack("<I", file.crc))
        self.at, self.ended = first + documents.n, ends


class Counted:
    """Documents, and how many of them were taken."""

    def __init__(self, documents: Iterator[Document | CorpusError]) -> None:
        self.documents, self.n = documents, 0

    def __iter__(self) -> Iterator[Document | CorpusError]:
        for document in self.documents:
            self.n += 1
            yield document


class Summed:
    """A file that is written, and the crc32c of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc = file, 0

    def write(self, data: bytes) -> None:
        """Append."""
        self.crc = crc32c(data, self.crc)
        self.file.write(data)


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """When the block is left by an error, or early, a folder into which nothing came is taken away."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # refuses unless it is empty


def as_bytes(piece: Piece) -> bytes:
    """A piece as a block holds it."""
    if piece.bad is not None:
        said = piece.bad.encode("utf-8", "surrogateescape")
        return HEAD.pack(len(said), 4) + said
    flags = int(piece.starts) | int(piece.kept is not None) << 1
    kept = b"" if piece.kept is None else piece.kept.astype(np.uint8).tobytes()
    return HEAD.pack(len(piece.ids), flags) + piece.ids.astype("<i4").tobytes() + kept


def check_block(path: Path) -> None:
    """Raise FileNotFoundError, or DamagedError when a block is not what was written."""
    with open(path, "rb", opener=regular) as file:
        left = os.fstat(file.fileno()).st_size - 4
        size, crc = left, 0
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            crc, left = crc32c(data, crc), left - len(data)
        if size < len(MAGIC) or file.read(4) != struct.pack("<I", crc):
            raise DamagedError(f"{path}: not what was written")


def read_block(file: IO[bytes]) -> Generator[Piece, None, bool]:
    """Pieces of a block that was checked; returns whether the lane ends with it."""
    file.seek(len(MAGIC))
    while True:
        n, flags = HEAD.unpack(file.read(HEAD.size))
        if n == END:
            return bool(flags)
        if flags & 4:
            yield Piece(np.zeros(0, np.int32), bad=file.read(n).decode("utf-8", "surrogateescape"))
            continue
        ids = np.frombuffer(file.read(4 * n), "<i4").astype(np.int32)
        kept = np.frombuffer(file.read(n), np.uint8).astype(np.bool_) if flags & 2 else None
        yield Piece(ids, bool(flags & 1), kept)


def sweep_blocks(beside: Path, name: str) -> None:
    """Take away the blocks of a store of this name, of whatever options, when its tokens are in it."""
    for folder in beside.glob(f"{glob.escape(name)}.tokens-*"):
        shutil.rmtree(folder, ignore_errors=True)
