"""Documents in a seeded order, read as they are needed: permuted exactly where a format lets any of them be read, else within a
buffer."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harvest.index import Index, is_indexed
from harvest.long_text import TextFile
from pipeline.base import network
from pipeline.base.errors import CorpusError
from pipeline.base.files import disk_errors, sha256
from pipeline.base.kept import kept_hash
from pipeline.base.progress import say
from pipeline.base.record_files import TEXT, expected, is_read, listed, record_files
from pipeline.base.records import Found, Record, Unread, kind_of, read_records
from pipeline.base.runtime import numpy_rng

Message = Mapping[str, Any]
Content = str | TextFile | list[int] | list[Message]
"""Text, or a file that is one, the token ids of a text that was tokenised before, or the messages of a chat."""


@dataclass(frozen=True)
class Document:
    """What one record holds, and where it is, for messages."""

    where: str
    content: Content


@dataclass(frozen=True)
class Source:
    """Which corpus, as the options say it. `buffer`: documents of the shuffle buffer, for a streamed dataset only.

    `text_field` is a column, or a path into nested ones: a.b. `skip_bad`: records that may be passed over, each named.
    """

    corpus: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    seed: int = 0
    buffer: int = 10_000
    revision: str | None = None
    skip_bad: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """What both kinds of corpus say of their source."""
        return {"text_field": self.text_field} | ({"skip_bad": self.skip_bad} if self.skip_bad else {})


PERMUTED = "documents permuted by seed {seed}"
WINDOWED = "files by seed {seed}, documents permuted within {buffer} of them by seed {seed}"
STREAMED = "streamed, {lanes} files at a time, {block} documents of each in turn, permuted within {buffer} of all, by seed {seed}"
SHUFFLED = "streamed, shuffled within {buffer} documents by seed {seed}"
"""The order in which data sets of the Hub were read before, by the shuffle of `datasets`."""
WINDOW_BYTES = 256 << 20
"""Text of a window of documents, at most, whatever their number."""
LANES = 16
"""Files of a data set of the Hub that are read at a time, where it has as many."""


class LocalCorpus:
    """Files on disk, in an order that is a function of their contents' names and the seed.

    Where every file lies open (plain JSON lines, whole texts), documents are permuted: each is as likely at any place. Elsewhere
    (compressed, Parquet, Arrow, CSV, JSON arrays) files are read one after the other in a seeded order, and their documents
    permuted within windows of `buffer` documents or WINDOW_BYTES; a corpus that fits into one window is permuted whole.
    """

    n_lanes, block_documents = 1, 1024
    """Streams of documents that take turns, and documents of a turn: a block (blocks.py)."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.root = Path(source.corpus).expanduser()
        with disk_errors(self.root):
            self.files = record_files(self.root, source.split, source.subset)
            self.hashes = {path: kept_hash(path) for path in self.files}
            named = (os.fsencode(self._name(path)) + f" {found}\n".encode() for path, found in self.hashes.items())
            self.sha256 = sha256(b"".join(named))  # a name need not be text

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if self.root.is_dir() else path.name

    @property
    def is_indexed(self) -> bool:
        """Whether any document can be read without those before it."""
        return all(is_indexed(path) for path in self.files)

    @property
    def identity(self) -> dict[str, Any]:
        """The hash is over names and contents of the files."""
        order = PERMUTED if self.is_indexed else WINDOWED
        order = order.format(seed=self.source.seed, buffer=self.source.buffer)
        return {"id": self.source.corpus, **self.source.about, "sha256": self.sha256, "order": order}

    @property
    def is_one_text(self) -> bool:
        """Whether it is a single text file, which holds a single document."""
        return len(self.files) == 1 and kind_of(self.files[0]) == TEXT

    def documents(self, first: int = 0, lane: int = 0) -> Iterator[Document | CorpusError]:
        """Each document once, from the first-th of the order on; for a record that holds none, what is wrong with it. There is
        one lane."""
        with disk_errors(self.root):
            if self.is_indexed:
                index = Index(self.files, self.source.text_field)
                order = numpy_rng("corpus", self.source.seed).permutation(len(index))
                yield from (document_of(*index.record(int(i)), self.source.text_field) for i in order[first:])
            else:
                found = windowed(self._in_files(), self.source.buffer, WINDOW_BYTES, ("corpus", self.source.seed))
                yield from itertools.islice(found, first, None)

    def _in_files(self) -> Iterator[Placed]:
        """Documents file after file in the seed's order."""
        field = self.source.text_field
        for n in numpy_rng("corpus files", self.source.seed).permutation(len(self.files)):
            path = self.files[n]
            found: Iterable[Found] = (
                [(str(path), {field: TextFile(path)})]
                if kind_of(path) == TEXT
                else read_records(path, (field, field.split(".")[0]))
            )
            for number, (where, record) in enumerate(found):
                yield int(n), number, document_of(where, record, field)


