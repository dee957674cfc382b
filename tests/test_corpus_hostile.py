"""Corpora made by an enemy, in every format that is read, are read or refused in one line that names them, never a traceback."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from harvest.corpus import LocalCorpus, Source, good
from harvest.texts import Reader
from pipeline.base.errors import CorpusError, DamagedError
from pipeline.base.records import arrow_errors, read_records
from support.fuzzing import BAD, hurt, mutated, one_line_or_none

RECORDS: list[dict[str, Any]] = [
    {"text": "It was a dark night.", "n": 1, "meta": {"title": "a", "ids": [1, 2]}},
    {"text": "grüße, 世界", "n": 2, "meta": {"title": "b", "ids": [3]}},
    {"text": [5, 6, 7], "n": 3, "meta": {"title": "", "ids": []}},
    {"text": [{"role": "user", "content": "hi"}], "n": 4, "meta": None},
]
PLAIN = [{"text": record["text"] if isinstance(record["text"], str) else "x", "n": record["n"]} for record in RECORDS]
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
CARD = {
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "a*.jsonl"}]}],
    "license": "mit",
}
INDEX = {
    "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
    "_split": "train",
    "_fingerprint": "0123456789abcdef",
}
Rng = random.Random


def as_lines(records: list[Any], rng: Rng) -> bytes:
    """Records as JSON lines, one of them mutated."""
    records = list(records)
    at = rng.randrange(len(records))
    records[at] = mutated(records[at], rng)
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_table(rng: Rng) -> Any:
    """Columns of some type, now and then those of one that no text has."""
    columns: dict[str, Any] = {"text": [record["text"] for record in PLAIN], "n": [1, 2, 3, 4]}
    odd = [
        pyarrow.array([b"\xff", b"", None, b"a"]),
        pyarrow.array([1 << 62, 0, -(1 << 62), None], pyarrow.timestamp("us")),
        pyarrow.array([1 << 60, 0, 1, 2], pyarrow.duration("s")),
        pyarrow.array([[("a", 1)], [], None, [("b", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([{"a": None}, {"a": [1]}, None, {"a": []}]),
        pyarrow.array([[1, 2], [3], [], None]),
        pyarrow.array([0.5, float("nan"), None, 1e308]),
    ]
    for _ in range(rng.randrange(3)):
        columns[rng.choice(["text", "n", "", "a.b", "x" * 3000, "\n"])] = rng.choice(odd)
    return pyarrow.table(columns)


def parquet(rng: Rng) -> bytes:
    """A Parquet file, its bytes hurt most of the time."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(as_table(rng), sink, compression=rng.choice(["snappy", "zstd", "none"]))
    return hurt(sink.getvalue(), rng) if rng.random() < 0.8 else sink.getvalue()


def arrow(rng: Rng) -> bytes:
    """An Arrow stream or file, likewise."""
    table, sink = as_table(rng), io.BytesIO()
    with rng.choice([pyarrow.ipc.new_stream, pyarrow.ipc.new_file])(sink, table.schema) as writer:
        writer.write_table(table)
    return hurt(sink.getvalue(), rng) if rng.random() < 0.8 else sink.getvalue()


def csv_file(rng: Rng) -> bytes:
    """Comma-separated values with odd quotes, NUL bytes and bytes that are not UTF-8."""
    data = bytearray(b'text,n\n"It was, ""so"".",1\nhello,2\n"two\nlines",3\n')
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.choice(
            [b'"', b"\0", b"\n", b"\r", b",", b"\xff", b'""', b"\xef\xbb\xbf"]
        )
    return bytes(data)


