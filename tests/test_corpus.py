"""Documents from files and from a stream: all of them, in an order that is a function of the seed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from harvest import corpus
from harvest.corpus import Corpus, LocalCorpus, Source, StreamedCorpus, open_corpus
from harvest.plan import Corpora
from pipeline.base.errors import CorpusError

TEXTS = [f"document {n}" for n in range(50)]


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    """JSON lines, compressed as the name says."""
    data = "".join(json.dumps({field: text, "meta": {}}) + "\n" for text in texts).encode()
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, **options: Any) -> list[str]:
    """All documents of a local corpus in order."""
    return contents(open_corpus(Source(str(path), **options), path.parent))


def contents(opened: Corpus) -> list[Any]:
    """What every document holds."""
    return [document.content for document in opened.documents()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_documents_come_once(tmp_path: Path, name: str) -> None:
    """Every document of a JSON-lines file comes once."""
    assert sorted(read(write_lines(tmp_path / name, TEXTS))) == sorted(TEXTS)


def test_parquet_column_is_read(tmp_path: Path) -> None:
    """A parquet column is read."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(50)}), tmp_path / "a.parquet")
    assert sorted(read(tmp_path / "a.parquet", text_field="body")) == sorted(TEXTS)
    with pytest.raises(CorpusError, match="no field 'text'; fields found: 'body', 'n'"):
        read(tmp_path / "a.parquet")


def test_folder_is_all_its_files(tmp_path: Path) -> None:
    """A folder is all its files and a text file is one document."""
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "b.jsonl", TEXTS)
    (tmp_path / "in" / "a.txt").write_text("one document\nof two lines")
    (tmp_path / "in" / "README").write_text("not a corpus file")
    assert sorted(read(tmp_path / "in")) == sorted([*TEXTS, "one document\nof two lines"])


def test_order_is_a_function_of_seed(tmp_path: Path) -> None:
    """The order is a function of the seed."""
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert read(path, seed=1) == read(path, seed=1)
    assert read(path, seed=1) != read(path, seed=2)
    assert read(path, seed=1) != TEXTS


