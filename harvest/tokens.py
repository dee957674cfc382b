"""From documents to rows of token ids: tokenise in batches, pack into rows of exactly `context`, shuffle by seed.

    row  =  BOS, then context − 1 tokens of text        (without a BOS: context tokens of text)

Where a tokenizer puts several tokens before a text, all of them begin a row.

Documents follow each other in a row with a separator between them (the BOS, or the EOS where there is no BOS), left out
where a document starts a row. A long document goes on in the next row. The last fragment is dropped. Giant texts are cut
before they are tokenised, so that memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from harvest.corpus import Document
from harvest.texts import Part, Piece, Reader, Tokens
from pipeline.base.errors import CorpusError, UsageError
from pipeline.base.files import disk_errors, require_free
from pipeline.base.runtime import numpy_rng
from pipeline.model.specials import First, first_ids

Item = TypeVar("Item")

BATCH_CHARACTERS = 2_000_000
"""Characters that the tokenizer gets at once: enough to use every core, little enough to hold twice."""
BLOCK = 4096
"""Sequences that are shuffled at a time."""


@dataclass(frozen=True)
class Packing:
    """How rows are made. `bos` begins each of them, `separator` stands between documents in a row.

    Raises UsageError where a row would hold nothing else.
    """

    context: int
    bos: First
    separator: int

    def __post_init__(self) -> None:
        if len(self.first) >= self.context:
            raise UsageError(
                f"--context {self.context}: a row begins with {len(self.first)} tokens; take a longer context"
            )

    @cached_property
    def first(self) -> Tokens:
        """The tokens that begin a row."""
        return np.array(first_ids(self.bos), np.int32)


def scratch_array(folder: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A new array in an unnamed file in `folder`, so that memory does not grow with it; gone when nobody holds it.

    Raises DiskError when it does not fit.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    require_free(folder, nbytes, "a copy of the tokens")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file.fileno(), nbytes)
            return np.memmap(file, dtype, "r+", shape=shape)


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its length and the disk's blocks, so that a full disk is an error here, not a signal later.

    Where the system (macOS) or the disk (ZFS) has no call for that, the zeros are written.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = bytes(min(nbytes, 1 << 20))
    for at in range(0, nbytes, len(zeros) or 1):
        os.pwrite(descriptor, zeros[: nbytes - at], at)


class Pieces:
    """A stream of pieces that several splits take from, one after the other."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.pieces = pieces
        self.waiting: Piece | None = None

    def next(self) -> Piece | None:
        """The next piece; None at the end."""
        piece, self.waiting = self.waiting, None
        return piece if piece is not None else next(self.pieces, None)

    def put_back(self, piece: Piece) -> None:
        """Let `next` give this one."""
        self.waiting = piece

    def skip_document(self) -> None:
        """Drop what is left of the document in hand."""
        while (piece := self.next()) is not None:
            if piece.starts:
                self.put_back(piece)
                return

    def skip_tokens(self, n: int) -> None:
        """Drop n tokens; what follows begins a document."""
        while n > 0 and (piece := self.next()) is not None:
            rest = piece.after(min(n, len(piece.ids)))
            n -= len(piece.ids)
            if len(rest.ids):
                self.put_back(dataclasses.replace(rest, starts=True))


class Packer:
    """Fills rows [seq, pos] with documents, one after the other, and stops when they are full.

    `left_out` [seq, pos] is set where a piece's tokens are not to be kept.
    """

    def __init__(self, packing: Packing, rows: Tokens, left_out: npt.NDArray[np.bool_]) -> None:
        self.packing, self.rows, self.left_out = packing, rows, left_out
        self.row, self.at, self.n_documents = 0, 0, 0

    @property
    def full(self) -> bool:
        """Whether every row is complete."""
        return self.row == len(self.rows)

    def add(self, piece: Piece) -> int:
        """A piece's tokens, as many as fit; returns how many did."""
        if len(piece.ids) == 0 or self.full:
            return 0
        if piece.starts:
            if self.at > len(self.packing.first):
                self._put(np.array([self.packing.separator], np.int32), None)
            self.n_documents += 1
        return self._put(piece.ids, piece.kept)

    def _put(self, tokens: Tokens, kept: npt.NDArray[np.bool_] | None) -> int:
        done = 0
        while done < len(tokens) and not self.full:
            if self.at == 0:
                self.at = len(self.packing.first)
                self.rows[self.row, : self.at] = self.packing.first
            n = min(len(tokens) - done, self.packing.context - self.at)
            self.rows[self.row, self.at : self.at + n] = tokens[done : done + n]
            if kept is not None:
                self.left_out[self.row, self.at : self.at + n] = ~kept[done : done + n]
            done, self.at = done + n, self.at + n
            if self.at == self.packing.context:
                self.row, self.at = self.row + 1, 0
        return done


def pack(
    pieces: Pieces,
    packing: Packing,
    rows: Tokens,
    left_out: npt.NDArray[np.bool_],
    what: str,
    progress: Callable[[int, int], None] = lambda rows, documents: None,
    began: Callable[[Piece], None] = lambda piece: None,
) -> int:
    """Fill `rows` [seq, context] with the documents in order; returns how many documents they took.

    Only as much is taken as it needs, so the next caller goes on in the middle of the last document, or skips its rest.
    `progress` is told rows and documents so far, `began` the first piece of each document. Raises CorpusError, saying how
    many tokens there were, when there are too few.
    """
    packer = Packer(packing, rows, left_out)
    while not packer.full:
        piece = pieces.next()
        if piece is None:
            raise CorpusError(
                f"the {what} corpus is shorter than asked: {packer.row * packing.context:,} tokens in whole rows, "
                f"{rows.size:,} asked; ask for fewer or give a longer corpus"
            )
        n = packer.add(piece)
        if n and piece.starts:
            began(piece)
        if n < len(piece.ids):
            pieces.put_back(piece.after(n))
        progress(packer.row, packer.n_documents)
    return packer.n_documents


def tokenized(
    documents: Iterator[Document] | Iterator[Document | CorpusError], reader: Reader
) -> Generator[Piece, None, None]:
    """The tokens of each document, made in batches one ahead of who reads them."""
    batches = ahead(reader.pieces(batch) for batch in batched(reader.parts(documents), BATCH_CHARACTERS))
    with contextlib.closing(batches):  # left to the collector, its end would wait for a thread where Ctrl-C gets lost
        for batch in batches:
            yield from batch


def batched(parts: Iterator[Part], n_characters: int) -> Iterator[list[Part]]:
    """Groups of parts of at least so many characters together, the last one of what is left."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text) or len(part.ids)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items, the next one made in a thread while the last one is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
        upcoming: Future[Any] = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item


def shuffle(rows: npt.NDArray[Any], segments: Sequence[int], seed: int, out: npt.NDArray[Any]) -> None:
    """Sequences into `out`, permuted by seed within each segment, so that an extension leaves those before it as they were.

    `segments` are cumulative numbers of sequences.
    """
    for start, stop in zip((0, *segments), segments):
        order = start + numpy_rng("sequences", seed, start, stop).permutation(stop - start)
        for a in range(0, stop - start, BLOCK):
            out[start + a : min(start + a + BLOCK, stop)] = rows[order[a : a + BLOCK]]
