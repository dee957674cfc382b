"""Stores on object storage, and where a path or a URL leads. Needs the extra `remote` (fsspec and its driver) for URLs.

Any URL that fsspec knows works (s3://bucket/acts.zarr, gs://…, memory://…), but a chain of them (zip://…::…); where its
driver is not installed and obstore is, obstore serves s3, gs and az. Credentials and endpoints come from where the driver looks
for them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …). An object appears whole or not at all, so the order of writing is all that a
harvest needs to be safe there too. A request that fails is tried again (`requests.py`). Training reads windows of chunks from
there; rows in any order need a local copy (`staging.py`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.base.errors import DamagedError, DiskError, UsageError, kind_and_line
from pipeline.base.files import disk_errors, is_url
from pipeline.store.backend import Files, LocalFiles, require_small
from pipeline.store.requests import Gone, Traffic, asked

REQUESTS = 32
"""Requests that are under way at a time where many files are asked for."""
OBSTORE = ("s3", "gs", "az", "abfs")
"""Protocols that obstore takes on where their own fsspec driver is not installed."""


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, without a cache of listings, and the path in its terms. Raises ImportError, ValueError."""
    import fsspec
    from fsspec.dircache import DirCache

    protocol = url.split("://")[0]
    if protocol in ("file", "local"):
        from pipeline.store.disk import Disk

        return Disk(), str(Disk._strip_protocol(url))
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        if protocol not in OBSTORE:
            raise
        try:
            import obstore.fsspec
        except ImportError:
            raise error from None
        obstore.fsspec.register(protocol)
    fs, root = fsspec.core.url_to_fs(url)
    if isinstance(listings := getattr(fs, "dircache", None), DirCache):
        listings.use_listings_cache = False  # not every driver takes an option for it
    fs.invalidate_cache()  # the Hub's keeps listings all the same
    return fs, str(root)


