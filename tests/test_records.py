"""Files of records: every kind read whole or refused, by path and line; and which files of a folder are read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base import json_array
from pipeline.base.errors import CorpusError
from pipeline.base.json_array import array_items
from pipeline.base.record_files import record_files
from pipeline.base.records import Unread, read_records, read_text, whole_records

ROWS: list[dict[str, Any]] = [{"text": f"row {n}, “{n * n}”\nnext", "label": str(n % 3)} for n in range(200)]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".zst": zstandard.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    """CSV as Python's own module writes it."""
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


TEXT_KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_kind_reads_whole(tmp_path: Path, kind: str, packed: str) -> None:
    """Every record comes back in order, compressed or not, with or without a byte-order mark."""
    for bom in (b"", b"\xef\xbb\xbf"):
        path = tmp_path / f"a{kind}{packed}"
        path.write_bytes(PACK[packed](bom + TEXT_KINDS[kind](ROWS)))
        assert whole_records(path) == ROWS


def test_columnar_files_read_whole(tmp_path: Path) -> None:
    """Parquet, Arrow's stream and Arrow's file format give the same records, or the columns asked for."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    with pyarrow.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert whole_records(tmp_path / name) == ROWS
        assert [row for _, row in read_records(tmp_path / name, ["label"])] == [{"label": r["label"]} for r in ROWS]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_columnar_files_are_refused(tmp_path: Path, name: str) -> None:
    """A file cut in the middle, or of other bytes, is one line."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    data = (tmp_path / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"nothing of the kind", b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CorpusError, match="cannot be read as"):
            whole_records(tmp_path / name)


@pytest.mark.parametrize("packed", [p for p in PACK if p])
def test_cut_frames_are_refused(tmp_path: Path, packed: str) -> None:
    """A file of two frames is read whole, and refused when the second is cut anywhere, at a line's end too."""
    first, second = PACK[packed](lines(ROWS[:100])), PACK[packed](lines(ROWS[100:]))
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(first + second)
    assert whole_records(path) == ROWS
    for left in (1, len(second) // 2, len(second) - 1):
        path.write_bytes(first + second[:left])
        with pytest.raises(CorpusError, match=r"a\.jsonl.*cannot be read"):
            whole_records(path)


def test_a_cut_single_frame_is_refused(tmp_path: Path) -> None:
    """A frame that ends behind a whole line is damage, though every line that came out of it is whole."""
    compressor = zstandard.ZstdCompressor().compressobj()
    flushed = compressor.compress(lines(ROWS[:100])) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(flushed)
    with pytest.raises(CorpusError, match="cut short"):
        whole_records(tmp_path / "a.jsonl.zst")


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50))
def test_frames_come_in_order(tmp_path_factory: pytest.TempPathFactory, frames: list[bytes], n: int) -> None:
    """Any frames, one after the other, decompress to their contents one after the other."""
    from pipeline.base.records import ZstdFile

    path = tmp_path_factory.mktemp("z") / "a.zst"
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    with open(path, "rb") as raw, ZstdFile(raw) as file:
        parts = iter(lambda: file.read(n), b"")
        assert b"".join(part for part in parts if part is not None) == b"".join(frames)