Placed = tuple[int, int, Document | CorpusError]
"""A document, or what is wrong with a record, behind the numbers of its file and in it."""


def windowed(
    found: Iterable[Placed], buffer: int, most_bytes: int, key: tuple[Any, ...]
) -> Iterator[Document | CorpusError]:
    """Documents permuted within windows of `buffer` of them, or of so many bytes, by a key."""
    held, size, n_windows = list[Placed](), 0, 0
    for one in found:
        held.append(one)
        size += size_of(one[2])
        if len(held) == buffer or size >= most_bytes:
            yield from permuted(held, (*key, n_windows) if n_windows else key)
            held, size, n_windows = [], 0, n_windows + 1
    yield from permuted(held, (*key, n_windows) if n_windows else key)


def permuted(held: list[Placed], key: tuple[Any, ...]) -> Iterator[Document | CorpusError]:
    """Documents of a window in a seeded order, whatever the order of the files in it."""
    held.sort(key=lambda one: one[:2])
    yield from (held[i][2] for i in numpy_rng(*key).permutation(len(held)))


def size_of(document: Document | CorpusError) -> int:
    """Bytes of memory that a document takes, about."""
    if isinstance(document, CorpusError) or isinstance(document.content, TextFile):
        return 0
    if isinstance(document.content, str):
        return len(document.content)
    return sum(len(str(one)) for one in document.content)


