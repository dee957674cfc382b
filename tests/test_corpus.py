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
from harvest.corpus import Corpus, Source, StreamedCorpus, good, open_corpus
from harvest.long_text import TextFile
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
    return contents(open_corpus(Source(str(path), **options)))


def contents(opened: Corpus) -> list[Any]:
    """What every document holds."""
    every = (document for lane in range(opened.n_lanes) for document in opened.documents(lane=lane))
    found = [document.content for document in good(every, opened.source.skip_bad)]
    return ["".join(part for _, part in one.parts()) if isinstance(one, TextFile) else one for one in found]


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
def test_any_text_survives_reading(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """Any text that JSON can hold comes as it is."""
    path = write_lines(tmp_path_factory.mktemp("c") / "a.jsonl", ["something", *texts])
    expected = sorted(t.encode("utf-8", "replace").decode() for t in ["something", *texts])
    assert sorted(read(path)) == expected


def test_identity_follows_bytes_not_folder(tmp_path: Path) -> None:
    """The identity follows the bytes and not the folder."""
    (tmp_path / "x").mkdir()
    a, b = write_lines(tmp_path / "a.jsonl", TEXTS), write_lines(tmp_path / "x" / "a.jsonl", TEXTS)
    sha = open_corpus(Source(str(a))).identity["sha256"]
    assert open_corpus(Source(str(b))).identity["sha256"] == sha
    write_lines(b, [*TEXTS, "more"])
    assert open_corpus(Source(str(b))).identity["sha256"] != sha


@pytest.mark.parametrize("name", ["/no/such.jsonl", "nowhere.jsonl.zst", "./folder"])
def test_missing_corpus_is_named(tmp_path: Path, name: str) -> None:
    """A missing corpus is said to be missing."""
    with pytest.raises(CorpusError, match="no such file or folder"):
        open_corpus(Source(name))


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
    first = contents(open_corpus(Source("some/set", seed=1, buffer=10)))
    assert sorted(first) == sorted(TEXTS)
    assert first != TEXTS
    assert first == contents(open_corpus(Source("some/set", seed=1, buffer=10)))
    assert first != contents(open_corpus(Source("some/set", seed=2, buffer=10)))


@pytest.mark.usefixtures("stream")
def test_stream_is_pinned_to_a_commit() -> None:
    """A stream is pinned to a commit and says how it was shuffled."""
    identity = StreamedCorpus(Source("some/set", buffer=10)).identity
    assert identity["revision"] == "abc123"
    assert identity["order"] == (
        "streamed, 16 files at a time, 256 documents of each in turn, permuted within 10 of all, by seed 0"
    )
    assert StreamedCorpus(Source("some/set", revision="older")).identity["revision"] == "older"


def test_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set that cannot be reached is one line."""

    def offline(name: str) -> str:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(corpus, "dataset_commit", offline)
    with pytest.raises(CorpusError, match=r"some/set: .*the Hub cannot be reached") as caught:
        open_corpus(Source("some/set"))
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


def test_a_window_permutes_whole(tmp_path: Path) -> None:
    """A compressed corpus that fits into one window comes in the order in which plain lines come, from several files too."""
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        for suffix in (".jsonl", ".jsonl.gz"):
            (tmp_path / suffix).mkdir(exist_ok=True)
            write_lines(tmp_path / suffix / f"{name}{suffix}", texts)
    assert read(tmp_path / ".jsonl.gz", seed=3) == read(tmp_path / ".jsonl", seed=3)
    assert read(tmp_path / ".jsonl.gz", seed=3, buffer=50) == read(tmp_path / ".jsonl", seed=3)


def test_windows_are_permuted_each(tmp_path: Path) -> None:
    """A longer one is permuted within windows of the buffer's documents, each its own way."""
    found = read(write_lines(tmp_path / "a.jsonl.gz", TEXTS), buffer=20)
    windows = [found[:20], found[20:40], found[40:]]
    assert [sorted(window) for window in windows] == [sorted(TEXTS[:20]), sorted(TEXTS[20:40]), sorted(TEXTS[40:])]
    orders = [[TEXTS[20 * n : 20 * n + 20].index(one) for one in window] for n, window in enumerate(windows)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(20))


def test_windows_hold_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window ends when its texts reach its bytes, whatever their number."""
    monkeypatch.setattr(corpus, "WINDOW_BYTES", 5 * len(TEXTS[0]))
    found = read(write_lines(tmp_path / "a.jsonl.gz", TEXTS[:10]))
    assert sorted(found[:5]) == TEXTS[:5]


def test_order_is_in_the_identity(tmp_path: Path) -> None:
    """What the order is, is said: permuted, or within how many documents."""
    plain, packed = write_lines(tmp_path / "a.jsonl", TEXTS), write_lines(tmp_path / "b.jsonl.gz", TEXTS)
    assert open_corpus(Source(str(plain), seed=4)).identity["order"] == "documents permuted by seed 4"
    order = open_corpus(Source(str(packed), seed=4, buffer=7)).identity["order"]
    assert order == "files by seed 4, documents permuted within 7 of them by seed 4"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_reading_starts_anywhere(tmp_path: Path, name: str) -> None:
    """From the n-th document on the order is that of reading all."""
    opened = open_corpus(Source(str(write_lines(tmp_path / name, TEXTS)), buffer=20))
    assert list(opened.documents(33)) == list(opened.documents())[33:]
