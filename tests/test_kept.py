"""What is kept of large files: it is that of the bytes that are there, whatever lies in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from harvest import index
from harvest.index import Index, found_lines, packed, unpacked
from pipeline.base import kept
from pipeline.base.files import hash_file
from pipeline.base.kept import kept_folder, kept_hash

LINES = b'\xef\xbb\xbf{"text": "a"}\n\n  {"text": "bc"}  \r\n{"text": "d"}'


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which something is kept, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LARGE", 1)
    monkeypatch.setattr(kept, "SETTLED_S", -1e9)
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    return path


def records(path: Path) -> list[object]:
    """All records of a file, by its index."""
    found = Index([path], "text")
    return [found.record(i) for i in range(len(found))]


def test_lines_are_looked_for_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second index of a file reads none of its lines, and leads to the same records."""
    first = records(corpus)
    assert first == [
        (f"{corpus}:1", {"text": "a"}),
        (f"{corpus}:3", {"text": "bc"}),
        (f"{corpus}:4", {"text": "d"}),
    ]
    monkeypatch.setattr(index, "raw_lines", lambda path: pytest.fail("read again"))
    assert records(corpus) == first


def test_a_changed_file_is_read(corpus: Path) -> None:
    """A file that was replaced is indexed and hashed anew, also with the size and the time of the old one."""
    records(corpus)
    kept_hash(corpus)
    before = os.stat(corpus)
    other = corpus.with_name("b")
    other.write_bytes(LINES.replace(b'"a"}\n\n', b'"a"}  '))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(corpus)
    assert corpus.stat().st_size == before.st_size
    assert len(records(corpus)) == 2
    assert kept_hash(corpus) == hash_file(corpus)


def test_damaged_caches_are_made_anew(corpus: Path) -> None:
    """Whatever is done to what is kept, the index and the hash are those of the file."""
    first = records(corpus)
    kept_hash(corpus)
    files = sorted(kept_folder().iterdir())
    assert [file.suffix for file in files] == ["", ".lines"]
    for file in files:
        whole = file.read_bytes()
        for data in (b"", whole[:-1], whole[:20], b"x" + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.write_bytes(data)
            assert records(corpus) == first
            assert kept_hash(corpus) == hash_file(corpus)
            assert file.read_bytes() == whole


def test_kept_lines_are_small() -> None:
    """What is kept of many lines takes few bytes each, and is what was found."""
    lengths = np.random.default_rng(0).integers(1, 30_000, 100_000)
    start = np.cumsum(lengths + 1) - lengths - 1
    lines = np.stack([start, lengths, np.arange(1, len(start) + 1)])
    data = packed(lines)
    assert len(data) < 4 * len(start)
    assert (unpacked(data) == lines).all()


def test_a_file_without_lines_is_indexed(corpus: Path) -> None:
    """A file of nothing but line ends has an index without records."""
    corpus.write_bytes(b"\n\n")
    assert found_lines(corpus).shape == (3, 0)
    assert records(corpus) == []