class StreamedCorpus:
    """A Hub dataset at one commit, read as it downloads.

    Its files, in a seeded order, are shared out to lanes, which take turns with a block of documents each; within a lane
    documents are permuted in windows. So what a lane gives depends on its own files alone, and whoever reads it needs no other.
    """

    is_one_text = False
    is_indexed = False
    block_documents = 256

    def __init__(self, source: Source) -> None:
        self.source = source
        with hub_errors(source):
            self.revision = source.revision or network.retried(lambda: dataset_commit(source.corpus), source.corpus)

    @property
    def identity(self) -> dict[str, Any]:
        """The commit stands for the contents."""
        return {
            "id": self.source.corpus,
            "subset": self.source.subset,
            "split": self.source.split,
            **self.source.about,
            "revision": self.revision,
            "order": STREAMED.format(
                lanes=LANES, block=self.block_documents, seed=self.source.seed, buffer=self.source.buffer
            ),
        }

    @property
    def part(self) -> tuple[str, str, str | None, str]:
        """What of the Hub it is: id, commit, subset, split."""
        return self.source.corpus.lower(), self.revision, self.source.subset, self.source.split

    @cached_property
    def stream(self) -> Any:
        """The data set; nothing is downloaded yet but its description. Raises CorpusError."""
        with hub_errors(self.source):
            return network.retried(lambda: load_stream(self.source, self.revision), self.source.corpus)

    @property
    def n_lanes(self) -> int:
        """Streams of documents that take turns."""
        return max(1, min(LANES, int(self.stream.num_shards)))

    def documents(self, first: int = 0, lane: int = 0) -> Iterator[Document | CorpusError]:
        """Those of a lane, from the first-th on. Downloads only as far as it is asked for, those before the first too."""
        buffer, most_bytes = max(1, self.source.buffer // self.n_lanes), WINDOW_BYTES // self.n_lanes
        found = windowed(self._in_files(lane), buffer, most_bytes, ("stream", self.source.seed, lane))
        with hub_errors(self.source):
            yield from itertools.islice(found, first, None)

    def _in_files(self, lane: int) -> Iterator[Placed]:
        """Documents of a lane's files, one after the other in the seed's order."""
        n_files = int(self.stream.num_shards)
        for n in numpy_rng("stream files", self.source.seed).permutation(n_files)[lane :: self.n_lanes]:
            for number, record in enumerate(self.stream.shard(n_files, int(n))):
                where = f"{self.source.corpus}, file {n}, document {number}"
                yield int(n), number, document_of(where, record, self.source.text_field)


Corpus = LocalCorpus | StreamedCorpus


def open_corpus(source: Source) -> Corpus:
    """A corpus from a local file or folder, else from the Hub by id.

    Raises CorpusError when there is no such thing.
    """
    local = Path(source.corpus).expanduser()
    if local.exists():
        return LocalCorpus(source)
    if source.corpus.startswith((".", "/", "~")) or is_read(local):
        raise CorpusError(f"{local}: no such file or folder; give a file ({expected()}), a folder of them, or a Hub id")
    return StreamedCorpus(source)


def require_other(training: Corpus, evaluation: Corpus) -> None:
    """Raise CorpusError when an evaluation corpus is the training corpus, or shares a file with it, under whatever names."""
    if isinstance(training, LocalCorpus) and isinstance(evaluation, LocalCorpus):
        held = {found: path for path, found in training.hashes.items()}
        for path, found in evaluation.hashes.items():
            if found in held:
                raise CorpusError(
                    f"--eval-corpus {path}: is {held[found]} of --corpus, byte for byte, so it would be trained on; give another "
                    f"one, or leave it out: then the first documents of --corpus are held out"
                )
    elif (
        isinstance(training, StreamedCorpus)
        and isinstance(evaluation, StreamedCorpus)
        and training.part == evaluation.part
    ):
        raise CorpusError(
            f"--eval-corpus {evaluation.source.corpus}: is --corpus, of the same revision, subset and split; give another one, "
            f"or leave it out: then the first documents of --corpus are held out"
        )


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
    """Turn what datasets, the Hub and the network say into one CorpusError line."""
    try:
        with network.hub_errors(source.corpus, CorpusError, f"https://huggingface.co/datasets/{source.corpus}"):
            yield
    except CorpusError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorpusError(
            f"{source.corpus}: no such file here, and not readable from the Hub ({first}); give a local file or folder, or "
            f"check the id, --subset, --split and the network (for a gated dataset: `hf auth login`)"
        ) from error


def good(found: Iterable[Document | CorpusError], allowed: int) -> Iterator[Document]:
    """The documents, passing over at most `allowed` records that hold none, each named. Raises CorpusError for one more."""
    bad = Bad(allowed)
    for document in found:
        if isinstance(document, Document):
            yield document
        else:
            bad.skip(str(document))


class Bad:
    """Records that were passed over."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.n = allowed, 0

    def skip(self, what: str) -> None:
        """Name one more. Raises CorpusError when it is too many."""
        self.n += 1
        if self.n > self.allowed:
            hint = (
                f"{self.allowed} bad records were allowed" if self.allowed else "mend it, or allow some: --skip-bad N"
            )
            raise CorpusError(f"{what}; {hint}")
        say(f"skipped bad record {self.n} of at most {self.allowed}: {what}")


def document_of(where: str, record: Record | Unread | Any, field: str) -> Document | CorpusError:
    """The document of one record, or what is wrong with it."""
    if isinstance(record, Unread):
        return CorpusError(f"{where}: {record.reason}")
    if not isinstance(record, Mapping):
        return CorpusError(f"{where}: expected a JSON object, found {type(record).__name__}")
    try:
        value = value_at(record, field)
    except KeyError:
        return CorpusError(
            f"{where}: no field {field[:80]!a}; fields found: {listed(list(record))}; choose --text-field"
        )
    if isinstance(value, str):
        return Document(where, well_formed(value))
    if isinstance(value, TextFile):
        return Document(where, value)
    if is_ids(value) or is_chat(value):
        return Document(where, value)
    kind = "null" if value is None else type(value).__name__
    return CorpusError(
        f"{where}: field {field[:80]!a} is {kind}, expected text, token ids or messages; choose --text-field"
    )


def value_at(record: Mapping[str, Any], field: str) -> Any:
    """A column's value, or that of a path into nested ones. Raises KeyError."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(field)
        value = value[part]
    return value


def well_formed(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_ids(value: Any) -> bool:
    """Whether it is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with a role."""
    return isinstance(value, list) and bool(value) and all(is_message(one) for one in value)


def is_message(value: Any) -> bool:
    """Whether it has a role, and content that is text or that a template may know."""
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value
