"""From documents to rows of token ids: tokenise in batches, pack into rows of exactly `context`, shuffle by seed.

    row  =  BOS, then context − 1 tokens of text        (without a BOS: context tokens of text)

Documents follow each other in a row with a separator between them (the BOS, or the EOS where there is no BOS), left out
where a document starts a row. A long document goes on in the next row. The last fragment is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError, ModelError
from pipeline.runtime import numpy_rng

Tokens = npt.NDArray[np.int32]
Item = TypeVar("Item")

BATCH_CHARACTERS = 2_000_000
"""Characters that the tokenizer gets at once: enough to use every core, little enough to hold twice."""


@dataclass(frozen=True)
class Packing:
    """How rows are made. `separator` stands between documents in a row."""

    context: int
    bos: int | None
    separator: int


class Packer:
    """Fills rows [seq, pos] with documents, one after the other, and stops when they are full."""

    def __init__(self, packing: Packing, n_sequences: int) -> None:
        self.packing = packing
        self.rows: Tokens = np.empty((n_sequences, packing.context), np.int32)
        self.row, self.at, self.n_documents = 0, 0, 0

    @property
    def full(self) -> bool:
        """Whether every row is complete."""
        return self.row == len(self.rows)

    def add(self, document: Sequence[int]) -> None:
        """One document's tokens; what does not fit any more is dropped."""
        if len(document) == 0 or self.full:
            return
        if self.at > (self.packing.bos is not None):
            self._put(np.array([self.packing.separator], np.int32))
        self._put(np.asarray(document, np.int32))
        self.n_documents += 1

    def _put(self, tokens: Tokens) -> None:
        while len(tokens) and not self.full:
            if self.at == 0 and self.packing.bos is not None:
                self.rows[self.row, 0], self.at = self.packing.bos, 1
            n = min(len(tokens), self.packing.context - self.at)
            self.rows[self.row, self.at : self.at + n] = tokens[:n]
            tokens, self.at = tokens[n:], self.at + n
            if self.at == self.packing.context:
                self.row, self.at = self.row + 1, 0


def pack(
    documents: Iterator[Sequence[int]],
    packing: Packing,
    n_sequences: int,
    what: str,
    progress: Callable[[int, int], None] = lambda rows, documents: None,
) -> tuple[Tokens, int]:
    """The first rows [n_sequences, context] of the documents in order, and how many documents they took.

    Only as many documents are taken as it needs, so the next caller goes on with the one after. `progress` is told rows
    and documents so far. Raises CorpusError, saying how many tokens there were, when there are too few.
    """
    packer = Packer(packing, n_sequences)
    while not packer.full:
        document = next(documents, None)
        if document is None:
            raise CorpusError(
                f"the {what} corpus is shorter than asked: {packer.row * packing.context:,} tokens in whole rows, "
                f"{n_sequences * packing.context:,} asked; ask for fewer or give a longer corpus"
            )
        packer.add(document)
        progress(packer.row, packer.n_documents)
    return packer.rows, packer.n_documents


def tokenized(texts: Iterator[str], tokenizer: Any) -> Generator[list[int], None, None]:
    """Token ids of each text, without special tokens, tokenised in batches one ahead of who reads them.

    What looks like a special token inside a text is text: a corpus cannot put in a BOS.
    """
    plain = {
        "add_special_tokens": False,
        "split_special_tokens": True,
        "return_attention_mask": False,
        "verbose": False,
    }

    def batches() -> Iterator[list[list[int]]]:
        for batch in batched(texts, BATCH_CHARACTERS):
            yield tokenizer(batch, **plain)["input_ids"]

    for batch in ahead(batches()):
        yield from batch


def batched(texts: Iterator[str], n_characters: int) -> Iterator[list[str]]:
    """Groups of texts of at least so many characters together, the last one of what is left."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while the last one is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
        upcoming: Future[Any] = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item


def shuffled(rows: Tokens, segments: Sequence[int], seed: int) -> Tokens:
    """Sequences permuted by seed within each segment, so that an extension leaves those before it where they were.

    `segments` are cumulative numbers of sequences.
    """
    out = np.empty_like(rows)
    for start, stop in zip((0, *segments), segments):
        order = numpy_rng("sequences", seed, start, stop).permutation(stop - start)
        out[start:stop] = rows[start + order]
    return out


def special_mask(tokens: Tokens, special: Sequence[int], vocab: int) -> npt.NDArray[np.bool_]:
    """True at special tokens and at position 0 of every row. Raises ModelError for an id that the model does not have."""
    if len(tokens) and int(tokens.max()) >= vocab:
        raise ModelError(
            f"the tokenizer makes token {int(tokens.max())}, the model knows {vocab}; give the model its own tokenizer"
        )
    table = np.zeros(vocab, np.bool_)
    table[[id for id in special if id < vocab]] = True
    mask = table[tokens]
    mask[:, 0] = True
    return mask
