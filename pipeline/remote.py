"""Stores on object storage, and their copy to a local disk for training. Needs the extra `remote` (fsspec and its driver).

Any URL that fsspec knows works: s3://bucket/acts.zarr, gs://…, memory://…; where its driver is not installed and obstore
is, obstore serves s3, gs and az. Credentials and endpoints come from where the driver looks for them (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, …). An object appears whole or not at all, so the order of writing is all that a harvest needs to be safe
there too. Training reads rows in any order: `stage` the store first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.backend import Files, LocalFiles
from pipeline.errors import DamagedError, DiskError, MismatchError, UsageError
from pipeline.files import disk_errors, require_free
from pipeline.layout import COMMITTED, estimate_bytes
from pipeline.progress import Progress
from pipeline.split import Split
from pipeline.store import ROOT_KEY, Store, read_root, write_root
from pipeline.store_prepare import require_ours

PIECE = 8 << 20
"""Bytes of one download request."""
DOWNLOADS = 4
"""Shards that `stage` copies at a time."""


OBSTORE = ("s3", "gs", "az", "abfs")
"""Protocols that obstore takes on where their own fsspec driver is not installed."""


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, without a cache of listings, and the path in its terms. Raises ImportError, ValueError."""
    import fsspec

    protocol = url.split("://")[0]
    try:
        driver = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        if protocol not in OBSTORE:
            raise
        try:
            import obstore.fsspec
        except ImportError:
            raise error from None
        obstore.fsspec.register(protocol)
        driver = fsspec.get_filesystem_class(protocol)
    keeps_listings = not driver.__module__.startswith("obstore")
    fs, root = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if keeps_listings else {}))
    return fs, str(root)


class RemoteFiles:
    """A store's files behind a URL. Files to write wait on the local disk (TMPDIR) until they are whole: one shard."""

    def __init__(self, url: str) -> None:
        try:
            with remote_errors(url):
                self.fs, self.root = open_url(url)
        except ImportError as error:
            raise UsageError(f"{url}: needs a package that is not here ({error}); pip install '.[remote]'") from error
        except ValueError as error:
            raise UsageError(f"{url}: not a URL that fsspec knows ({error})") from error
        self.url = url.rstrip("/")

    def path(self, key: str) -> str:
        """The path of a key in the file system's own terms."""
        return f"{self.root.rstrip('/')}/{key}"

    def where(self, key: str) -> str:
        """The URL of a key."""
        return f"{self.url}/{key}" if key else self.url

    def read(self, key: str) -> bytes:
        """One GET."""
        with remote_errors(self.where(key)):
            return cast(bytes, self.fs.cat_file(self.path(key)))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One GET of a range."""
        wanted = [buffer.cast("B") for buffer in buffers]
        n = sum(map(len, wanted))
        with remote_errors(self.where(key)):
            data = memoryview(self.fs.cat_file(self.path(key), start=offset, end=offset + n))
        if len(data) != n:
            raise DamagedError(f"{self.where(key)}: ends before byte {offset + n}; it was cut short")
        for buffer in wanted:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def size(self, key: str) -> int | None:
        """One HEAD."""
        with remote_errors(self.where(key)), contextlib.suppress(FileNotFoundError):
            return int(self.fs.info(self.path(key))["size"])
        return None

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        with remote_errors(self.where(key)):
            self.fs.pipe_file(self.path(key), data)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[BinaryIO]:
        """Written to the local disk, uploaded when it is whole."""
        folder = Path(tempfile.gettempdir())
        with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix="nested-sae-") as file:
            yield cast(BinaryIO, file)
            file.flush()
            with remote_errors(self.where(key)):
                self.fs.put_file(file.name, self.path(key))

    def delete(self, key: str) -> None:
        """One DELETE."""
        with remote_errors(self.where(key)), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(key))

    def keys(self) -> list[str]:
        """A listing of everything below the URL."""
        with remote_errors(self.url), contextlib.suppress(FileNotFoundError):
            base = self.path("")
            return sorted(name.removeprefix(base) for name in self.fs.find(self.root) if name.startswith(base))
        return []


@contextlib.contextmanager
def remote_errors(where: str) -> Iterator[None]:
    """What a network or a bucket says, as errors of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{where}: the file is gone; run harvest --repair to make it again") from error
    except PermissionError as error:
        raise DiskError(f"{where}: no permission ({error}); check the credentials and the bucket") from error
    except OSError as error:
        raise DiskError(f"{where}: {error}; check the URL and the connection, then run again") from error


def copy_file(source: Files, target: Files, key: str) -> None:
    """Copy one file piece by piece."""
    size = source.size(key)
    if size is None:
        raise DamagedError(f"{source.where(key)}: the file is gone; run harvest --repair")
    buffer = memoryview(bytearray(min(size, PIECE)))
    with target.create(key) as file:
        for offset in range(0, size, PIECE):
            piece = buffer[: min(PIECE, size - offset)]
            source.read_into(key, offset, [piece])
            file.write(piece)


def stage(url: str, path: Path, *, quiet: bool = False) -> Store:
    """Copy a finished store to a local folder and check every byte against its commit records; returns it, opened.

    Stopped anywhere, the same call goes on: shards that are there and whole are not copied again. Raises StoreError
    (no finished store at the URL), MismatchError (another store in the folder), DiskError, DamagedError.
    """
    source, target = Store.open(url), LocalFiles(path)
    require_ours(target)
    begin(source, target)
    store = Store(target, path, source.attributes)
    shards = [(split, k) for split in store.splits for k in range(split.n_shards)]
    for key in small_files(store):
        copy_file(source.files, target, key)
    with Progress(len(shards), "stage", "shard", quiet=quiet) as bar, ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(lambda shard: copy_shard(source.files, *shard), shards):
            bar.advance(1)
    write_root(target, source.attributes)
    return Store.open(path)


def begin(source: Store, target: LocalFiles) -> None:
    """Mark the folder as being written, unless a copy of this store is there. Raises MismatchError, DiskError."""
    n_train, n_eval = source.train.n_sequences, source.eval.n_sequences
    if target.size(ROOT_KEY) is None:
        if target.keys():
            raise DiskError(f"{target.root}: holds part of a store without its root; choose another folder")
        require_free(target.root, estimate_bytes(source.config, n_train, n_eval), "the copy of the store")
    elif (found := read_root(target)["id"]) != source.id:
        raise MismatchError(f"{target.root}: store {found[:10]}… is there, asked {source.id[:10]}…; use another folder")
    write_root(target, source.attributes | {"state": "preparing"})


def small_files(store: Store) -> list[str]:
    """Keys of everything but the root and the shards' own files."""
    arrays = [split.arrays[name] for split in store.splits for name in ("tokens", "special")]
    chunks = [array.key(k) for array in [*arrays, store.layout.mean] for k in range(array.n_files)]
    return [*store.attributes["files"], *chunks]


def copy_shard(source: Files, split: Split, k: int) -> None:
    """Copy one shard, commit record last, unless it is there and whole. Raises DamagedError when it arrives broken."""
    with contextlib.suppress(DamagedError):
        split.check_shard(k)
        return
    split.files.delete(split.arrays["commit"].key(k))
    for name in (*COMMITTED, "commit"):
        copy_file(source, split.files, split.arrays[name].key(k))
    split.check_shard(k)