def json_file(rng: Rng) -> bytes:
    """A JSON array, mutated, or cut, flipped or nested without end."""
    data = json.dumps(mutated(RECORDS, rng), ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    kind = rng.random()
    return b"[" * 100_000 if kind < 0.02 else hurt(data, rng) if kind < 0.3 else data


def lines(rng: Rng) -> bytes:
    """JSON lines, mutated or hurt."""
    data = as_lines(RECORDS, rng)
    if rng.random() < 0.05:
        data += b"!" + data[:20] + b"\n"
    return hurt(data, rng) if rng.random() < 0.3 else data


def text(rng: Rng) -> bytes:
    """A text, hurt."""
    return hurt("It was a dark night. grüße\n".encode() * 3, rng)


def packed(rng: Rng) -> tuple[str, bytes]:
    """Mutated lines or text that are compressed, or compressed ones that are hurt."""
    kind, suffix = rng.choice([".jsonl", ".txt", ".csv"]), rng.choice(sorted(PACKED))
    data = {".jsonl": lines, ".txt": text, ".csv": csv_file}[kind](rng)
    data = PACKED[suffix](data)
    return f"{kind}{suffix}", hurt(data, rng) if rng.random() < 0.6 else data


def one_file(folder: Path, name: str, data: bytes) -> Path:
    """A file of a corpus."""
    path = folder / f"evil{name}"
    path.write_bytes(data)
    return path


def saved(folder: Path, rng: Rng) -> Path:
    """What `datasets` saves, one of its files mutated."""
    root = folder / "evil"
    root.mkdir()
    harm = rng.choice(["state", "dict", "arrow"])
    if harm == "dict":
        (root / "dataset_dict.json").write_text(json.dumps(mutated({"splits": ["train", "test"]}, rng)))
        root = root / "train"
        root.mkdir()
    state = mutated(INDEX, rng) if harm == "state" else INDEX
    (root / "state.json").write_text(json.dumps(state))
    sink = io.BytesIO()
    table = pyarrow.table({"text": [record["text"] for record in PLAIN]})
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "data-00000-of-00001.arrow").write_bytes(hurt(sink.getvalue(), rng) if harm == "arrow" else sink.getvalue())
    return folder / "evil"


def carded(folder: Path, rng: Rng) -> Path:
    """A copy of a Hub data set, its card mutated."""
    root = folder / "evil"
    root.mkdir()
    (root / "a.jsonl").write_bytes(as_lines(PLAIN, rng) if rng.random() < 0.2 else b'{"text": "x"}\n')
    card = mutated(CARD, rng)
    head = json.dumps(card) if rng.random() < 0.8 else hurt(yaml.safe_dump(CARD).encode(), rng).decode("latin-1")
    if rng.random() < 0.1:
        head = rng.choice(
            ["configs: &a [*a]", "? [a]\n: b", "configs: !!python/object:os.system {}", "a: 2026-99-99", "[" * 2000]
        )
    (root / "README.md").write_bytes(f"---\n{head}\n---\n# Data\n".encode("utf-8", "surrogatepass"))
    return root


FORMATS: dict[str, Callable[[Path, Rng], Path]] = {
    "json": lambda folder, rng: one_file(folder, ".json", json_file(rng)),
    "jsonl": lambda folder, rng: one_file(folder, ".jsonl", lines(rng)),
    "csv": lambda folder, rng: one_file(folder, rng.choice([".csv", ".tsv"]), csv_file(rng)),
    "parquet": lambda folder, rng: one_file(folder, ".parquet", parquet(rng)),
    "arrow": lambda folder, rng: one_file(folder, ".arrow", arrow(rng)),
    "txt": lambda folder, rng: one_file(folder, ".txt", text(rng)),
    "packed": lambda folder, rng: one_file(folder, *packed(rng)),
    "saved": saved,
    "card": carded,
}
"""Format → how a hostile corpus of it is made."""
TOKENIZER = SimpleNamespace(bos_token_id=1, bos_token="<s>", chat_template=None)


def read_everything(root: Path, field: str, rng: Rng) -> None:
    """Everything that is done with a corpus before its text is tokenised."""
    skip = rng.choice([0, 1, 100])
    corpus = LocalCorpus(Source(str(root), text_field=field, skip_bad=skip))
    assert corpus.identity["sha256"]
    for part in Reader(TOKENIZER, 100).parts(good(corpus.documents(), skip)):
        part.text.encode()


