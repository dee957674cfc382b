"""Tokenised documents in blocks: whoever makes them, and however often they were stopped, packing sees the same pieces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from harvest.blocks import Blocks
from harvest.corpus import LocalCorpus, Source, open_corpus
from harvest.texts import Piece, Reader
from pipeline.base.errors import CorpusError
from support import tiny_models


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four documents."""
    monkeypatch.setattr(LocalCorpus, "block_documents", 4)


def make_blocks(folder: Path, texts: list[Any], **options: Any) -> Blocks:
    """Those of a corpus of these texts."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reader = Reader(tiny_models.build_tokenizer(), tiny_models.VOCAB)
    return Blocks(folder / "x.tokens-1", open_corpus(Source(str(path), **options)), reader)


TEXTS = [f"the {n} best of times" * (n % 3) for n in range(22)]


def plain(pieces: list[Piece]) -> list[Any]:
    """Pieces as lists."""
    return [(piece.ids.tolist(), piece.starts, piece.kept) for piece in pieces]


def test_kept_blocks_give_equal_pieces(tmp_path: Path) -> None:
    """Pieces read from blocks are those that were tokenised."""
    made = make_blocks(tmp_path, TEXTS)
    first = plain(list(made.pieces()))
    assert len(list(made.folder.iterdir())) == 6
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert plain(list(made.pieces())) == first
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before
    assert len(first) == 22


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shares_make_what_one_makes(tmp_path: Path, n: int) -> None:
    """Blocks that several made, in any order, are those of one, byte for byte."""
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one, many = make_blocks(tmp_path / "one", TEXTS), make_blocks(tmp_path / "many", TEXTS)
    expected = plain(list(one.pieces()))
    for i in reversed(range(n)):
        list(many.share(i, n, 10**6))
    assert {p.name: p.read_bytes() for p in many.folder.iterdir()}.items() >= {
        p.name: p.read_bytes() for p in one.folder.iterdir()
    }.items()
    assert plain(list(many.pieces())) == expected


def test_shares_end_with_what_is_needed(tmp_path: Path) -> None:
    """A part stops where the parts together have as many tokens as are asked for."""
    made = make_blocks(tmp_path, ["the best of times"] * 40)
    each = sum(len(piece.ids) for piece in itertools.islice(made.pieces(), 4))
    list(made.share(1, 2, 3 * each))
    assert sorted(path.name for path in made.folder.iterdir()) == ["0000001"]
    list(made.share(0, 2, 3 * each))
    assert sorted(path.name for path in made.folder.iterdir()) == ["0000000", "0000001", "0000002"]


def test_reading_stops_inside_a_block(tmp_path: Path) -> None:
    """A block of which not all was needed is not kept, nor an empty folder."""
    pieces = make_blocks(tmp_path, TEXTS).pieces()
    next(pieces)
    pieces.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_damaged_blocks_are_made_again(tmp_path: Path, damage: str) -> None:
    """A block that is not what was written is made again."""
    made = make_blocks(tmp_path, TEXTS)
    expected = plain(list(made.pieces()))
    path = made.path(0, 2)
    whole = bytearray(path.read_bytes())
    changed = whole[:-9] if damage == "cut" else b"" if damage == "emptied" else whole
    if damage == "flipped":
        whole[40] ^= 1
    path.write_bytes(changed)
    assert plain(list(made.pieces())) == expected
    assert len(path.read_bytes()) > 12


def test_bad_records_keep_their_place(tmp_path: Path) -> None:
    """A record that holds no document is counted where it comes, from a kept block too, and not where rows need it no more."""
    made = make_blocks(tmp_path, [*TEXTS, None, None], skip_bad=2)
    n = len(list(made.pieces()))
    assert len(list(made.pieces())) == n == 22
    strict = make_blocks(tmp_path, [*TEXTS, None, None], skip_bad=1)
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"a\.jsonl:2[34]: field 'text' is null.*1 bad records were allowed"):
            list(strict.pieces())


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpora_are_refused(tmp_path: Path, texts: list[str]) -> None:
    """A corpus without a text is refused."""
    with pytest.raises(CorpusError, match="there is no text in it"):
        list(make_blocks(tmp_path, texts).pieces())