class RemoteFiles:
    """A store's files behind a URL. Files to write wait on the local disk (TMPDIR) until they are whole: one shard."""

    def __init__(self, url: str) -> None:
        if "::" in url:
            raise UsageError(f"{url}: a chain of URLs; unpack or copy what is in it and give the URL of that")
        try:
            self.fs, self.root = open_url(url)
        except ImportError as error:
            raise UsageError(f"{url}: needs a package that is not here ({error}); pip install it") from error
        except ValueError as error:
            raise UsageError(f"{url}: not a URL that fsspec knows ({error})") from error
        except Exception as error:  # whatever a file system's driver raises
            said = kind_and_line(error)
            raise UsageError(f"{url}: cannot be opened ({said}); check the URL, or copy the store to a disk") from error
        self.url = url.rstrip("/")
        self.traffic = Traffic()

    def path(self, key: str) -> str:
        """The path of a key in the file system's own terms."""
        return f"{self.root.rstrip('/')}/{key}"

    def where(self, key: str) -> str:
        """The URL of a key."""
        return f"{self.url}/{key}" if key else self.url

    def read(self, key: str, most: int) -> bytes:
        """One GET, of one byte more than there can be."""
        data: bytes = self.ask(key, lambda: self.fetch(key, 0, most + 1))
        self.traffic.add(n_bytes=len(data))
        require_small(self.where(key), len(data), most)
        return data

    def fetch(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1, fewer where the file ends. A web server may not know ranges, or never end: fsspec's `cat_file`
        takes whatever it sends, its open files no more than was asked for."""
        data: bytes
        if not self.url.startswith(("http://", "https://")):
            data = self.fs.cat_file(self.path(key), start=start, end=stop)
            return data
        with self.fs.open(self.path(key), "rb", size=stop, cache_type="none") as file:
            file.seek(start)
            data = file.read(stop - start)
        return data

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One GET of a range. Called by several threads at once, as many GETs are under way."""
        wanted = [buffer.cast("B") for buffer in buffers]
        n = sum(map(len, wanted))
        data = memoryview(self.ask(key, lambda: self.fetch(key, offset, offset + n)))
        self.traffic.add(n_bytes=len(data))
        if len(data) != n:
            raise DamagedError(f"{self.where(key)}: ends before byte {offset + n}; it was cut short")
        for buffer in wanted:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def size(self, key: str) -> int | None:
        """One HEAD. Raises DiskError where the server does not say."""
        try:
            said = self.ask(key, lambda: self.fs.info(self.path(key)))["size"]
        except Gone:
            return None
        if type(said) is not int:
            raise DiskError(
                f"{self.where(key)}: the server does not say how long it is (Content-Length), so it cannot be checked; use one "
                "that does, or copy the store to a disk"
            )
        return said

    def sizes(self, keys: Sequence[str]) -> dict[str, int | None]:
        """What a listing of everything below the URL says (a request for a thousand files); HEADs side by side for the rest."""
        listed = self.listing()
        found: dict[str, int | None] = {key: listed.get(key) for key in keys}
        unsaid = [key for key, size in found.items() if size is None]
        if not unsaid:
            return found
        with ThreadPoolExecutor(REQUESTS, "sizes") as pool:
            return found | dict(zip(unsaid, pool.map(self.size, unsaid)))

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        self.ask(key, lambda: self.fs.pipe_file(self.path(key), data))

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[BinaryIO]:
        """Written to the local disk, uploaded when it is whole."""
        folder = Path(tempfile.gettempdir())
        with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix="nested-sae-") as file:
            yield cast(BinaryIO, file)
            file.flush()
            self.ask(key, lambda: self.fs.put_file(file.name, self.path(key)))

    def delete(self, key: str) -> None:
        """One DELETE."""
        with contextlib.suppress(Gone):
            self.ask(key, lambda: self.fs.rm_file(self.path(key)))

    def delete_all(self, keys: Sequence[str]) -> None:
        """DELETEs side by side."""
        with ThreadPoolExecutor(REQUESTS, "delete") as pool:
            for _ in pool.map(self.delete, keys):
                pass

    def keys(self) -> list[str]:
        """A listing of everything below the URL."""
        return sorted(self.listing())

    def listing(self) -> dict[str, int | None]:
        """Key → bytes, where the file system's listing says them, of everything below the URL."""
        base = self.path("")
        with contextlib.suppress(Gone):
            if self.url.split("://")[0] in OBSTORE and not finds_flat(self.fs) and find_spec("obstore"):
                found = self.ask("", lambda: listed_flat(self.url))
            else:
                found = {name: one.get("size") for name, one in self.ask("", self.find).items()}
            return {name.removeprefix(base): size for name, size in found.items() if name.startswith(base)}
        return {}

    def find(self) -> dict[str, Any]:
        """Path → what is known of each file below the root, as fsspec says it."""
        found: dict[str, Any] = self.fs.find(self.root, detail=True)
        return found

    def ask(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of one request, tried again where it may pass. Raises Gone, DiskError."""
        return asked(work, self.where(key), self.traffic)


def finds_flat(fs: Any) -> bool:
    """Whether a file system has a way of its own to find all files below a path; fsspec's lists every folder alone."""
    from fsspec.asyn import AsyncFileSystem

    return not isinstance(fs, AsyncFileSystem) or type(fs)._find is not AsyncFileSystem._find


def listed_flat(url: str) -> dict[str, int]:
    """Path, bucket included, → bytes of every object below a URL, by obstore: its fsspec driver would list every folder alone."""
    import obstore

    protocol, _, path = url.partition("://")
    bucket, _, prefix = path.partition("/")
    found: dict[str, int] = {}
    for page in obstore.list(obstore.store.from_url(f"{protocol}://{bucket}"), prefix, chunk_size=1000):
        found |= {f"{bucket}/{one['path']}": one["size"] for one in page}
    return found


def open_files(path: Path | str) -> Files:
    """The files of a store at a local path or at a URL that fsspec knows."""
    return RemoteFiles(str(path)) if is_url(path) else LocalFiles(Path(path))
