"""The tokens of both splits: documents first, then rows, then sequences shuffled; or those that a store already holds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from harvest.blocks import Blocks
from harvest.corpus import Corpus
from harvest.long_text import GIANT
from harvest.plan import Plan
from harvest.steps import Note, Share, named_parts, read_notes
from harvest.texts import Piece, Tokens
from harvest.tokens import Pieces, pack, scratch_array, shuffle
from pipeline.base.errors import CorpusError, DamagedError, StoreError
from pipeline.base.files import hash_config, require_free
from pipeline.base.progress import Progress, say
from pipeline.model.specials import mark_special
from pipeline.store.backend import LocalFiles
from pipeline.store.prepare import SplitTokens
from pipeline.store.reader import Split, Store
from pipeline.store.split import Mask

Splits = tuple[SplitTokens, SplitTokens]
"""Training, evaluation."""


def make_tokens(plan: Plan) -> Splits:
    """Tokens of both splits: documents split first, then packed, then the sequences of each segment shuffled.

    Without a corpus of its own, evaluation takes the first documents and training goes on with the next one; of a single
    text evaluation takes the beginning, and training goes on one context further.
    """
    training, other = plan.corpora.opened
    n_tokens = (plan.n_train + plan.n_eval) * plan.config.context
    require_free(plan.corpora.scratch, 4 * n_tokens, "the tokenised documents")
    for corpus in (training,) if other is None else (training, other):
        name_lost(blocks_of(plan, corpus))
    stream = blocks_of(plan, training).pieces()
    eval_stream = stream if other is None else blocks_of(plan, other).pieces()
    with contextlib.closing(stream), contextlib.closing(eval_stream):
        pieces = Pieces(stream)
        seen = Seen()
        eval_pieces = pieces if other is None else Pieces(eval_stream)
        eval_rows = pack_split(plan, eval_pieces, plan.n_eval, "evaluation", seen.evaluated)
        if other is None and training.is_one_text:
            pieces.skip_tokens(plan.config.context)
        elif other is None:
            pieces.skip_document()
        train_rows = pack_split(plan, pieces, plan.n_train, "training", seen.trained)
    seen.require_apart(separate=other is not None)
    return finished(plan, train_rows, plan.segments), finished(plan, eval_rows, (plan.n_eval,))


def blocks_of(plan: Plan, corpus: Corpus) -> Blocks:
    """The tokenised documents of a corpus, as far as they are there."""
    about = {
        "corpus": {name: value for name, value in corpus.identity.items() if name not in ("id", "skip_bad")},
        "tokenizer": next(iter(plan.configs.values()))["tokenizer_sha256"],
        "reader": [plan.info.vocab, plan.reader.parse_special, *plan.reader.roles, *plan.reader.first],
        "cut": [corpus.block_documents, GIANT, corpus.n_lanes],
    }
    name = f"{plan.name}.tokens-{hash_config(about)[:16]}"
    return Blocks(plan.corpora.scratch / name, corpus, plan.reader)


def tokenise_part(plan: Plan, i: int, n: int) -> None:
    """Part i of n of the documents that the stores need, into blocks."""
    training, other = plan.corpora.opened
    context = plan.config.context
    needed = [(training, (plan.n_train + (plan.n_eval if other is None else 0)) * context)]
    needed += [] if other is None else [(other, plan.n_eval * context)]
    for corpus, n_tokens in needed:
        require_free(plan.corpora.scratch, 4 * n_tokens // n, "the tokenised documents")
        with Progress(-(-n_tokens // n), f"tokenise part {i} of {n}", "token") as bar:
            blocks, note = blocks_of(plan, corpus), Note.here(Share(i, n), 1, ())
            note.write(LocalFiles(blocks.folder))
            for n_ids in blocks.share(i, n, n_tokens):
                bar.advance(n_ids)
            dataclasses.replace(note, ended=True).write(LocalFiles(blocks.folder))


def name_lost(blocks: Blocks) -> None:
    """Say which parts did not tokenise their documents to the end, so that whoever packs them has more to do."""
    notes = read_notes(LocalFiles(blocks.folder))
    for n in sorted({note.share.n for note in notes}):
        lost = named_parts(range(n), [note for note in notes if note.share.n == n], but_ended=True)
        if lost:
            say(f"note     tokenising --part {lost} did not come to its end; what is missing is tokenised here")


class Seen:
    """Which documents both splits have, by their tokens. Of a document of evaluation it holds a hash of 8 bytes and a bool; up to
    26 bytes while the hashes are sorted, once all of evaluation is there."""

    def __init__(self) -> None:
        self.noted = array("Q")
        self.both = np.zeros(0, np.bool_)

    @cached_property
    def evaluation(self) -> npt.NDArray[np.uint64]:
        """Hashes of evaluation's documents, each once, in order: after the last was noted."""
        hashes = np.array(self.noted, np.uint64)
        self.noted = array("Q")
        hashes.sort()
        first = np.append(np.ones(min(1, len(hashes)), np.bool_), hashes[1:] != hashes[:-1])
        once: npt.NDArray[np.uint64] = hashes[first]
        self.both = np.zeros(len(once), np.bool_)
        return once

    def evaluated(self, piece: Piece) -> None:
        """Note a document of evaluation, by its first piece; none after the first one of training."""
        self.noted.append(hashed(piece))

    def trained(self, piece: Piece) -> None:
        """Note a document of training."""
        found = np.uint64(hashed(piece))
        at = int(np.searchsorted(self.evaluation, found))
        if at < len(self.evaluation) and self.evaluation[at] == found:
            self.both[at] = True

    def require_apart(self, *, separate: bool) -> None:
        """Say how many documents both have. Raises CorpusError when a `separate` evaluation corpus is mostly in training."""
        n, shared = len(self.evaluation), int(self.both.sum())
        if separate and 2 * shared > n:
            raise CorpusError(
                f"--eval-corpus: {shared:,} of its {n:,} documents are in the training corpus too, so scores would be those of "
                f"training; give another one, or leave it out: then the first documents of --corpus are held out"
            )
        if shared:
            say(f"note     {shared:,} of {n:,} evaluation documents are in training too, with the same text")