@given(st.lists(st.text(max_size=20), min_size=1, max_size=30))
def test_any_text_survives_the_temporary_copy(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """Any text survives the temporary copy."""
    path = write_lines(tmp_path_factory.mktemp("c") / "a.jsonl", ["something", *texts])
    expected = sorted(t.encode("utf-8", "replace").decode() for t in ["something", *texts])
    assert sorted(read(path)) == expected


def test_temporary_copy_goes_when_reading_stops(tmp_path: Path) -> None:
    """The temporary copy is gone when reading stops early."""
    path = write_lines(tmp_path / "a.jsonl.gz", TEXTS)
    documents = LocalCorpus(Source(str(path)), tmp_path / "scratch").documents()
    next(documents)
    documents.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_identity_follows_bytes_not_folder(tmp_path: Path) -> None:
    """The identity follows the bytes and not the folder."""
    (tmp_path / "x").mkdir()
    a, b = write_lines(tmp_path / "a.jsonl", TEXTS), write_lines(tmp_path / "x" / "a.jsonl", TEXTS)
    sha = open_corpus(Source(str(a)), tmp_path).identity["sha256"]
    assert open_corpus(Source(str(b)), tmp_path).identity["sha256"] == sha
    write_lines(b, [*TEXTS, "more"])
    assert open_corpus(Source(str(b)), tmp_path).identity["sha256"] != sha


@pytest.mark.parametrize("name", ["/no/such.jsonl", "nowhere.jsonl.zst", "./folder"])
def test_missing_corpus_is_named(tmp_path: Path, name: str) -> None:
    """A missing corpus is said to be missing."""
    with pytest.raises(CorpusError, match="no such file or folder"):
        open_corpus(Source(name), tmp_path)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpus_is_refused(tmp_path: Path, texts: list[str]) -> None:
    """An empty corpus is refused."""
    with pytest.raises(CorpusError, match="no text in it"):
        read(write_lines(tmp_path / "a.jsonl", texts))


def test_folder_without_corpus_files_is_refused(tmp_path: Path) -> None:
    """A folder without corpus files is refused."""
    with pytest.raises(CorpusError, match="no corpus files"):
        read(tmp_path)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A file of another kind is refused."""
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match="not a corpus file"):
        read(tmp_path / "a.pdf")


def test_missing_text_field_names_the_others(tmp_path: Path) -> None:
    """A missing text field is refused, naming those there are."""
    path = write_lines(tmp_path / "a.jsonl", TEXTS, field="content")
    with pytest.raises(CorpusError, match=r"a\.jsonl:\d+: no field 'text'; fields found: 'content', 'meta'"):
        read(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": ', r"a\.jsonl:51: is not JSON"),
        (b"[1, 2]", r"a\.jsonl:51: is a list, expected a JSON object"),
        (b'{"text": 3}', r"a\.jsonl:51: field 'text' is int"),
        (b'{"text": "\xff"}', r"a\.jsonl:51: is not UTF-8"),
        (b'{"text": null}', r"a\.jsonl:51: field 'text' is null"),
        (b'{"text": [1.5]}', r"a\.jsonl:51: field 'text' is list"),
        (b"[" * 100_000, r"a\.jsonl:51: is not JSON \(nested too deeply"),
    ],
)
def test_unreadable_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    """A line that cannot be read is named."""
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(CorpusError, match=says):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_truncated_compressed_file_is_refused(tmp_path: Path, name: str) -> None:
    """A compressed file that was cut short is refused."""
    path = write_lines(tmp_path / name, [f"{n} {n * n}" for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorpusError, match="cannot be read"):
        read(path)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub, played by `datasets` itself over local files in three parts."""
    import datasets

    files = [str(write_lines(tmp_path / f"{part}.jsonl", TEXTS[part::3])) for part in range(3)]
    monkeypatch.setattr(corpus, "dataset_commit", lambda name: "abc123")
    monkeypatch.setattr(
        corpus,
        "load_stream",
        lambda source, revision: datasets.load_dataset("json", data_files=files, split="train", streaming=True),
    )


@pytest.mark.usefixtures("stream")
def test_stream_order_is_seeded(tmp_path: Path) -> None:
    """A stream gives every document once in a seeded order."""
    first = contents(open_corpus(Source("some/set", seed=1, buffer=10), tmp_path))
    assert sorted(first) == sorted(TEXTS)
    assert first != TEXTS
    assert first == contents(open_corpus(Source("some/set", seed=1, buffer=10), tmp_path))
    assert first != contents(open_corpus(Source("some/set", seed=2, buffer=10), tmp_path))


@pytest.mark.usefixtures("stream")
def test_stream_is_pinned_to_a_commit() -> None:
    """A stream is pinned to a commit and says how it was shuffled."""
    identity = StreamedCorpus(Source("some/set", buffer=10)).identity
    assert identity["revision"] == "abc123"
    assert identity["order"] == "streamed, shuffled within 10 documents by seed 0"
    assert StreamedCorpus(Source("some/set", revision="older")).identity["revision"] == "older"


def test_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set that cannot be reached is one line."""

    def offline(name: str) -> str:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(corpus, "dataset_commit", offline)
    with pytest.raises(CorpusError, match=r"some/set: .*the Hub cannot be reached") as caught:
        open_corpus(Source("some/set"), tmp_path)
    assert "\n" not in str(caught.value)


def opened(tmp_path: Path, training: Path | str, evaluation: Path | str, **options: Any) -> None:
    """Open a training corpus and a separate one for evaluation, as a harvest does."""
    sources = Source(str(training)), Source(str(evaluation), **options)
    Corpora(*sources, scratch=tmp_path).opened  # noqa: B018 (a property that raises)


@pytest.mark.parametrize("evaluation", ["a.jsonl", "link.jsonl", "copy/b.jsonl", "copy"])
def test_training_corpus_is_no_evaluation_corpus(tmp_path: Path, evaluation: str) -> None:
    """The training corpus itself, a link to it, a copy under another name and a folder that holds one are refused."""
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "copy").mkdir()
    write_lines(tmp_path / "copy/b.jsonl", TEXTS)
    write_lines(tmp_path / "copy/others.jsonl", ["another text"])
    with pytest.raises(CorpusError, match=r"--eval-corpus .*: is .*a\.jsonl of --corpus, byte for byte"):
        opened(tmp_path, path, tmp_path / evaluation)
    opened(tmp_path, path, tmp_path / "copy/others.jsonl")


def test_hub_corpus_never_evaluates_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub data set is refused for the same commit, subset and split; another split is another corpus."""
    monkeypatch.setattr(corpus, "dataset_commit", lambda name: "c0ffee")
    with pytest.raises(CorpusError, match="is --corpus, of the same revision, subset and split"):
        opened(tmp_path, "owner/texts", "Owner/texts")
    opened(tmp_path, "owner/texts", "owner/texts", split="test")
    opened(tmp_path, "owner/texts", "owner/texts", subset="en")
    opened(tmp_path, "owner/texts", "owner/texts", revision="beef")