def fuzz(kind: str, folder: Path, n: int, seed: int) -> int:
    """Read n hostile corpora of a format; how many were refused."""
    rng, refused = random.Random(seed), 0
    for _ in range(n):
        place = folder / "corpus"
        place.mkdir()
        root = FORMATS[kind](place, rng)
        field = rng.choice(["text", "text", "text", "meta.title", str(rng.choice(BAD))])
        refused += one_line_or_none(partial(read_everything, root, field, rng), root)
        shutil.rmtree(place)
    return refused


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped records are said; thousands of them."""
    monkeypatch.setattr("harvest.corpus.say", lambda text: None)


@pytest.mark.parametrize("kind", FORMATS)
def test_corpora_end_in_one_line(tmp_path: Path, kind: str) -> None:
    """Whatever a corpus holds, it is read or refused in one line that names it."""
    assert 10 < fuzz(kind, tmp_path, 60, seed=1) < 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_corpora_end_in_one_line(tmp_path: Path, kind: str) -> None:
    """Likewise, ten thousand of each format."""
    assert 1000 < fuzz(kind, tmp_path, 10_000, seed=2) < 10_000


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b'"te"xt,n\n1,2\n', r"a\.csv:1: its header is not CSV"),
        ("a.jsonl.gz", gzip.compress(b"!evil\n", mtime=0), r"a\.jsonl\.gz:1: is not JSON"),
        ("a.jsonl", b'{"%s": 1}\n' % (b"x" * 100_000), r"no field 'text'; fields found: .{1,200}; choose"),
    ],
)
def test_odd_files_are_refused(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    """A header with a stray quote, a line that looks like a mark of ours and a name without end are each one short line."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=says):
        list(good(LocalCorpus(Source(str(tmp_path / name))).documents(), 0))


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "a/../../*", "", "**a"])
def test_patterns_of_a_card_are_checked(tmp_path: Path, pattern: str) -> None:
    """Patterns that lead out of the folder, or that are none, are refused before a folder is searched."""
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern or " "}]}]}
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    with pytest.raises(CorpusError, match=str(tmp_path)):
        LocalCorpus(Source(str(tmp_path)))


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    """A file in a corpus whose name is not UTF-8 is read like any other."""
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "x"}\n')
    corpus = LocalCorpus(Source(str(tmp_path)))
    assert [document.content for document in good(corpus.documents(), 0)] == ["x"]


@pytest.mark.parametrize(("size", "kind"), [(1 << 62, CorpusError), (1 << 30, pyarrow.lib.ArrowMemoryError)])
def test_claimed_sizes_are_damage(tmp_path: Path, size: int, kind: type[Exception]) -> None:
    """Memory for a size that no file has is not what the machine lacks: the file is damaged; for another it is."""
    with pytest.raises(kind, match="malloc of size"), arrow_errors(tmp_path / "a.arrow", "Arrow"):
        raise pyarrow.lib.ArrowMemoryError(f"malloc of size {size} failed")


def test_fields_there_twice_are_refused(tmp_path: Path) -> None:
    """An Arrow file with two fields of the name that is asked for does not say which is meant."""
    batch = pyarrow.record_batch([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(CorpusError, match=r"a\.arrow: has 2 fields called 'text'; keep one of them"):
        list(good(LocalCorpus(Source(str(tmp_path / "a.arrow"))).documents(), 0))


def test_mutations_stay_apart() -> None:
    """One mutated input shares nothing with the next: what it nests or changes later is not in the list that all draw from."""
    before, rng = repr(BAD), random.Random(0)
    for _ in range(3000):
        json.dumps(mutated({"a": [1, {"b": 2}]}, rng))
    assert repr(BAD) == before


@pytest.mark.parametrize("names", ["a", "train", "card"])
def test_pipe_in_a_folder_is_named(tmp_path: Path, names: str) -> None:
    """A pipe among the files of a folder is refused by name, whether names, their split or a card choose it."""
    if names == "card":
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n")
    first = "train" if names == "train" else "a"
    (tmp_path / f"{first}-0.jsonl").write_text('{"text": "It was late."}\n')
    os.mkfifo(tmp_path / f"{first}-1.jsonl")
    with pytest.raises(DamagedError, match=rf"{first}-1\.jsonl: a pipe, expected a regular file"):
        LocalCorpus(Source(str(tmp_path)))


def test_links_to_nothing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to nothing in a folder, as of a split that was not fetched, is passed over with a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "It was late."}\n')
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    assert [path.name for path in LocalCorpus(Source(str(tmp_path))).files] == ["a.jsonl"]
    assert f"{tmp_path / 'b.jsonl'}: leads to nothing; passed over" in capsys.readouterr().err


def test_parquet_checksums_are_compared(tmp_path: Path) -> None:
    """A byte that changed in a page of a Parquet file whose writer kept checksums is found, not read as other text."""
    table = pyarrow.table({"text": [f"sentence {i}" for i in range(400)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    assert len(list(read_records(path))) == 400
    data = path.read_bytes()
    path.write_bytes(data.replace(b"sentence 17", b"sentence 71", 1))
    with pytest.raises(CorpusError, match=r"a\.parquet: cannot be read as Parquet"):
        list(read_records(path))
