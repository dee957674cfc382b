"""Documents in a seeded order: local files, permuted exactly, or a Hub dataset, streamed and shuffled within a buffer."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from pipeline.base.errors import CorpusError
from pipeline.base.files import disk_errors, hash_file, sha256
from pipeline.base.runtime import derive_seed, numpy_rng


@dataclass(frozen=True)
class Source:
    """Which corpus, as the options say it. `buffer`: documents of the shuffle buffer, for a streamed dataset only."""

    corpus: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    seed: int = 0
    buffer: int = 10_000
    revision: str | None = None


class LocalCorpus:
    """Files on disk. Every document is as likely at any place: they are permuted by the seed, whatever their number."""

    def __init__(self, source: Source, scratch: Path) -> None:
        self.source, self.scratch = source, scratch
        self.root = Path(source.corpus).expanduser()
        self.files = corpus_files(self.root)
        self.sha256 = sha256("".join(f"{self._name(path)} {hash_file(path)}\n" for path in self.files))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if self.root.is_dir() else path.name

    @property
    def identity(self) -> dict[str, Any]:
        """The hash is over names and contents of the files."""
        return {
            "id": self.source.corpus,
            "text_field": self.source.text_field,
            "sha256": self.sha256,
            "order": f"documents permuted by seed {self.source.seed}",
        }

    def documents(self) -> Iterator[str]:
        """Documents are copied once, uncompressed, to an unnamed temporary file, so that memory stays small."""
        with disk_errors(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.scratch) as spool:
                ends = [0]
                for path in self.files:
                    for text in read_documents(path, self.source.text_field):
                        ends.append(ends[-1] + spool.write(text.encode("utf-8", "replace")))
                if ends[-1] == 0:
                    raise CorpusError(f"{self.root}: there is no text in it; give a corpus with documents")
                for i in numpy_rng("corpus", self.source.seed).permutation(len(ends) - 1):
                    spool.seek(ends[i])
                    yield spool.read(ends[i + 1] - ends[i]).decode()


class StreamedCorpus:
    """A Hub dataset at one commit, read as it downloads; shuffled within a buffer, and by whole files where it has several."""

    def __init__(self, source: Source) -> None:
        self.source = source
        with hub_errors(source):
            self.revision = source.revision or dataset_commit(source.corpus)

    @property
    def identity(self) -> dict[str, Any]:
        """The commit stands for the contents."""
        return {
            "id": self.source.corpus,
            "subset": self.source.subset,
            "split": self.source.split,
            "text_field": self.source.text_field,
            "revision": self.revision,
            "order": f"streamed, shuffled within {self.source.buffer} documents by seed {self.source.seed}",
        }

    def documents(self) -> Iterator[str]:
        """Downloads only as far as it is asked for."""
        source = self.source
        with hub_errors(source):
            stream = load_stream(source, self.revision)
            stream = stream.shuffle(seed=derive_seed("corpus", source.seed) % 2**32, buffer_size=source.buffer)
            for n, record in enumerate(stream):
                yield text_of(record, source.text_field, f"{source.corpus}, document {n}")


Corpus = LocalCorpus | StreamedCorpus


def open_corpus(source: Source, scratch: Path) -> Corpus:
    """A corpus from a local file or folder, else from the Hub by id. `scratch` is a folder for a temporary copy of text.

    Raises CorpusError when there is no such thing.
    """
    local = Path(source.corpus).expanduser()
    if local.exists():
        return LocalCorpus(source, scratch)
    if source.corpus.startswith((".", "/", "~")) or source.corpus.endswith(tuple(READERS)):
        raise CorpusError(
            f"{local}: no such file or folder; give one of {', '.join(READERS)}, a folder of them, or a Hub id"
        )
    return StreamedCorpus(source)


def dataset_commit(name: str) -> str:
    """The commit that a Hub dataset is at now."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name).sha)


def load_stream(source: Source, revision: str) -> Any:
    """A `datasets.IterableDataset`; nothing is downloaded yet but its description."""
    import datasets

    return datasets.load_dataset(source.corpus, source.subset, split=source.split, revision=revision, streaming=True)


@contextlib.contextmanager
def hub_errors(source: Source) -> Iterator[None]:
    """Turn what datasets and the Hub say into one CorpusError line."""
    try:
        yield
    except CorpusError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorpusError(
            f"{source.corpus}: no such file here, and not readable from the Hub ({first}); give a local file or folder, or "
            f"check the id, --subset, --split and the network (for a gated dataset: `hf auth login`)"
        ) from error


def corpus_files(root: Path) -> list[Path]:
    """The corpus files that a path names, sorted. Raises CorpusError when there are none that we can read."""
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(tuple(READERS)))
        if not found:
            raise CorpusError(f"{root}: no corpus files in this folder; expected {', '.join(READERS)}")
        return found
    if not root.name.endswith(tuple(READERS)):
        raise CorpusError(f"{root}: not a corpus file; expected {', '.join(READERS)}")
    return [root]


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The documents of one file in order. Raises CorpusError naming path and line for what cannot be read."""
    reader = next(read for suffix, read in READERS.items() if path.name.endswith(suffix))
    return reader(path, field)


def read_json_lines(path: Path, field: str) -> Iterator[str]:
    """One JSON object a line, compressed or not; empty lines are passed over."""
    number = 0
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield text_of(json.loads(line), field, f"{path}:{number}")
    except (ValueError, EOFError, OSError, zstandard.ZstdError) as error:
        if isinstance(error, CorpusError):
            raise
        at = number if isinstance(error, json.JSONDecodeError) else number + 1
        raise CorpusError(f"{path}:{at}: cannot be read ({error}); expected one JSON object a line") from error


def open_text(path: Path) -> io.TextIOWrapper:
    """A text file of UTF-8, decompressed as its name says."""
    if path.suffix == ".zst":
        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def read_text(path: Path, _field: str) -> Iterator[str]:
    """A text file is one document."""
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text ({error}); convert it or leave it out") from error


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """A column of a Parquet file, read piece by piece."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise no_field(f"{path}", field, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[field]):
            for n, text in enumerate(batch.column(0).to_pylist()):
                yield text_of({field: text}, field, f"{path}, row {n} of a batch")
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: cannot be read as Parquet ({error})") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json.gz": read_json_lines,
    ".txt": read_text,
    ".parquet": read_parquet,
}


def text_of(record: Any, field: str, where: str) -> str:
    """The text of one record. Raises CorpusError when the field is not there or is not text."""
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if field not in record:
        raise no_field(where, field, list(record))
    if not isinstance(record[field], str):
        raise CorpusError(
            f"{where}: field {field!r} is {type(record[field]).__name__}, expected text; choose --text-field"
        )
    return str(record[field])


def no_field(where: str, field: str, found: list[str]) -> CorpusError:
    """The error for a record without the text field."""
    return CorpusError(
        f"{where}: no field {field!r}; fields found: {', '.join(map(repr, found)) or 'none'}; choose --text-field"
    )