@pytest.mark.parametrize(
    ("name", "data", "number", "reason"),
    [
        ("a.jsonl", b'{"t": 1}\n\nnot json\n{"t": 2}\n', 3, "is not JSON"),
        ("a.jsonl", b'{"t": 1}\n{"t": "\xff"}\n', 2, "is not UTF-8"),
        ("a.jsonl", b'{"t": 1}\n' + b"[" * 100_000 + b"\n", 2, "nested too deeply"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n4,5\n", 3, "has 3 values, the header names 2"),
        ("a.csv", b'a,b\n1,2\n1,"x"y\n4,5\n', 3, "is not CSV"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, data: bytes, number: int, reason: str) -> None:
    """A record that cannot be read is named by its line, and those after it are read."""
    (tmp_path / name).write_bytes(data)
    bad = [(where, record.reason) for where, record in read_records(tmp_path / name) if isinstance(record, Unread)]
    assert [where for where, _ in bad] == [f"{tmp_path / name}:{number}"]
    assert reason in bad[0][1]


def test_text_may_have_a_mark(tmp_path: Path) -> None:
    """A byte-order mark is not part of a text, and other encodings are refused."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.txt").write_bytes("abc".encode("utf-16"))
    assert read_text(tmp_path / "a.txt") == "abc"
    with pytest.raises(CorpusError, match="not UTF-8"):
        read_text(tmp_path / "b.txt")


def names(root: Path, split: str = "train", subset: str | None = None) -> list[str]:
    """Names of the files that are read."""
    return [path.relative_to(root).as_posix() for path in record_files(root, split, subset)]


def write(root: Path, *files: str) -> Path:
    """A folder of small files."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "a"}\n')
    return root


def test_a_folder_without_splits_is_whole(tmp_path: Path) -> None:
    """Every file is read where no name shows a split; hidden files, readmes and licences are not."""
    root = write(tmp_path, "b.jsonl", "deep/a.txt", "README.txt", "LICENSE.txt", ".hidden/c.jsonl", ".d.jsonl", "x.pdf")
    assert names(root) == ["b.jsonl", "deep/a.txt"]


@pytest.mark.parametrize(
    "files",
    [
        ("train.jsonl", "test.jsonl", "README.md"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl", "LICENSE.txt"),
    ],
)
def test_split_names_choose_files(tmp_path: Path, files: tuple[str, ...]) -> None:
    """Where names show splits, only the one asked for is read, and one that is not there is refused."""
    root = write(tmp_path, *files)
    assert names(root) == [files[0]]
    assert names(root, "test") == [files[1]]
    with pytest.raises(CorpusError, match="no split 'validation'; there are 'train', 'test'"):
        names(root, "validation")


def test_subsets_are_folders(tmp_path: Path) -> None:
    """Without a card, a subset is a folder of that name."""
    root = write(tmp_path, "en/train.jsonl", "en/test.jsonl", "de/train.jsonl")
    assert names(root, "train", "de") == ["de/train.jsonl"]
    with pytest.raises(CorpusError, match="no subset 'fr'; there are 'de', 'en'"):
        names(root, "train", "fr")


CARD = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: a/*.jsonl
  - split: held_out
    path: [b/x.jsonl]
- config_name: second
  default: true
  data_files: c.jsonl
---
# A data set
"""


def test_a_card_is_followed(tmp_path: Path) -> None:
    """A card's configurations name the files of each subset and split."""
    root = write(tmp_path, "a/1.jsonl", "a/2.jsonl", "b/x.jsonl", "b/y.jsonl", "c.jsonl", "other.jsonl")
    (root / "README.md").write_text(CARD)
    assert names(root) == ["c.jsonl"]
    assert names(root, "train", "first") == ["a/1.jsonl", "a/2.jsonl"]
    assert names(root, "held_out", "first") == ["b/x.jsonl"]
    with pytest.raises(CorpusError, match=r"which subset\? there are 'first', 'second'"):
        names(root, "train", "third")
    with pytest.raises(CorpusError, match="no split 'test'; there are 'train', 'held_out'"):
        names(root, "test", "first")


def test_a_card_stays_inside(tmp_path: Path) -> None:
    """A card that names files outside its folder gets none of them."""
    write(tmp_path, "outside.jsonl", "in/a.jsonl")
    (tmp_path / "in" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../*.jsonl\n---\n")
    with pytest.raises(CorpusError, match="leads out of the folder"):
        names(tmp_path / "in")


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    """What `save_to_disk` wrote is read by its index: a split of several, or the only one."""
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    (found,) = record_files(tmp_path / "both", "test", None)
    assert whole_records(found) == ROWS[:3]
    (found,) = record_files(tmp_path / "one", "train", None)
    assert whole_records(found) == ROWS
    with pytest.raises(CorpusError, match="no split 'dev'; there are 'train', 'test'"):
        record_files(tmp_path / "both", "dev", None)


@pytest.mark.parametrize("entry", ["../a.arrow", "missing.arrow"])
def test_saved_indexes_stay_inside(tmp_path: Path, entry: str) -> None:
    """An index that names a file outside the folder, or none, is refused."""
    (tmp_path / "a.arrow").write_bytes(b"")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "state.json").write_text(json.dumps({"_data_files": [{"filename": entry}]}))
    with pytest.raises(CorpusError, match="named by"):
        record_files(tmp_path / "s", "train", None)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_columns_named_twice_are_refused(tmp_path: Path, name: str) -> None:
    """A header that names a column twice does not say which is meant."""
    (tmp_path / name).write_text("text,id,text\na,1,b\n".replace(",", "\t" if name == "a.tsv" else ","))
    with pytest.raises(CorpusError, match="its header names 'text' twice"):
        list(read_records(tmp_path / name))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6), st.booleans(), st.sampled_from([None, " ", "\n  "]), st.integers(1, 60), st.data())
def test_arrays_come_item_by_item(items: list[Any], is_ascii: bool, indent: str | None, n: int, data: Any) -> None:
    """Items of an array that is read in small pieces are those of the whole, and one that is cut or changed is refused where
    the whole is."""
    encoded = json.dumps(items, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        at = data.draw(st.integers(1, len(encoded)))
        encoded = encoded[:at] + data.draw(st.sampled_from([b"", b",", b"]", b'"', b"1", b"\xff"])) + encoded[at + 1 :]
    try:
        expected: Any = json.loads(encoded.decode("utf-8"))
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "PIECE_BYTES", n)
        try:
            found: Any = list(array_items(encoded[:n], io.BytesIO(encoded[n:]).read))
        except ValueError:
            found = None
    assert found == expected


def test_an_array_is_not_held() -> None:
    """Of an array no more is read than the items that were taken, and a piece."""
    file = io.BytesIO(b"[" + b'{"text": "a"},' * 100_000 + b"{}]")
    items = array_items(file.read(10), file.read)
    assert [next(items) for _ in range(3)] == [{"text": "a"}] * 3
    assert file.tell() <= 10 + 2 * json_array.PIECE_BYTES


def test_an_item_has_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An item of an array that would not fit into memory is refused, by path and number, after those before it."""
    monkeypatch.setattr(json_array, "ITEM_CHARS", 100_000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b" * 1_000_000}]))
    found = read_records(path)
    assert next(found) == (f"{path}, item 0", {"text": "a"})
    with pytest.raises(
        CorpusError, match=r"a.json: not a JSON array of objects \(item 1: is longer than 100,000 characters"
    ):
        next(found)
