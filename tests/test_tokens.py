"""From documents to rows: nothing lost, nothing twice, nothing in another order before the shuffle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.corpus import Content, Document
from harvest.texts import Part, Piece, Reader, Tokens
from harvest.tokens import (
    Packing,
    Pieces,
    ahead,
    batched,
    pack,
    scratch_array,
    shuffle,
    tokenized,
)
from pipeline.base.errors import CorpusError, DiskError, ModelError
from pipeline.model.specials import mark_special
from pipeline.store.split import Mask
from support import tiny_models

BOS, EOS = 2, 1
DOCUMENTS = st.lists(st.lists(st.integers(10, 99), max_size=40), min_size=1, max_size=30)


def expected_stream(documents: list[list[int]], context: int, bos: int | None, separator: int) -> list[int]:
    """Slow reference: all tokens one after the other, each row opened by its BOS."""
    out: list[int] = []
    for document in documents:
        if not document:
            continue
        starts_row = len(out) % context == (0 if bos is None else 1) or (bos is not None and len(out) % context == 0)
        for token in document if starts_row else [separator, *document]:
            if bos is not None and len(out) % context == 0:
                out.append(bos)
            out.append(token)
    return out


def packed(documents: Iterator[list[int]] | Pieces, packing: Packing, n: int, what: str) -> tuple[Tokens, int]:
    """Rows packed into new memory, and how many documents they took; the rest of the last one is skipped."""
    rows = np.empty((n, packing.context), np.int32)
    pieces = documents if isinstance(documents, Pieces) else pieces_of(documents)
    n_documents = pack(pieces, packing, rows, np.zeros(rows.shape, np.bool_), what)
    pieces.skip_document()
    return rows, n_documents


def pieces_of(documents: Iterable[list[int]]) -> Pieces:
    """Whole documents."""
    return Pieces(Piece(np.array(ids, np.int32)) for ids in documents)


def ids_of(texts: Iterable[Content], **options: Any) -> list[list[int]]:
    """Tokens of documents, all of whose parts belong to the one they start with."""
    reader = Reader(tiny_models.build_tokenizer(), tiny_models.VOCAB, **options)
    return [piece.ids.tolist() for piece in tokenized((Document("x", text) for text in texts), reader)]


def shuffled(rows: Tokens, segments: tuple[int, ...], seed: int) -> Tokens:
    """Rows shuffled into new memory."""
    out = np.empty_like(rows)
    shuffle(rows, segments, seed, out)
    return out


def marked(tokens: Tokens, special: list[int], vocab: int) -> Mask:
    """The mask of special tokens where everything was to be kept."""
    out = np.zeros(tokens.shape, np.bool_)
    mark_special(tokens, special, vocab, out)
    return out


@given(DOCUMENTS, st.integers(2, 17), st.sampled_from([None, BOS]))
def test_tokens_appear_once_in_order(documents: list[list[int]], context: int, bos: int | None) -> None:
    """Every token of every document appears once and in order."""
    separator = EOS if bos is None else bos
    stream = expected_stream(documents, context, bos, separator)
    n = len(stream) // context
    if n == 0:
        return
    rows, _ = packed(iter(documents), Packing(context, bos, separator), n, "training")
    assert rows.tolist() == np.reshape(stream[: n * context], (n, context)).tolist()
    words = [t for t in rows.reshape(-1).tolist() if t >= 10]
    assert words == [t for document in documents for t in document][: len(words)]


def test_packing_by_hand() -> None:
    """Documents are packed as by hand."""
    rows, n_documents = packed(iter([[10, 11], [12], [13, 14, 15, 16], [17]]), Packing(4, BOS, BOS), 3, "training")
    assert rows.tolist() == [[BOS, 10, 11, BOS], [BOS, 12, BOS, 13], [BOS, 14, 15, 16]]
    assert n_documents == 3
    rows, _ = packed(iter([[10, 11], [12], [13, 14, 15, 16], [17]]), Packing(4, None, EOS), 2, "training")
    assert rows.tolist() == [[10, 11, EOS, 12], [13, 14, 15, 16]]


def test_row_start_has_no_second_bos() -> None:
    """A document that starts a row has no second BOS before it."""
    rows, _ = packed(iter([[10, 11, 12], [13, 14, 15]]), Packing(4, BOS, BOS), 2, "training")
    assert rows.tolist() == [[BOS, 10, 11, 12], [BOS, 13, 14, 15]]


def test_no_document_is_in_two_splits() -> None:
    """No document is in two splits."""
    documents = pieces_of([[10] * 9, [11] * 9, [12] * 9, [13] * 9])
    first, _ = packed(documents, Packing(4, BOS, BOS), 2, "evaluation")
    second, _ = packed(documents, Packing(4, BOS, BOS), 4, "training")
    assert set(first.reshape(-1).tolist()) == {BOS, 10}
    assert set(second.reshape(-1).tolist()) == {BOS, 11, 12}


def test_short_corpus_says_its_tokens() -> None:
    """A corpus that is too short says how many tokens there were."""
    with pytest.raises(
        CorpusError, match="the training corpus is shorter than asked: 8 tokens in whole rows, 40 asked"
    ):
        packed(iter([[10] * 7]), Packing(4, BOS, BOS), 10, "training")


def test_shuffle_stays_within_segments() -> None:
    """The shuffle permutes within segments and keeps earlier ones."""
    rows = np.arange(60, dtype=np.int32).reshape(30, 2)
    once, extended = shuffled(rows[:20], (20,), seed=3), shuffled(rows, (20, 30), seed=3)
    assert (extended[:20] == once).all()
    assert sorted(extended[20:, 0]) == sorted(rows[20:, 0])
    assert not (once == rows[:20]).all()
    assert not (shuffled(rows[:20], (20,), seed=4) == once).all()


def test_specials_and_position_0_are_marked() -> None:
    """Special tokens and position 0 are marked."""
    tokens = np.array([[5, 6, BOS, 7], [BOS, 0, 8, 9]], np.int32)
    assert marked(tokens, [0, 1, 2, 999], vocab=10).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
    ]


def test_unknown_token_is_refused() -> None:
    """A token that the model does not have is refused."""
    with pytest.raises(ModelError, match="token 10, the model knows 10"):
        marked(np.array([[1, 10]], np.int32), [1], vocab=10)


def test_scratch_arrays_are_invisible(tmp_path: Path) -> None:
    """Scratch arrays are files that nobody sees."""
    array = scratch_array(tmp_path / "new", (3, 5), np.int32)
    assert isinstance(array, np.memmap)
    assert array.tolist() == [[0] * 5] * 3
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    with pytest.raises(DiskError, match=r"a copy of the tokens needs 4503.6 TB"):
        scratch_array(tmp_path, (1 << 40, 1 << 10), np.int32)


def test_texts_tokenise_in_order_without_specials() -> None:
    """Texts are tokenised in order without special tokens."""
    tokenizer = tiny_models.build_tokenizer()
    texts = [f"text {n}" for n in range(20)]
    ids = ids_of(texts)
    assert [tokenizer.decode(i) for i in ids] == texts
    assert not any({0, 1, 2} & set(i) for i in ids)


def test_special_looking_text_is_text() -> None:
    """What looks like a special token in a text is text."""
    tokenizer = tiny_models.build_tokenizer()
    (ids,) = ids_of(["a<bos>b<eos>"])
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a<bos>b<eos>"


def test_texts_are_grouped_by_their_length() -> None:
    """Texts are grouped by their length."""
    groups = batched((Part("x", text) for text in ("aaaa", "b", "cc", "ddddd", "e")), 4)
    assert [[part.text for part in group] for group in groups] == [["aaaa"], ["b", "cc", "ddddd"], ["e"]]


def test_next_item_is_made_ahead() -> None:
    """The next item is made while one is used."""
    made, second = [], threading.Event()

    def items() -> object:
        for n in range(3):
            made.append(n)
            if n == 1:
                second.set()
            yield n

    use = ahead(items())  # type: ignore[arg-type, var-annotated]
    assert next(use) == 0
    assert second.wait(10)
    assert list(use) == [1, 2]


def test_thread_error_comes_in_place() -> None:
    """An error in the thread comes through in its place."""

    def items() -> object:
        yield 1
        raise CorpusError("broken")

    use = ahead(items())  # type: ignore[arg-type, var-annotated]
    assert next(use) == 1
    with pytest.raises(CorpusError, match="broken"):
        next(use)


def test_thread_ends_with_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends when its reader stops early."""
    monkeypatch.setattr("harvest.tokens.BATCH_CHARACTERS", 1000)
    texts = (Document("x", f"text {n}") for n in range(10**9))
    stream = tokenized(texts, Reader(tiny_models.build_tokenizer(), tiny_models.VOCAB))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 600
    while any(t.name.startswith("tokenise") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reserved_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot reserve room (macOS), the zeros are written."""
    monkeypatch.delattr(os, "posix_fallocate")
    array = scratch_array(tmp_path, (700_000,), np.int32)
    assert array.shape == (700_000,)
    assert not array.any()