def hashed(piece: Piece) -> int:
    """What tells documents apart, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(piece.ids.tobytes(), digest_size=8).digest(), "little")


def pack_split(
    plan: Plan, pieces: Pieces, n_sequences: int, what: str, began: Callable[[Piece], None]
) -> tuple[Tokens, Mask]:
    """The next rows of a stream of tokenised documents and where they are not to be kept, with progress."""
    shape = (n_sequences, plan.config.context)
    rows = scratch_array(plan.corpora.scratch, shape, np.int32)
    left_out = scratch_array(plan.corpora.scratch, shape, np.bool_)
    with Progress(n_sequences, f"tokenise {what}", "sequence") as bar:

        def advance(rows: int, n_documents: int) -> None:
            bar.advance(rows - bar.n, f"{n_documents:,} documents")

        pack(pieces, plan.packing, rows, left_out, what, advance, began)
    return rows, left_out


def finished(plan: Plan, packed: tuple[Tokens, Mask], segments: Sequence[int]) -> SplitTokens:
    """Rows shuffled within their segments, with their mask of special tokens and of those that are not to be kept."""
    rows, left_out = packed
    tokens = scratch_array(plan.corpora.scratch, rows.shape, np.int32)
    special = scratch_array(plan.corpora.scratch, rows.shape, np.bool_)
    shuffle(rows, segments, plan.config.seed, tokens)
    shuffle(left_out, segments, plan.config.seed, special)
    mark_special(tokens, next(iter(plan.configs.values()))["special_ids"], plan.info.vocab, special)
    if plan.config.roles and special.all():
        raise CorpusError(
            f"--roles {','.join(plan.config.roles)}: no token is of such a message; name roles of the chats"
        )
    return SplitTokens(tokens, special)


def stored_tokens(plan: Plan, path: str) -> Splits | None:
    """The tokens that a store holds, when they are whole and as many as asked, so that a repair needs no corpus."""
    try:
        store = Store.load(path)
        store.check_metadata()
        store.check_tokens()
    except (StoreError, DamagedError):
        return None
    if (store.train.n_sequences, store.eval.n_sequences) != (plan.n_train, plan.n_eval):
        return None
    train, evaluation = (copied(plan, split) for split in store.splits)
    return train, evaluation


def copied(plan: Plan, split: Split) -> SplitTokens:
    """A split's tokens and special mask, outside the store that is about to be repaired."""
    shape, per_shard = (split.n_sequences, plan.config.context), split.shard_rows // plan.config.context
    tokens = scratch_array(plan.corpora.scratch, shape, np.int32)
    special = scratch_array(plan.corpora.scratch, shape, np.bool_)
    for k in range(split.n_shards):
        part = slice(k * per_shard, (k + 1) * per_shard)
        tokens[part] = split.shard_tokens(k)
        special[part] = ~split.shard_usable(k).reshape(-1, plan.config.context)
    return SplitTokens(tokens, special)
